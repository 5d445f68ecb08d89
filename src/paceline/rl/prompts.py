"""Prompts: texts that episodes begin with, in a list or in a file with one a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, nearest
from paceline.log.files import replacing
from paceline.log.kept_code import EARLIER
from paceline.world.seeding import stream


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


def read_prompts(folder: Path, file: str) -> list[str]:
    """The prompts in a file, one a line; blank lines are none.

    Args:
        folder: of the recipe.
        file: its path, relative to that.

    Raises:
        ConfigError: it cannot be read, or holds no prompt.
    """
    path = beside_recipe(folder, file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts.file={str(path)!r}: {error}.") from None
    return usable([line for line in lines if line.strip()], f"prompts.file={str(path)!r}")


def beside_recipe(folder: Path, file: str) -> Path:
    """Where a file is that a recipe names.

    A run keeps one copy of it beside its recipe, also for the recipes that trained it before.

    Args:
        folder: of the recipe.
        file: its path, relative to that.
    """
    path = folder / file
    if folder.parent.name == EARLIER and not path.exists():
        return folder.parent.parent / file
    return path


def keep_beside_recipe(run_dir: Path, folder: Path, files: Iterable[str]) -> None:
    """Copies files that a recipe names relative to itself, so that the kept recipe finds them.

    A path that is absolute or leaves the recipe's folder is left as it is.

    Args:
        run_dir: the run folder.
        folder: of the recipe.
        files: their paths, relative to that.
    """
    for file in files:
        source, target = beside_recipe(folder, file), run_dir / file
        inside = not Path(file).is_absolute() and ".." not in Path(file).parts
        if inside and source.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as copied:
                copied.buffer.write(source.read_bytes())


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


def eval_seed(prompt: Any, attempt: int = 0) -> int:
    """The seed of an evaluation's attempt at a prompt: whatever else is played, it is the same.

    Args:
        prompt: a text, or a dialogue or row of plain values.
        attempt: from 0.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    name = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return stream(name, "eval", *([attempt] if attempt else []))
