"""A starter project: a recipe, its trainer, and a test that passes. `paceline new` writes it."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path

from paceline.errors import ConfigError

__all__ = ["new_project"]

# Template -> file. The templates are not .py files: they are not part of this package's code.
_FILES = {
    "recipe.yaml": "recipe.yaml",
    "trainer.py.txt": "{name}.py",
    "test.py.txt": "test_{name}.py",
    "README.md": "README.md",
}
_PLACEHOLDER = "__NAME__"


def new_project(name: str, folder: Path | str = ".") -> list[Path]:
    """Writes a small project that trains, as a starting point.

    Args:
        name: the name of the project, its folder and its Python module.
        folder: where to create the project's folder.

    Returns:
        The files written.

    Raises:
        ConfigError: the name is not a module name or belongs to another module, or the folder
            already exists (and is not changed).
    """
    _check_name(name)
    project = Path(folder) / name
    try:
        project.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{project} already exists and is left alone; choose another name or --folder."
        ) from None
    except OSError as error:
        raise ConfigError(f"{project} cannot be created: {error.strerror}.") from None
    written = []
    for template, target in _FILES.items():
        text = (resources.files(__name__) / template).read_text(encoding="utf-8")
        path = project / target.format(name=name)
        path.write_text(text.replace(_PLACEHOLDER, name), encoding="utf-8")
        written.append(path)
    return written


def _check_name(name: str) -> None:
    """Checks that a recipe's code may have this name.

    Raises:
        ConfigError: it may not; the message suggests another name.
    """
    if not name.isidentifier() or not name.isascii() or name.startswith("_"):
        plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
        plain = f"project_{plain}" if plain[:1].isdigit() else plain
        raise ConfigError(
            f"{name!r} cannot be a Python module's name: letters, digits and '_', a letter first"
            f"{_suggestion(plain)}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ConfigError(f"{name!r} is a Python keyword{_suggestion(f'{name}_project')}")
    if name in sys.stdlib_module_names or _is_installed(name):
        raise ConfigError(
            f"the name {name!r} belongs to an installed module, which the project's own would "
            f"hide{_suggestion(f'{name}_project')}"
        )


def _suggestion(name: str) -> str:
    return f"; how about {name!r}?" if name.isidentifier() else "."


def _is_installed(name: str) -> bool:
    """Whether `import name` would find a module; does not import it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, created by hand
        return True
    # A plain folder beside the caller is found too, as a package without code.
    return spec is not None and spec.origin is not None
