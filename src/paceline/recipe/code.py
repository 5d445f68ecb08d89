"""The `code:` of a recipe: the user's own module or package, next to the recipe.

It runs as ordinary Python, so only commands that train load it. Its name in recipes is the file's
stem (`digits.py` -> `_target_: digits.Net`), and it is in `sys.modules` under that name, so that
loader workers can unpickle its classes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from paceline import registry
from paceline.errors import RecipeError, nearest
from paceline.log.kept_code import place_of
from paceline.log.run_record import RUN_FILE
from paceline.trainer.source_code import imported_by

# In a module's namespace: another recipe's code of the same name may replace it.
_MARK = "__paceline_code__"
_LARGEST = 1 << 20  # bytes of a file beside the code that is kept with it
_MOST = 5000  # files of a package


def find_code(code: str, folder: Path) -> Path:
    """The file or package that `code:` names.

    Args:
        code: the recipe's `code:`, relative to the recipe's folder.
        folder: the recipe's folder.

    Raises:
        RecipeError: it does not exist, is not Python, is outside the folder (a recipe could
            otherwise run any Python file of the machine), or its name is taken.
    """
    try:
        path = (folder / code).resolve()
        start = path / "__init__.py" if path.is_dir() else path
        exists = start.is_file()
    except (OSError, ValueError) as error:  # too long, or a null byte within
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"{code!r} cannot be a file's name: {why}.") from None
    if not path.is_relative_to(folder.resolve()) or path == folder.resolve():
        raise RecipeError(f"{code!r} is outside the recipe's folder; put it next to the recipe.")
    if not exists:
        there = [other.name for other in folder.glob("*.py")]
        raise RecipeError(f"there is no file {str(start)!r}{nearest(code, there) or '.'}")
    if start.suffix != ".py":
        raise RecipeError(f"{code!r} is neither a .py file nor a package.")
    name = path.stem
    if not name.isidentifier() or name.startswith("_"):
        raise RecipeError(f"{name!r} cannot be a module's name: use letters, digits and '_'.")
    if name in sys.stdlib_module_names or _is_taken(name, start):
        raise RecipeError(f"the name {name!r} belongs to another Python module; rename the file.")
    return path


def load_code(path: Path) -> ModuleType:
    """Imports the file or package that `find_code` found, once.

    Its folder comes first on `sys.path`, as for a script, so that it can import its neighbours
    and so that spawned processes find it.

    Raises:
        RecipeError: the import fails.
    """
    start = path / "__init__.py" if path.is_dir() else path
    held = sys.modules.get(path.stem)
    if held is not None and held.__file__ == str(start):
        return held
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    folders = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(
        path.stem, start, submodule_search_locations=folders
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)[_MARK] = True
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(path.stem, None)
        raise RecipeError(f"its import failed: {_told(error, path)}") from error
    return module


def files_of(path: Path, run_dir: Path) -> dict[str, Path]:
    """The files that a recipe's code needs, by their place in a folder that it can run from.

    They are the module or package itself, and what it imports of the user's own.

    Args:
        path: the file or package that `find_code` found.
        run_dir: the run's folder, which may lie in the package.
    """
    found = {path.name: path}
    if path.is_dir():
        found = {f"{path.name}/{name}": file for name, file in _package(path, run_dir).items()}
    for name, file in imported_by(path.stem).items():
        if name != path.stem and not (path.is_dir() and file.is_relative_to(path)):
            found.setdefault(place_of(name, file), file)
    return found


def _package(path: Path, run_dir: Path) -> dict[str, Path]:
    """A package's files, without run folders, environments, caches and large data."""
    found: dict[str, Path] = {}
    for folder, inner, files in os.walk(path):
        here = Path(folder)
        inner[:] = [
            name
            for name in sorted(inner)
            if not name.startswith((".", "__pycache__"))
            and (here / name).resolve() != run_dir.resolve()
            and not any((here / name / mark).exists() for mark in (RUN_FILE, "pyvenv.cfg"))
        ]
        for name in sorted(files):
            file = here / name
            is_code = file.suffix == ".py"
            if file.is_file() and (is_code or file.stat().st_size <= _LARGEST):
                found[str(file.relative_to(path))] = file
            if len(found) > _MOST:
                raise RecipeError(
                    f"code: {path} holds more than {_MOST} files, all of which a run would copy: "
                    "give the code a folder of its own."
                )
    return found


@contextlib.contextmanager
def code_apart(folder: Path) -> Iterator[None]:
    """Within it, modules of these names are imported from a folder, whatever was imported before.

    Afterwards the names mean what they meant. Where nothing else has such a name, the modules stay
    imported, so that objects of their classes can be pickled.

    Args:
        folder: with the modules; it need not exist.
    """
    inside = list(folder.iterdir()) if folder.is_dir() else []
    roots = {path.stem for path in inside if path.suffix == ".py" or path.is_dir()}
    before, path = dict(sys.modules), list(sys.path)
    for name in [name for name in before if name.split(".")[0] in roots]:
        del sys.modules[name]
    try:
        with registry.restored():
            yield
    finally:
        sys.path[:] = path
        importlib.invalidate_caches()
        taken = {root for root in roots if root in before or PathFinder.find_spec(root)}
        for name in [name for name in sys.modules if name.split(".")[0] in taken]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] in taken})
        if roots - taken:
            sys.path.append(str(folder))


def is_own_code(name: str) -> bool:
    """Whether the module of that name was loaded as a recipe's code."""
    return hasattr(sys.modules.get(name), _MARK)


def _is_taken(name: str, start: Path) -> bool:
    """Whether the name belongs to an imported module other than this file or a recipe's code."""
    held = sys.modules.get(name)
    if held is None or getattr(held, _MARK, False):
        return False
    return getattr(held, "__file__", None) != str(start)


def _told(error: Exception, path: Path) -> str:
    """The error, and the line of the user's own file that raised it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(path.parent)]
    where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {error}"
