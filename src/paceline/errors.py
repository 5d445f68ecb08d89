"""Every error a user of Paceline can meet.

Each message says what was wrong, where, and what to do. Settings and usage errors are
`ConfigError` (the command line answers them with exit code 2, without a stack trace);
whatever happens to a run that has started is one of the other classes (exit code 1).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from paceline.exit_codes import STOPPED

T = TypeVar("T")

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LossError",
    "MetricError",
    "MismatchError",
    "MissingExtraError",
    "NonFiniteError",
    "PacelineError",
    "PeerError",
    "PeerFailure",
    "Preempted",
    "RecipeError",
    "ResumeError",
    "StateError",
    "UnreadableError",
]


class PacelineError(Exception):
    """The base of every error below."""


class ConfigError(PacelineError, ValueError):
    """A setting is misspelt, of the wrong type, or cannot be combined with another."""


class RecipeError(ConfigError):
    """One or more mistakes in a recipe or its overrides, all of them listed."""


class DataError(PacelineError):
    """A loader is empty, yields what the model cannot take, or ranks disagree about it."""


class LossError(PacelineError):
    """A training step returned no usable loss (not a scalar, no gradient, not a tensor)."""


class MetricError(PacelineError):
    """A logged value is not a number, or a monitored metric never appears."""


class NonFiniteError(PacelineError):
    """A loss or a gradient norm was not finite. It has not reached the weights."""


class CheckpointError(PacelineError):
    """A checkpoint could not be written, read or verified."""


class UnreadableError(PacelineError):
    """A file of a run could not be read, which says nothing about it: it was left as it is."""


class StateError(CheckpointError):
    """Something in the state cannot be stored; the message gives its path in the state tree."""


class MismatchError(CheckpointError):
    """A checkpoint does not fit the objects it is loaded into; every mismatch is listed."""


class ResumeError(ConfigError):
    """A run cannot be resumed with these settings; the keys that changed are listed."""


@dataclass(frozen=True)
class PeerFailure:
    """What a rank that fails lets the others know.

    Attributes:
        rank: which one.
        how: "failed", or what else happened to it, in words.
        text: its error: the type and the message.
    """

    rank: int
    how: str
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.how}: {self.text}"


class PeerError(PacelineError):
    """Another rank failed; the message carries that rank's own error.

    Attributes:
        failure: that rank and its error, where it has told; None where it was only missing.
    """

    def __init__(self, why: str | PeerFailure) -> None:
        super().__init__(str(why))
        self.failure = why if isinstance(why, PeerFailure) else None


class MissingExtraError(PacelineError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class Preempted(SystemExit):
    """A signal asked this process to exit; the run was saved and can be resumed.

    It is a `SystemExit` so that a script does not continue with a half-trained model, and so that
    its exit code (75, "temporary failure") tells the scheduler to start the same command again.

    Attributes:
        result: the `paceline.Result` of the part that ran.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(STOPPED)
        self.result = result


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests the known name closest to a misspelt one.

    Args:
        name: as the user wrote it.
        known: the names to choose from.

    Returns:
        `"; did you mean 'x'?"`, or an empty string if no name is close.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_settings(
    call: str, names: Iterable[str], known: Iterable[str], elsewhere: Mapping[str, str]
) -> ConfigError:
    """The error for keywords that a call does not have.

    Args:
        call: as the user wrote it, such as "Trainer(...)".
        names: the unknown keywords.
        known: the keywords there are, of which the nearest is suggested.
        elsewhere: what other systems' keywords are here.
    """
    known = list(known)
    lines = [
        f"{name}: "
        + (
            f"here it is {elsewhere[name]}."
            if name in elsewhere
            else f"no such setting{nearest(name, known)}"
        )
        for name in names
    ]
    return ConfigError(f"{call} got what it does not have:\n  " + "\n  ".join(lines))


def refuses_unknown(**elsewhere: str) -> Callable[[type[T]], type[T]]:
    """A class decorator: a keyword that a dataclass does not have is refused with a suggestion.

    Args:
        **elsewhere: what other systems' keywords are here.
    """

    def decorate(cls: type[T]) -> type[T]:
        make = cls.__init__
        known = [p for p in inspect.signature(make).parameters if p != "self"]

        @wraps(make)
        def checked(self: T, *args: Any, **settings: Any) -> None:
            if unknown := [name for name in settings if name not in known]:
                raise unknown_settings(f"{cls.__name__}(...)", unknown, known, elsewhere)
            make(self, *args, **settings)

        cls.__init__ = checked
        return cls

    return decorate


def some(names: Iterable[object], most: int = 8) -> str:
    """The first of many names, and the number of the others: "a, b and 3 more".

    Args:
        names: all names.
        most: how many to list.
    """
    shown = list(map(str, names))
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number of things: "1 rank", "2 ranks".

    Args:
        count: how many there are.
        noun: in the singular.
        ending: what makes it a plural.
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{ending}"


def in_a_line(error: BaseException) -> str:
    """An error's class and the first two lines of its message, for others to show.

    Args:
        error: any.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
