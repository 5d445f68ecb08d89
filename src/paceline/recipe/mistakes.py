"""Mistakes in a recipe: where each stands, and how all of them are told at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import RecipeError

Path = tuple[str, ...]
"""A place in a recipe, outermost key first; a list's items count from "0"."""


def dotted(path: Path) -> str:
    """`("callbacks", "0", "decay")` as a user writes it: `callbacks.0.decay`."""
    return ".".join(path)


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        path: where in the recipe.
        text: what was expected, what was found, and the nearest right name.
    """

    path: Path
    text: str


@dataclass
class Mistakes:
    """Collects mistakes, so that all of them can be told at once.

    Args:
        locate: turns a path into the file and line, or the override, that set it.
    """

    locate: Callable[[Path], str]
    found: list[Mistake] = field(default_factory=list)

    def add(self, path: Path, text: str) -> None:
        """Notes a mistake; the same one is noted once."""
        mistake = Mistake(path, text)
        if mistake not in self.found:
            self.found.append(mistake)

    def raise_any(self, recipe: Any) -> None:
        """Raises what has been found.

        Raises:
            RecipeError: there is at least one mistake; the message lists them all.
        """
        if not self.found:
            return
        lines = []
        for mistake in self.found:
            name = dotted(mistake.path)
            lines.append(f"  {self.locate(mistake.path)}: {name}{': ' * bool(name)}{mistake.text}")
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise RecipeError(f"{count} in {recipe}:\n" + "\n".join(lines))
