"""The recipe and the code that train a run, in its folder; and those that trained it before.

`recipe.yaml` and `code/` are what trains now. What a resumed run has changed is kept in
`earlier/until_step_N`, so that each checkpoint still has the code that trained it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from paceline.log.files import replacing

RECIPE_FILE = "recipe.yaml"
CODE_FOLDER = "code"
EARLIER = "earlier"


def keep(run_dir: Path, step: int, code: Mapping[str, Path], recipe: str | None) -> None:
    """Keeps what trains a run from now on.

    Args:
        run_dir: the run folder.
        step: the optimizer steps that the run has done.
        code: the files, by their place in `code/`.
        recipe: the recipe as YAML; None for a run built in Python.
    """
    folder, text = run_dir / CODE_FOLDER, run_dir / RECIPE_FILE
    there = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    there = {name: path for name, path in there.items() if "__pycache__" not in path.parts}
    contents = {name: path.read_bytes() for name, path in code.items()}
    same = {name: path.read_bytes() for name, path in there.items()} == contents
    before = text.read_text(encoding="utf-8") if text.is_file() else None
    if same and before == recipe:
        return
    aside = run_dir / EARLIER / f"until_step_{step:08d}"
    if (there or before is not None) and step > 0 and not aside.exists():
        aside.mkdir(parents=True)
        if before is not None:
            shutil.copyfile(text, aside / RECIPE_FILE)
        if there:
            shutil.copytree(folder, aside / CODE_FOLDER, ignore=_no_caches)
    for name, path in there.items():
        if name not in contents:
            path.unlink()
    for name, content in contents.items():
        target = folder / name
        if name not in there or there[name].read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    if recipe is not None:
        with replacing(text) as file:
            file.write(recipe)


_no_caches = shutil.ignore_patterns("__pycache__")


def folder_of_step(run_dir: Path, step: int) -> Path:
    """The folder with the recipe and the code that trained a run's checkpoint.

    Args:
        run_dir: the run folder.
        step: of the checkpoint.
    """
    found: dict[int, Path] = {}
    for path in (run_dir / EARLIER).glob("until_step_*"):
        if match := re.fullmatch(r"until_step_(\d+)", path.name):
            found[int(match[1])] = path
    later = [until for until in found if until >= step]
    return found[min(later)] if later else run_dir


def place_of(module: str, file: Path) -> str:
    """Where a module's file goes in `code/`, to be imported from there under the same name.

    Args:
        module: its full name.
        file: its file.
    """
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if file.stem == "__init__" else f"{path}.py"
