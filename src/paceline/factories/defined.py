"""What is checked when a class is defined: its parts, its methods' parameters, its name."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from paceline import registry
from paceline.errors import ConfigError
from paceline.factories.around import Around, wrong_callbacks


def check_and_register(cls: type[Around], base: type, kind: str, mistakes: list[str]) -> None:
    """Registers a class that has a `name` of its own, or refuses it with all that is wrong.

    Args:
        cls: a class just defined.
        base: the class of its kind, which calls its methods.
        kind: the kind of the registry.
        mistakes: what is known to be wrong with it.

    Raises:
        ConfigError: something is wrong with it; everything is listed, each with what to do.
    """
    mistakes = [*mistakes, *_uncallable(cls, base), *wrong_callbacks(cls)]
    name = vars(cls).get("name")
    if name is not None:
        mistakes += registry.missing_methods(cls)
    if name is not None and not (isinstance(name, str) and name):
        mistakes.append(f"name = {name!r}: expected a text, by which recipes name the class.")
    elif name is not None:
        try:
            if not mistakes:
                registry.register(kind, name)(cls)
            elif held := registry.taken_by(kind, name, cls):
                mistakes.append(f"name = {name!r} is taken by {held}; choose another.")
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError(f"the class {cls.__qualname__}:\n  " + "\n  ".join(mistakes))


def classes_named(cls: type, attribute: str, hint: str) -> tuple[Any, ...] | None:
    """The classes that a class gives as `attribute`, or as the annotation `hint`.

    Args:
        cls: the class; its bases are looked through too, the most derived first.
        attribute: holds a class, or a list of classes.
        hint: annotated with a class, a union or a list of classes, as text or not.

    Returns:
        The classes, or whatever stands in their place; () for None; None if neither is there.
    """
    for owner in cls.__mro__:
        if attribute in vars(owner):
            value = vars(owner)[attribute]
            return tuple(value) if isinstance(value, (list, tuple)) else _members(value)
        annotation = vars(owner).get("__annotations__", {}).get(hint)
        if annotation not in (None, Any, "Any"):
            return _members(_resolved(annotation, owner))
    return None


def _members(value: Any) -> tuple[Any, ...]:
    if value is None or value is type(None):
        return ()
    origin = typing.get_origin(value)
    if origin in (typing.Union, types.UnionType, list, tuple):
        return tuple(m for one in typing.get_args(value) for m in _members(one))
    return (value,)


def _resolved(annotation: Any, owner: type) -> Any:
    """An annotation that is text, as what it stands for; the text itself if that is not known."""
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(owner.__module__)
    stand_in = types.SimpleNamespace(__annotations__={"hint": annotation})
    frame = sys._getframe()
    while frame is not None:  # classes that are defined within a function are known only there
        try:
            found = typing.get_type_hints(
                stand_in, {**vars(module), **frame.f_locals} if module else frame.f_locals
            )
            return found["hint"]
        except Exception:  # noqa: BLE001 - an annotation may be any expression
            frame = frame.f_back
    return annotation


def _uncallable(cls: type, base: type) -> Iterator[str]:
    """The methods of a class that cannot be called as its base calls them."""
    for name, method in vars(cls).items():
        original = inspect.getattr_static(base, name, None)
        if name.startswith("_") or not (
            inspect.isfunction(method) and inspect.isfunction(original)
        ):
            continue
        theirs = list(inspect.signature(original).parameters.values())[1:]
        own = inspect.signature(method)
        if name in getattr(base, "_called_plainly", ()):
            theirs = []
        by_position = [p for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name: None for p in theirs if p.kind is p.KEYWORD_ONLY}
        for count in {len(by_position), sum(p.default is p.empty for p in by_position)}:
            try:
                own.bind(None, *[None] * count, **named)
            except TypeError:
                called = inspect.signature(original).replace(return_annotation=own.empty)
                yield (
                    f"{name}{own}: it is called as {name}{called}; take these arguments, and give "
                    "further ones a default."
                )
                break
