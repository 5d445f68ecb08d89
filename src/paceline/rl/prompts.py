"""Prompts: texts that episodes begin with, in a list or in a file with one a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, nearest


def file_of(where: str, prompts: Mapping[str, Any]) -> str:
    """The path in {"file": path}.

    Args:
        where: it stands, for messages.
        prompts: as given.

    Raises:
        ConfigError: it is something else.
    """
    if set(prompts) != {"file"}:
        wrong = next((key for key in prompts if key != "file"), "")
        raise ConfigError(
            f"{where}: expected texts or {{file: path}}, not {wrong!r}{nearest(wrong, ['file'])}"
        )
    return str(prompts["file"])


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one a line; blank lines are none.

    Args:
        path: of the file.

    Raises:
        ConfigError: it cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts.file={str(path)!r}: {error}.") from None
    return usable([line for line in lines if line.strip()], f"prompts.file={str(path)!r}")


def usable(prompts: list[Any], where: str) -> list[Any]:
    """The prompts, if they are some and none is blank.

    Args:
        prompts: as given.
        where: they stand, for messages.

    Raises:
        ConfigError: one cannot be played.
    """
    if not prompts:
        raise ConfigError(f"{where}: there is no prompt in it.")
    blank = [i for i, p in enumerate(prompts) if isinstance(p, str) and not p.strip()]
    if blank:
        raise ConfigError(f"{where}: prompt {blank[0]} is blank.")
    return prompts
