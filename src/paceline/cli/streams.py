"""What a command prints, where nobody may be left to read it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class Lasting:
    """A stream that silently drops its output once its reader or terminal is gone.

    A run must not fail because nobody watches it any more.

    Args:
        stream: where text goes as long as it can.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, if there is somebody to read."""
        with self._going_on():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, if there is somebody to read."""
        with self._going_on():
            self._stream.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Any:
        try:
            yield
        except OSError:  # a broken pipe, a terminal that has gone, a full disk
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def make_lasting() -> None:
    """Makes stdout and stderr lasting; one that the command began without goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
        setattr(sys, name, Lasting(stream))
