"""Typed sections of a recipe: classes whose arguments are one pydantic object.

A class with a `config_type`, a `Config`, is not checked against its constructor's signature: the
recipe's keys are the fields of that type. What it is built from is then one object, `config`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar

import pydantic

from paceline import registry
from paceline.errors import ConfigError

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_DIGITS = r"[-+]?\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][-+]?\d{1,3})?"
_NUMBER = re.compile(rf"({_DIGITS})\s*(|[kKmMbBtT]|[kKmMgGtT][iI])", re.ASCII)
_SHARE = re.compile(rf"({_DIGITS})\s*%", re.ASCII)
_POWER = re.compile(r"(\d{1,19})\^(\d{1,3})", re.ASCII)
_LONGEST = 300  # characters of a number


def human_number(text: str) -> int | float | None:
    """The number that a text stands for; None if it stands for none.

    `1.25K`, `2M`, `7B` and `1T` count in powers of ten, `10ki`, `1Mi` and `1Gi` in powers of 1024;
    `5%` is 0.05, `2^20` a power; `1_000` and `3e-5` are as in Python.

    Args:
        text: as the recipe has it.

    Returns:
        An int where the number is whole and the text no share; else the nearest float.
    """
    text = text.strip()
    value = None if len(text) > _LONGEST else _number(text)
    # A float holds no more, and Python writes no whole number of 10_000 digits.
    return None if value is None or abs(value) > sys.float_info.max else value


def _number(text: str) -> int | float | None:
    if power := _POWER.fullmatch(text):
        return int(power[1]) ** int(power[2])
    share, plain = _SHARE.fullmatch(text), _NUMBER.fullmatch(text)
    found = share or plain
    if found is None:
        return None
    value = Decimal(found[1].replace("_", ""))
    value = value / 100 if share else value * _UNITS[found[2].lower()]
    # Decimal, so that 1.25K is 1250, and 3e-5 the float that Python reads in it.
    is_whole = not share and value == value.to_integral_value() and "e" not in found[1].lower()
    return int(value) if is_whole else float(value)


def _whole(value: Any) -> Any:
    found = human_number(value) if isinstance(value, str) else value
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if found is None or (isinstance(value, str) and not isinstance(found, int)):
        raise ValueError("a whole number, such as 4096, 1.25K, 128Ki or 2^20")
    return found


def _any_number(value: Any) -> Any:
    found = human_number(value) if isinstance(value, str) else value
    if found is None:
        raise ValueError("a number, such as 0.1, 5% or 3e-5")
    return found


HumanInt = Annotated[int, pydantic.BeforeValidator(_whole)]
"""A whole number that a recipe may also write as `1.25K`, `128Ki` or `2^20`."""
HumanFloat = Annotated[float, pydantic.BeforeValidator(_any_number)]
"""A number that a recipe may also write as `5%`, `1_000` or `3e-5`."""


class Config(pydantic.BaseModel):
    """The settings of a class that a recipe names; unknown ones are refused.

    Attributes:
        free: the fields that change no result, and may differ in a resumed run; inherited ones
            stay free.
        not_yet: keys that are refused by name, and what does not exist yet.
        type: the name by which the recipe chose the class; empty in Python, where it has a default.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", validate_default=True, arbitrary_types_allowed=True, protected_namespaces=()
    )
    free: ClassVar[frozenset[str]] = frozenset()
    not_yet: ClassVar[Mapping[str, str]] = {}
    type: str = ""
    _class: Any = pydantic.PrivateAttr(None)  # the class that the recipe has named
    _described_by: Any = pydantic.PrivateAttr(None)  # of a trainer's config: the Recipe

    @classmethod
    def all_free(cls) -> frozenset[str]:
        """The free fields, those of the classes from which it derives among them."""
        return frozenset().union(*(vars(owner).get("free", ()) for owner in cls.__mro__))

    def class_of(self, kind: str, choices: Sequence[type] = ()) -> Any:
        """The class for which these are the settings.

        Args:
            kind: its kind in the registry.
            choices: the classes it may be; the first where `type` names none.

        Raises:
            ConfigError: nothing says which.
        """
        if self._class is not None:
            return self._class
        if self.type:
            return registry.lookup(kind, self.type)
        if not choices:
            raise ConfigError(
                f"{type(self).__qualname__}(type=...): give the name of a {kind}: "
                f"{', '.join(registry.names(kind))}."
            )
        return choices[0]


@dataclass(frozen=True)
class OfKind:
    """Marks a field of a `Config` that holds components of a kind: one, or several.

    Each is checked by the `config_type` of the class that its `type:` names, and the field holds
    the configs.

    Args:
        kind: the kind of the registry.
        default: the `type:` of one that gives none.
        shorthand: turns a text that stands for a component into its keys.
    """

    kind: str
    default: str = ""
    shorthand: Callable[[str], Mapping[str, Any]] | None = None


class Typed:
    """A class whose arguments are one `Config`.

    Attributes:
        config_type: the type of its config.
    """

    config_type: ClassVar[type[Config]] = Config


def config_type_of(target: Any) -> type[Config] | None:
    """The type of a class's config; None for what takes plain arguments."""
    if not inspect.isclass(target) or not issubclass(target, Typed):
        return None
    return target.config_type


def of_kind(field: pydantic.fields.FieldInfo) -> OfKind | None:
    """The mark of a field that holds components."""
    return next((mark for mark in field.metadata if isinstance(mark, OfKind)), None)
