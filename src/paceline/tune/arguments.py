"""Checks the arguments of samplers and pruners, as a recipe gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.errors import ConfigError, nearest

Mistake = tuple[str, str]  # the argument's name, or "" for the whole; what is wrong


@dataclass(frozen=True)
class Argument:
    """What values an argument takes.

    Attributes:
        kind: `int`, `float` or `bool`; of `str` it is one of `choices`; of `dict` a section that
            is checked elsewhere.
        low, high: the least and the largest number.
        required: whether it has to be given.
        choices: the texts it may be.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    required: bool = False
    choices: tuple[str, ...] = ()

    def wrong(self, value: Any) -> str:
        """What is wrong with a value; empty if nothing is.

        Args:
            value: as the recipe has it.
        """
        if self.choices:
            if value in self.choices:
                return ""
            near = nearest(str(value), self.choices)
            return f"expected one of {', '.join(self.choices)}, got {value!r}{near}."
        fits = isinstance(value, (int, float) if self.kind is float else self.kind)
        if not fits or (self.kind is not bool and isinstance(value, bool)):
            return f"expected {_WORDS[self.kind]}, got {value!r}."
        if self.kind in (int, float) and not self.low <= value <= self.high:
            return f"expected {_WORDS[self.kind]}{self._range()}, got {value!r}."
        return ""

    def _range(self) -> str:
        if math.isinf(self.high):
            return f" of at least {self.low:g}"
        return f" from {self.low:g} to {self.high:g}"


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a section"}
Table = Mapping[str, Mapping[str, Argument]]


def wrong_arguments(what: str, settings: Mapping[str, Any], table: Table) -> list[Mistake]:
    """What is wrong with a section that has `type:` and arguments.

    Args:
        what: "sampler" or "pruner", for messages.
        settings: the section.
        table: the arguments of each type.

    Returns:
        A key of the section and a message, for each mistake.
    """
    kind = str(settings.get("type"))
    if kind not in table:
        near = nearest(kind, table)
        return [("type", f"there is no {what} {kind!r}{near}. There are {', '.join(table)}.")]
    arguments = table[kind]
    found: list[Mistake] = []
    for name, value in settings.items():
        if name == "type":
            continue
        if name not in arguments:
            takes = f"It takes {', '.join(arguments)}." if arguments else "It takes no arguments."
            found.append(
                (name, f"{kind!r} has no such argument{nearest(name, arguments)}. {takes}")
            )
        elif wrong := arguments[name].wrong(value):
            found.append((name, wrong))
    missing = [name for name, one in arguments.items() if one.required and name not in settings]
    return found + [(name, f"{kind!r} needs it.") for name in missing]


def refuse(what: str, mistakes: list[Mistake]) -> None:
    """Raises if there are mistakes.

    Args:
        what: "sampler" or "pruner".
        mistakes: of `wrong_arguments`.

    Raises:
        ConfigError: with a line for each.
    """
    if mistakes:
        lines = [f"tune.{what}{'.' if key else ''}{key}: {text}" for key, text in mistakes]
        raise ConfigError("\n".join(lines))
