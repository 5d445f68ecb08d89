"""Mistakes in a recipe: where each stands, and how all of them are told at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import RecipeError
from paceline.trainer.settings import ELSEWHERE

Path = tuple[str, ...]
"""A place in a recipe, outermost key first; a list's items count from "0"."""

# What people also call things, in other libraries or in a hurry.
_ALSO_CALLED = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "wd": "weight_decay",
    "net": "model",
    "network": "model",
    "optim": "optimizer",
    "random_seed": "seed",
    "monitor": "metric_monitor",
    "patience": "early_stop",
    "early_stopping": "early_stop",
    **ELSEWHERE,
}
_MOST = 14  # names that are worth listing


def dotted(path: Path) -> str:
    """`("callbacks", "0", "decay")` as a user writes it: `callbacks.0.decay`."""
    return ".".join(path)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest right one, or all that there are."""
    known = list(known)
    others = {other: ours for other, ours in _ALSO_CALLED.items() if ours in known}
    near = difflib.get_close_matches(name, [*known, *others], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {others.get(near[0], near[0])!r}?"
    if 0 < len(known) <= _MOST:
        return f"; there is: {', '.join(known)}."
    return "."


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        path: where in the recipe.
        text: what was expected, what was found, and the nearest right name.
        place: `file:line` or the override, where the path does not tell it.
    """

    path: Path
    text: str
    place: str | None = None


@dataclass
class Mistakes:
    """Collects mistakes, so that all of them can be told at once.

    Args:
        locate: turns a path into the file and line, or the override, that set it.
        found: the mistakes.
        unknown: paths of which nothing more can be said, since their value is not known.
        count: how often something was wrong, what only follows from a mistake included.
    """

    locate: Callable[[Path], str]
    found: list[Mistake] = field(default_factory=list)
    unknown: set[Path] = field(default_factory=set)
    count: int = 0

    def add(self, path: Path, text: str, place: str | None = None, *, known: bool = True) -> None:
        """Notes a mistake; the same one is noted once, and none that only follows from another.

        Args:
            path: where in the recipe.
            text: what is wrong.
            place: `file:line` or the override, where the path does not tell it.
            known: the value that stands at `path` is known, so that more may be said of it.
        """
        self.count += 1
        if any(path[: len(unknown)] == unknown for unknown in self.unknown):
            return
        mistake = Mistake(path, text, place)
        if mistake not in self.found:
            self.found.append(mistake)
        if not known and path:
            self.unknown.add(path)

    def concern(self, path: Path) -> bool:
        """Whether something at or below a path is wrong."""
        return any(mistake.path[: len(path)] == path for mistake in self.found)

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
            place = mistake.place or self.locate(mistake.path)
            lines.append(f"  {place}: {name}{': ' * bool(name)}{mistake.text}")
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise RecipeError(f"{count} in {recipe}:\n" + "\n".join(lines))
