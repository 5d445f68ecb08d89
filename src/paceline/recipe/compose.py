"""A recipe file and its overrides -> one tree of plain values.

Hydra composes: defaults lists, config groups in the recipe's folder, `${...}` interpolation and
`key=value` overrides work as its users know them. Nothing is imported and nothing is built here,
so that any command may read a recipe that it does not trust.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from paceline.errors import RecipeError
from paceline.recipe.mistakes import Mistakes, Path

# Deeper than any recipe; an interpolation that contains itself would go on for ever.
_MAX_DEPTH = 60


@dataclass(frozen=True)
class Composed:
    """A recipe after composition, before any check.

    Attributes:
        path: the recipe file.
        overrides: the overrides as the user wrote them.
        config: the tree, with interpolations still unresolved.
    """

    path: FilePath
    overrides: tuple[str, ...]
    config: DictConfig

    def text(self) -> str:
        """The recipe as YAML, interpolations unresolved, so that no secret is written."""
        return OmegaConf.to_yaml(self.config, resolve=False)

    def changed(self, changes: Mapping[str, Any], without: str = "") -> Composed:
        """The same recipe with some values set and a key taken out.

        Args:
            changes: the values, by dotted path.
            without: the top-level key to take out.
        """
        config = self.config.copy()
        with open_dict(config):
            config.pop(without, None)
        for name, value in changes.items():
            OmegaConf.update(config, name, value, force_add=True)
        return replace(self, config=config)

    def mistakes(self) -> Mistakes:
        """An empty collection of mistakes that knows where this recipe's values were written."""
        marks: dict[Path, str] = {}

        def locate(path: Path) -> str:
            if not marks:
                marks.update(_marks(self))
            while path and path not in marks:  # what is missing is reported at its parent
                path = path[:-1]
            return marks.get(path, str(self.path))

        return Mistakes(locate)

    def resolve(self, mistakes: Mistakes) -> dict[str, Any]:
        """The tree as plain values; what cannot be resolved is noted and left as None."""
        return _resolve_mapping(self.config, (), mistakes)


def compose(path: FilePath | str, overrides: Sequence[str] = ()) -> Composed:
    """Reads a recipe.

    Args:
        path: the recipe's YAML file.
        overrides: `key=value`, `+key=value`, `~key`, or `group=option`.

    Raises:
        RecipeError: no such file, not YAML, or Hydra cannot compose it.
    """
    file = FilePath(path)
    if not file.is_file():
        raise RecipeError(f"there is no recipe file {str(file)!r}.")
    _refuse_hydra_settings(file)
    lenient = _lenient(overrides, file.resolve().parent)
    with _config_loader(file), _as_recipe_error(file):
        config = hydra_compose(file.name, lenient)
    return Composed(file, tuple(overrides), config)


@contextlib.contextmanager
def _config_loader(file: FilePath) -> Iterator[ConfigLoader]:
    """Hydra, set up on the recipe's folder and cleared again whatever happens."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(file.resolve().parent), version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        # A program of the user's that runs under Hydra finds its own Hydra again.
        GlobalHydra.instance().hydra = before


@contextlib.contextmanager
def _as_recipe_error(file: FilePath) -> Iterator[None]:
    """Turns whatever Hydra, OmegaConf and PyYAML raise into a RecipeError."""
    try:
        yield
    except Exception as error:
        raise RecipeError(f"{file}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """An error's message in one line, without the frames that Hydra and PyYAML add to it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, RecursionError):
        return "something in it contains itself"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    return " ".join(lines) or type(error).__name__


def _refuse_hydra_settings(file: FilePath) -> None:
    """`hydra:` configures an application that is not running here, and can import packages."""
    with _as_recipe_error(file):
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values.")
    for key, _ in node.value:
        if key.value == "hydra":
            raise RecipeError(
                f"{file}:{key.start_mark.line + 1}: hydra: Hydra only composes recipes, so its own "
                "settings have no effect. Remove them; run.dir says where a run is written."
            )


