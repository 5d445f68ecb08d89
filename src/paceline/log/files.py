"""Files that are replaced as a whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A new text file that replaces `path` when the block ends without an error.

    After a crash, and for any reader, there is the old file or the new one, never a part of it.

    Raises:
        OSError: nothing was replaced.
    """
    # A fixed name: a file that a killed process left behind is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def shown(path: Path | str | None) -> str:
    """A path as people write it: from the working folder on, if it is in there."""
    working, given = Path.cwd(), Path(str(path))
    return str(given.relative_to(working) if given.is_relative_to(working) else given)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (a rename, a new file) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
