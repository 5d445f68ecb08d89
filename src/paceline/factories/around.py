"""`pre` and `post` callbacks around the methods of trainers and factories.

A class names its callbacks in two ways: in a list of its own, or as methods:

    class Distill(SFTTrainer):
        callbacks = [("post-step", log_temperature)]

        def pre_loss_callback(self, batch): ...

A `pre` callback takes the object and any of the method's arguments by name, and may return new
values for them, in their order. A `post` callback takes the object and, if it asks for it, the
value returned, and may return another. None changes nothing. Lists come before methods, and in both
the inherited ones first: a method that overrides another need not call it. Each runs once a call,
even if the method around which it stands calls `super()`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from paceline.errors import ConfigError, nearest

_METHOD = re.compile(r"(pre|post)_(\w+)_callback")
_WITHIN = "_events_under_way"


class Around:
    """A class whose methods may have callbacks before and after them.

    Attributes:
        events_around: the method of each event, by the event's name.
    """

    events_around: ClassVar[dict[str, str]] = {"init": "__init__"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if mistakes := wrong_callbacks(cls):
            raise ConfigError(f"the callbacks of {cls.__qualname__}:\n  " + "\n  ".join(mistakes))
        for event, method in cls.events_around.items():
            before, after = _of_event(cls, "pre", event), _of_event(cls, "post", event)
            if not (before or after):
                continue  # which then costs nothing
            found = inspect.getattr_static(cls, method)
            plain = getattr(found, "__without_callbacks__", found)
            setattr(cls, method, _wrapped(event, plain, before, after))


def _wrapped(
    event: str,
    method: Callable[..., Any],
    before: list[Callable[..., Any]],
    after: list[Callable[..., Any]],
) -> Callable[..., Any]:
    signature = inspect.signature(method)
    pre = [(callback, list(inspect.signature(callback).parameters)[1:]) for callback in before]
    post = [(callback, len(inspect.signature(callback).parameters) > 1) for callback in after]

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        under_way = vars(self).setdefault(_WITHIN, set())
        if event in under_way:  # an override that calls super()
            return method(self, *args, **kwargs)
        under_way.add(event)
        try:
            for callback, asked in pre:
                bound = signature.bind(self, *args, **kwargs)
                _replace(callback, asked, self, bound)
                args, kwargs = bound.args[1:], bound.kwargs
            value = method(self, *args, **kwargs)
            for callback, takes_value in post:
                given = callback(self, value) if takes_value else callback(self)
                value = value if given is None else given
            return value
        finally:
            under_way.discard(event)

    vars(called)["__without_callbacks__"] = method
    return called


def _replace(
    callback: Callable[..., Any], asked: list[str], owner: Any, bound: inspect.BoundArguments
) -> None:
    """Replaces a method's arguments by what a `pre` callback returns."""
    bound.apply_defaults()
    given = callback(owner, **{name: bound.arguments[name] for name in asked})
    if given is None or not asked:
        return
    values = given if len(asked) > 1 else (given,)
    if not isinstance(values, tuple) or len(values) != len(asked):
        raise ConfigError(
            f"{_name(callback)} takes {', '.join(asked)}: return new values for them in a "
            f"tuple of {len(asked)}, or None to leave them."
        )
    bound.arguments.update(zip(asked, values, strict=True))


def _of_event(cls: type, when: str, event: str) -> list[Callable[..., Any]]:
    """The callbacks of one event, inherited ones first."""
    owners = [vars(owner) for owner in reversed(cls.__mro__)]
    asked = f"{when}-{event.replace('_', '-')}"
    method = f"{asked.replace('-', '_')}_callback"
    listed = [pair for held in owners for pair in _pairs(held.get("callbacks", ()))]
    found = [callback for name, callback in listed if name == asked]
    return found + [held[method] for held in owners if method in held]


def _pairs(listed: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The (event, function) pairs of a class's own list."""
    for one in listed if isinstance(listed, (list, tuple)) else ():
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str):
            yield one[0].replace("_", "-"), one[1]


def wrong_callbacks(cls: type[Around]) -> list[str]:
    """What is wrong with the callbacks of a class, each with what to do.

    Those that it inherits are looked at again where it overrides the method around which they are.

    Args:
        cls: a class just defined.
    """
    return list(_mistakes(cls))


def _mistakes(cls: type[Around]) -> Iterator[str]:
    events = {event.replace("_", "-"): name for event, name in cls.events_around.items()}
    legal = [f"{when}-{event}" for event in events for when in ("pre", "post")]
    own = vars(cls).get("callbacks", ())
    listed = own if isinstance(own, (list, tuple)) else ()
    declared = list(_pairs(listed))
    if len(declared) < len(listed) or isinstance(own, Mapping):
        yield (
            f"callbacks = {own!r}: expected a list of pairs such as ('post-step', function). "
            "Callbacks of paceline.callbacks are for the constructor and for recipes."
        )
    for name, value in vars(cls).items():
        if found := _METHOD.fullmatch(name):
            declared.append((f"{found[1]}-{found[2].replace('_', '-')}", value))
    listing = f" Events: {', '.join(legal)}."
    for name, fn in declared:
        if name not in legal:
            yield f"{name!r} is no event{nearest(name, legal) or '.'}{listing}"
            listing = ""  # once is enough
        elif not callable(fn):
            yield f"{name!r}: expected a function, got {fn!r}."
        else:
            yield from _wrong_arguments(cls, name, events[name.partition("-")[2]], fn)
    for event, method in cls.events_around.items():
        if method in vars(cls):
            for fn in _of_event(cls, "pre", event):
                if fn not in [one for _, one in declared]:
                    yield from _wrong_arguments(cls, f"pre-{event}", method, fn)


def _wrong_arguments(
    cls: type, name: str, method: str, callback: Callable[..., Any]
) -> Iterator[str]:
    parameters = list(inspect.signature(callback).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) or not parameters:
        yield f"{_name(callback)}: name its arguments, the object first."
    elif name.startswith("post-") and len(parameters) > 2:
        yield f"{_name(callback)}: expected the object and, if it is asked for, the returned value."
    elif name.startswith("pre-"):
        known = list(inspect.signature(getattr(cls, method)).parameters)[1:]
        for p in parameters[1:]:
            if p.name not in known:
                there = f"; it takes {', '.join(known)}." if known else ", which takes none."
                yield f"{_name(callback)}: {p.name!r} is no argument of {method}(){there}"


def _name(callback: Callable[..., Any]) -> str:
    return getattr(callback, "__qualname__", repr(callback))