def _lenient(overrides: Sequence[str], folder: FilePath) -> list[str]:
    """The overrides with `++`, so that a misspelt key is found by the check, not one at a time."""
    mistakes = Mistakes(lambda _: "override")
    parser = OverridesParser.create()
    lenient = []
    for text in overrides:
        try:
            override: Override = parser.parse_override(text)
        except Exception as error:  # noqa: BLE001 - the grammar's errors have no common base
            mistakes.add((), f"{text!r} is not key=value: {_told(error)}")
            continue
        key = override.key_or_group
        if not key.strip("."):
            mistakes.add((), f"{text!r} is not key=value: the key is missing.")
        elif key.split(".")[0].split("/")[0] == "hydra":
            mistakes.add((), f"{text!r}: Hydra only composes recipes, it has no settings here.")
        elif override.is_sweep_override():
            mistakes.add((), f"{text!r}: a recipe takes one value for each key, not a sweep.")
        elif override.type is OverrideType.CHANGE and not (folder / key).is_dir():
            lenient.append(f"++{text}")
        else:
            lenient.append(text)
    mistakes.raise_any("the overrides")
    return lenient


def _resolve_mapping(node: DictConfig, path: Path, mistakes: Mistakes) -> dict[str, Any]:
    return {str(key): _resolve(node, key, (*path, str(key)), mistakes) for key in node}


def _resolve(parent: DictConfig | ListConfig, key: Any, path: Path, mistakes: Mistakes) -> Any:
    if len(path) > _MAX_DEPTH:
        mistakes.add(path[:1], "it contains itself through an interpolation.")
        return None
    if OmegaConf.is_missing(parent, key):
        mistakes.add(path, "'???' stands for a value that must be given.")
        return None
    try:
        value = parent[key]
    except Exception as error:  # noqa: BLE001 - a resolver may raise anything
        mistakes.add(path, f"cannot be resolved: {_told(error)}")
        return None
    if isinstance(value, DictConfig):
        return _resolve_mapping(value, path, mistakes)
    if isinstance(value, ListConfig):
        return [_resolve(value, i, (*path, str(i)), mistakes) for i in range(len(value))]
    return value


def _marks(composed: Composed) -> dict[Path, str]:
    """Where each value was written: `file:line`, or the override. Later ones win, as in Hydra."""
    marks: dict[Path, str] = {}
    lenient = _lenient(composed.overrides, composed.path.resolve().parent)
    with _config_loader(composed.path) as loader, _as_recipe_error(composed.path):
        parts = loader.compute_defaults_list(composed.path.name, lenient, RunMode.RUN).defaults
    for part in parts:
        _mark_file(part, composed.path, marks)
    parser = OverridesParser.create()
    for text in composed.overrides:
        override = parser.parse_override(text)
        key = override.key_or_group.replace("/", ".")
        marks[tuple(key.split("."))] = f"override {text!r}"
    return marks


def _mark_file(part: ResultDefault, recipe: FilePath, marks: dict[Path, str]) -> None:
    name = part.config_path or ""
    package = tuple((part.package or "").split(".")) if part.package else ()
    if package[:1] == ("hydra",):
        return
    file = recipe if part.primary else recipe.parent / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        return
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if node is not None:
        _mark_node(node, package, file, marks)


def _mark_node(node: yaml.Node, path: Path, file: FilePath, marks: dict[Path, str]) -> None:
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            merged = key.tag == "tag:yaml.org,2002:merge"  # `<<: *anchor`
            below = path if merged else (*path, str(key.value))
            marks[below] = f"{file}:{key.start_mark.line + 1}"
            _mark_node(value, below, file, marks)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            below = (*path, str(i))
            marks[below] = f"{file}:{value.start_mark.line + 1}"
            _mark_node(value, below, file, marks)
