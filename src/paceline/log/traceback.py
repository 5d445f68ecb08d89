"""Tracebacks of errors in a user's own code, without the frames that call it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from paceline.errors import PeerError

SWITCH = "PACELINE_TRACEBACK"
_LEFT_OUT = f"frames of installed packages left out: {SWITCH}=full shows them)"
FIRST = "_paceline_first"  # an attribute of an error: the `PeerFailure` that came before it
_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def told_in_full(error: BaseException) -> str:
    """An error with its traceback: the frames of the user's own code, and where it was raised.

    Credentials of the recipe are masked, which its message may repeat.

    All frames are shown if none is the user's, or `PACELINE_TRACEBACK=full` is in the environment.

    Args:
        error: as it was raised.
    """
    told = traceback.TracebackException.from_exception(error)
    if os.environ.get(SWITCH) != "full" and any(
        is_users(f.filename) for e in _chain(told) for f in e.stack
    ):
        hidden = sum(map(_hide, _chain(told)))
        if hidden:
            return f"{_text(told)}\n({hidden} {_LEFT_OUT}"
    return _text(told)


def last_line(told: str) -> str:
    """The line that names the error, of what `told_in_full` has told.

    Args:
        told: the whole text; "unknown" stands for an empty one.
    """
    lines = [line for line in told.strip().splitlines() if not line.endswith(_LEFT_OUT)]
    return lines[-1] if lines else "unknown"


def behind_another(error: BaseException) -> tuple[int, str, bool] | None:
    """Which rank's failure came before an error of this rank.

    Args:
        error: of this rank.

    Returns:
        That rank, what it said in a line, and whether it says all there is to say: this rank's is
        the same error, or only comes of that one. None if this rank failed by itself.
    """
    of_peer = isinstance(error, PeerError)
    first = error.failure if of_peer else getattr(error, FIRST, None)
    if first is None:
        return None
    same = _line(first.text) == _line(f"{type(error).__name__}: {error}")
    return first.rank, _line(str(first)), of_peer or same


def _line(text: str) -> str:
    return text.partition("\n")[0]


def _text(told: traceback.TracebackException) -> str:
    from paceline.log.secrets import mask_credentials

    return mask_credentials("".join(told.format()).rstrip())


def _chain(told: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """An error and those that led to it, as far as they are shown."""
    each: traceback.TracebackException | None = told
    while each is not None:
        yield each
        shown = None if each.__suppress_context__ else each.__context__
        each = each.__cause__ or shown


def is_users(file: str) -> bool:
    """Whether a file of code is the user's own: not Paceline's, and not installed."""
    return not file.startswith(("<", _OURS, *_INSTALLED))


def _hide(told: traceback.TracebackException) -> int:
    """Leaves out frames that are not the user's, but for the last; returns how many."""
    kept = [f for i, f in enumerate(told.stack) if is_users(f.filename) or i == len(told.stack) - 1]
    hidden = len(told.stack) - len(kept)
    # Without columns, which Python underlines: a line less for each frame.
    plain = [traceback.FrameSummary(f.filename, f.lineno, f.name, line=f.line) for f in kept]
    told.stack = traceback.StackSummary.from_list(plain)
    return hidden
