"""A Trainer subclass as a `@dataclass`: it takes the Trainer's settings beside its own fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import InitVar, field, make_dataclass
from functools import wraps
from typing import Any


def settings_as_fields(cls: type, names: tuple[str, ...]) -> None:
    """Lets `@dataclass` on a subclass find a class's settings, as fields that are only passed on.

    Args:
        cls: the class, whose constructor has the settings.
        names: of the settings.
    """
    parameters = inspect.signature(cls.__init__).parameters
    described = [(name, InitVar[Any], field(default=parameters[name].default)) for name in names]
    made: Any = make_dataclass("Settings", described)
    for name in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, name, getattr(made, name))


def prepare(cls: type) -> None:
    """Readies a subclass for `@dataclass`, which may follow.

    It stays an object like any other, equal to itself alone; a `__post_init__` of its own needs to
    pass nothing on.

    Args:
        cls: just made.
    """
    for name in ("__eq__", "__hash__", "__repr__"):
        if name not in vars(cls):
            setattr(cls, name, getattr(cls, name))
    own: Callable[..., Any] | None = vars(cls).get("__post_init__")
    if own is None or len(inspect.signature(own).parameters) != 1:
        return

    @wraps(own)
    def after(self: Any, *settings: Any) -> None:
        parent: Any = super(cls, self)
        parent.__post_init__(*settings)
        own(self)

    cls.__post_init__ = after  # pyright: ignore[reportAttributeAccessIssue]


def passed_on(made: Any, names: tuple[str, ...], settings: tuple[Any, ...]) -> dict[str, Any]:
    """The settings that a dataclass's constructor was given, by name.

    Args:
        made: the object; what it holds of settings for which it has fields of its own is taken out.
        names: of all settings.
        settings: those without a field of its own, in order.
    """
    kind = type(made)
    own = [name for name in names if name in vars(made)]
    given = dict(zip([name for name in names if name not in own], settings, strict=True))
    for name in own:
        given[name] = vars(made).pop(name)
        for base in kind.__mro__:  # a field's default hides what the Trainer has by that name
            if name in vars(base) and name in vars(base).get("__annotations__", {}):
                delattr(base, name)
                break
    return given
