"""Names for things that are given in a list: by them their state is kept, whatever their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from paceline.log.secrets import without_credentials
from paceline.trainer.arguments import flattened, kept_by

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


def settings_of(things: Mapping[str, Any]) -> dict[str, Any]:
    """What tells things of one name apart.

    Args:
        things: by the names that `unique_names` gave them.

    Returns:
        For each, the name that it has by itself, and the arguments it was made with, as far as it
        keeps them. Paths are left out: a run may move.
    """
    return {
        key: {"name": own_name(thing), "made with": _made_with(thing)}
        for key, thing in things.items()
    }


def _made_with(thing: Any) -> dict[str, Any]:
    """The arguments of an object, and words that it keeps under any name."""
    held = getattr(thing, "__dict__", {})
    words = {key.lstrip("_"): value for key, value in held.items() if _is_words(value)}
    kept = kept_by(thing) if held else {}
    return {
        key.removeprefix("."): without_credentials(value, key.rpartition(".")[2])
        for key, value in flattened("", words | kept, plain=True).items()
        if not (isinstance(value, str) and os.path.isabs(value))
    }


def _is_words(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(isinstance(each, str) for each in items)


def load_by_name(
    kind: str,
    here: Mapping[str, Any],
    stored: Mapping[str, Any],
    say: Callable[[str], None],
    settings: Mapping[str, Any],
    stored_settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gives things their stored states; a new one starts fresh, and one that is gone is reported.

    Several with the same name are distinguished by their settings, in any order.

    Args:
        kind: what they are, for people.
        here: the things by name, with `state_dict` and `load_state_dict`.
        stored: their states by name; a state that is empty need not be there.
        say: takes a line for people.
        settings: `settings_of` the things, from before they had a state to change them; one that
            has come since need not be there.
        stored_settings: those of the things whose states were stored, if they are known.

    Returns:
        The states that none of the things has got, by name.
    """
    settings = {**settings_of({k: v for k, v in here.items() if k not in settings}), **settings}
    state = {key for one in stored.values() if isinstance(one, Mapping) for key in one}
    before = stored_settings or {}
    theirs = _matched(
        {name: _without(state, settings[name]) for name in here},
        {name: _without(state, before.get(name)) for name in stored},
    )
    for name, thing in here.items():
        if name in theirs:
            thing.load_state_dict(stored[theirs[name]])
        elif thing.state_dict():
            say(f"the {kind} {name!r} is new in this run: it starts fresh.")
    left = {name: state for name, state in stored.items() if name not in theirs.values()}
    later = kind == "checkpoint object"  # an attribute that training may assign
    for name in left:
        say(f"the {kind} {name!r} of the checkpoint is {'not' if later else 'no longer'} there.")
    return left


def _without(state: set[str], settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings without what is state, and so has changed since."""
    if settings is None:
        return None
    made_with = {key: value for key, value in settings["made with"].items() if key not in state}
    return {**settings, "made with": made_with}


def _matched(here: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Which stored thing each is: of its own name, and of its settings if there are several."""
    pairs: dict[str, str] = {}
    own = {name: (said or {}).get("name", name) for name, said in stored.items()}
    for base in {settings["name"] for settings in here.values()}:
        mine = [name for name, settings in here.items() if settings["name"] == base]
        theirs = [k for k in stored if own[k] == base or (not stored[k] and k in mine)]
        for name in list(mine):
            same = [other for other in theirs if stored[other] == here[name]]
            if same:
                pairs[name] = name if name in same else same[0]
                mine.remove(name)
                theirs.remove(pairs[name])
        old = [name for name in mine if name in theirs and not stored[name]]
        pairs |= {name: name for name in old}
        if len(mine) == len(theirs) == 1 and not old:  # its settings have changed
            pairs[mine[0]] = theirs[0]
    return pairs
