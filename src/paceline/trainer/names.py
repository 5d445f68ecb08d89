"""Names for things that are given in a list: by them their state is kept, whatever their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def class_name(thing: Any) -> str:
    """The name of a thing's class."""
    return type(thing).__name__


def own_name(thing: Any) -> str:
    """A thing's `name` if it has set one, else the name of its class."""
    return getattr(thing, "name", "") or class_name(thing)


def unique_names(things: Iterable[T], name: Callable[[T], str] = own_name) -> dict[str, T]:
    """Things by name, in order; the second of a name gets `_2`, the third `_3`.

    Args:
        things: what is to be named.
        name: the name that one of them would have by itself.
    """
    named: dict[str, T] = {}
    for thing in things:
        base = unique = name(thing)
        count = 1
        while unique in named:
            count += 1
            unique = f"{base}_{count}"
        named[unique] = thing
    return named


def load_by_name(
    kind: str, here: Mapping[str, Any], stored: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Gives things their stored states; a new one starts fresh, and one that is gone is reported.

    Args:
        kind: what they are, for people.
        here: the things by name, with `state_dict` and `load_state_dict`.
        stored: their states by name; a state that is empty need not be there.
        say: takes a line for people.
    """
    for name, thing in here.items():
        if name in stored:
            thing.load_state_dict(stored[name])
        elif thing.state_dict():
            say(f"the {kind} {name!r} is new in this run: it starts fresh.")
    for name in stored:
        if name not in here:
            say(f"the {kind} {name!r} of the checkpoint is no longer there.")
