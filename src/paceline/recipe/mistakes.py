"""Mistakes in a recipe: where each one is, and one error that lists all of them."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ConfigError, DataError, MissingExtraError, RecipeError
from paceline.log.secrets import MASK, is_credential, mask_credentials
from paceline.trainer.elsewhere import ELSEWHERE

Path = tuple[str, ...]
"""A place in a recipe, outermost key first; a list's items count from "0"."""

# Other names for our keys, from other libraries.
_ALSO_CALLED = {
    **ELSEWHERE,
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
    "deepspeed": "parallel",
    "dl_num_workers": "num_workers",
    "fail_on_missing_cache": "cache",
    "pack_samples": "pack",
    "train_eval_split": "eval_share",
    "use_data_cache": "cache",
    "warmup_ratio": "warmup",
}
_MOST = 14  # the most names to list
_KEY = re.compile(r"(\w+(?:\.\w+)*)(?:: |=)(.*)", re.DOTALL)


def dotted(path: Path) -> str:
    """`("callbacks", "0", "decay")` as a user writes it: `callbacks.0.decay`."""
    return ".".join(path)


def near(name: str, known: Iterable[str]) -> str | None:
    """Finds the known name that a misspelt one, or another library's name, stands for.

    Args:
        name: as the user wrote it.
        known: the names to choose from.

    Returns:
        The nearest known name; None if none is close.
    """
    known = list(known)
    others = {other: ours for other, ours in _ALSO_CALLED.items() if ours in known}
    found = difflib.get_close_matches(name, [*known, *others], n=1, cutoff=0.6)
    return others.get(found[0], found[0]) if found else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all known ones.

    Args:
        name: as the user wrote it.
        known: the names to choose from.
    """
    known = list(known)
    meant = near(name, known)
    if meant is not None:
        return f"; did you mean {meant!r}?"
    if 0 < len(known) <= _MOST:
        return f"; there is: {', '.join(known)}."
    return "."


def with_article(noun: str) -> str:
    """A noun with its indefinite article, for messages: `an optimizer`."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        path: its place in the recipe.
        text: what was expected, what was found, and the nearest right name.
        place: `file:line` or the override, if it does not follow from the path.
    """

    path: Path
    text: str
    place: str | None = None


@dataclass
class Mistakes:
    """Collects mistakes, so that all of them can be reported at once.

    Args:
        locate: turns a path into the file and line, or the override, that set it.
        found: the mistakes.
        unknown: paths whose value is unknown, so that further mistakes there are not reported.
        count: the number of calls of `add`, mistakes that only follow from others included.
    """

    locate: Callable[[Path], str]
    found: list[Mistake] = field(default_factory=list)
    unknown: set[Path] = field(default_factory=set)
    count: int = 0

    def add(self, path: Path, text: str, place: str | None = None, *, known: bool = True) -> None:
        """Adds a mistake, unless it is a duplicate or only follows from another one.

        Args:
            path: its place in the recipe.
            text: what is wrong.
            place: `file:line` or the override, if it does not follow from the path.
            known: whether the value at `path` is known, so that further mistakes there count.
        """
        self.count += 1
        if any(path[: len(unknown)] == unknown for unknown in self.unknown):
            return
        mistake = Mistake(path, text, place)
        if mistake not in self.found:
            self.found.append(mistake)
        if not known and path:
            self.unknown.add(path)

    @contextlib.contextmanager
    def collecting(self, *path: str) -> Iterator[None]:
        """Within, an error of settings or data becomes a mistake, and the rest is left out.

        Args:
            *path: the place in the recipe, unless the error's text begins with a key below it.
        """
        try:
            yield
        except (ConfigError, DataError, MissingExtraError) as error:
            text, place = str(error), path
            named = _KEY.fullmatch(text)
            if named is not None and named[1].split(".")[0] == path[0]:
                place, text = tuple(named[1].split(".")), named[2]
            self.add(place, text)

    def concern(self, path: Path) -> bool:
        """Whether there is a mistake at or below a path."""
        return any(mistake.path[: len(path)] == path for mistake in self.found)

    def raise_any(self, recipe: Any) -> None:
        """Raises if there are mistakes.

        Raises:
            RecipeError: there is at least one mistake; the message lists them all.
        """
        if not self.found:
            return
        lines = []
        for mistake in self.found:
            name = dotted(mistake.path)
            place = mistake.place or self.locate(mistake.path)
            said = mistake.text
            if mistake.path and is_credential(mistake.path[-1]):
                said = re.sub(r"(got ).*", rf"\1{MASK}", said, flags=re.DOTALL)
            text = f"{name}: {said}" if name else said
            lines.append(mask_credentials(f"  {place}: {text}"))
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise RecipeError(f"{count} in {recipe}:\n" + "\n".join(lines))
