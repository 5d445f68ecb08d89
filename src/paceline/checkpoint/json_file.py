"""Reading a JSON file of unknown origin."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from paceline.checkpoint.ranks import describe
from paceline.errors import CheckpointError
from paceline.reading import patiently, read_file

_MAX_BYTES = 1 << 30


def read_json(path: Path) -> Any:
    """Parses a JSON file of bounded size.

    Raises:
        CheckpointError: it is not a regular file with JSON in it.
        UnreadableError: it could not be read.
    """
    try:
        return json.loads(patiently(partial(read_file, path, _MAX_BYTES)))
    except OSError as error:
        raise CheckpointError(describe(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: broken JSON ({error})") from None
