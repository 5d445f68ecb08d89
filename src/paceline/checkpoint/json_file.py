"""Reading a JSON file of unknown origin."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from paceline.checkpoint.ranks import describe
from paceline.errors import CheckpointError

_MAX_BYTES = 1 << 30


def read_json(path: Path) -> Any:
    """Parses a JSON file of bounded size.

    Raises:
        CheckpointError: it is not a regular file with JSON in it.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise CheckpointError(f"{path.name}: not a JSON file of a sensible size")
            return json.loads(file.read())
    except OSError as error:
        raise CheckpointError(describe(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: broken JSON ({error})") from None


def _at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to does not block."""
    return os.open(path, flags | os.O_NONBLOCK)
