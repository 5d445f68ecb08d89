"""A recipe file and its overrides -> one tree of plain values.

Hydra composes: defaults lists, config groups in the recipe's folder, `${...}` interpolation and
`key=value` overrides work as Hydra's users know them. Nothing is imported or built here, so that
any command may read a recipe that it does not trust.

Hydra stops at the first mistake. Here a mistake is collected and its value left out, so that the
rest can be composed and checked too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
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
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from paceline.errors import RecipeError, nearest, some
from paceline.log.kept_code import RECIPE_FILE
from paceline.log.secrets import MISSING, without_credentials
from paceline.recipe.interpolation import size
from paceline.recipe.marks import MAX_DEPTH, drop_duplicates, mark, read_node, shared_keys
from paceline.recipe.mistakes import Mistakes, Path, dotted
from paceline.recipe.resolvers import asked_once, forget, register_resolvers

# `${name`, `${.name` or `${oc.select:name`: what an interpolation refers to.
_REFERENCE = re.compile(r"\$\{(?:oc\.[\w.]+:)?\s*\.*([A-Za-z_]\w*)")
_SHOWN = 100  # characters of an override in a message
_NAMES = frozenset({"run.name", "run.project", "run.dir"})
_LARGEST = 4 << 20  # characters of a recipe with its interpolations resolved


@dataclass(frozen=True)
class Taken:
    """A valid override.

    Attributes:
        text: as the user wrote it.
        override: as Hydra parsed it.
        lenient: as passed to Hydra: with `++`, so that our check finds a misspelt key, not Hydra.
    """

    text: str
    override: Override
    lenient: str

    @property
    def path(self) -> Path:
        return tuple(self.override.key_or_group.replace("/", ".").split("."))


@dataclass(frozen=True)
class Composed:
    """A recipe after composition, before any check.

    Attributes:
        path: the recipe file.
        overrides: the overrides that were applied.
        config: the tree, with interpolations unresolved.
        noted: the mistakes found during composition.
        is_file: whether the recipe is the file at `path`, not a dictionary.
    """

    path: FilePath
    overrides: tuple[Taken, ...]
    config: DictConfig
    noted: Mistakes
    is_file: bool = True

    def text(self) -> str:
        """The recipe as YAML, to be shown or written.

        No secret is in it: interpolations are unresolved, and a credential is replaced by `???`.
        """
        return OmegaConf.to_yaml(OmegaConf.create(without_credentials(self.tree())))

    def tree(self) -> dict[str, Any]:
        """The recipe as plain data, interpolations unresolved, as in `text`."""
        tree: Any = OmegaConf.to_container(self.config, resolve=False)
        return tree

    def changed(self, changes: Mapping[str, Any], without: str = "") -> Composed:
        """The same recipe with some values changed and a key removed.

        Args:
            changes: the new values, by dotted path.
            without: the top-level key to remove.
        """
        config = self.config.copy()
        with open_dict(config):
            config.pop(without, None)
        for name, value in changes.items():
            OmegaConf.update(config, name, value, merge=False, force_add=True)
        return replace(self, config=config)

    def filled(self, value: str) -> Composed:
        """The same recipe with a value for each that must be given (`???`).

        Args:
            value: the text to put there.
        """

        def fill(node: Any) -> Any:
            if isinstance(node, dict):
                return {key: fill(inner) for key, inner in node.items()}
            if isinstance(node, list):
                return [fill(inner) for inner in node]
            return value if node == MISSING else node

        return replace(self, config=OmegaConf.create(fill(self.tree())))

    def mistakes(self) -> Mistakes:
        """The mistakes so far, in a collection that knows the lines of this recipe's values."""
        marks: dict[Path, str] = {}

        def locate(path: Path) -> str:
            if not marks and self.is_file:
                marks.update(_marks(self))
            while path and path not in marks:  # a missing key is reported at its parent
                path = path[:-1]
            return marks.get(path, str(self.path))

        return Mistakes(locate, list(self.noted.found), set(self.noted.unknown))

    def resolve(self, mistakes: Mistakes) -> dict[str, Any]:
        """The tree as plain values; one that cannot be resolved is a mistake and becomes None."""
        if size(self.tree()) > _LARGEST:
            mistakes.add((), f"its interpolations make more than {_LARGEST} characters of it.")
            mistakes.raise_any(self.path)
        with asked_once():
            return {str(k): v for k, v in _resolve_mapping(self.config, (), mistakes).items()}

    def own_keys(self) -> set[str]:
        """Top-level keys that other keys refer to, by `${key}` or by a YAML anchor."""
        own = shared_keys(read_node(self.path)) if self.is_file else set()
        for name, value in self.tree().items():
            own |= set(_REFERENCE.findall(str(value))) - {name}
        return own


def compose(path: FilePath | str, overrides: Sequence[str] = ()) -> Composed:
    """Reads a recipe.

    Args:
        path: the recipe's YAML file, or a run folder.
        overrides: `key=value`, `+key=value`, `~key`, or `group=option`.

    Returns:
        The composed recipe, and the mistakes found during composition.

    Raises:
        RecipeError: the file does not exist, is not YAML, or cannot be composed at all.
    """
    register_resolvers()
    forget()
    file = FilePath(path)
    if (file / RECIPE_FILE).is_file():  # a run folder keeps its recipe
        file = file / RECIPE_FILE
    noted = Mistakes(lambda _: str(file))
    taken = _read_overrides(overrides, file.resolve().parent, noted)
    _check_file(file, noted)
    config, taken = _compose(file, taken, noted)
    return Composed(file, tuple(taken), config, noted)


def composed_of(tree: Mapping[str, Any]) -> Composed:
    """A recipe that is given as a dictionary.

    Args:
        tree: what its file would hold. `defaults` are not read, and `code` is relative to the
            working folder.

    Raises:
        RecipeError: something in it is no plain value.
    """
    register_resolvers()
    forget()
    place = FilePath("dictionary")
    try:
        config = OmegaConf.create(dict(tree))
    except Exception as error:  # OmegaConf's
        raise RecipeError(f"the recipe's dictionary: {told(error)}") from error
    return Composed(place, (), config, Mistakes(lambda _: str(place)), is_file=False)


def _read_overrides(texts: Sequence[str], folder: FilePath, noted: Mistakes) -> list[Taken]:
    parser = OverridesParser.create()
    taken: list[Taken] = []
    for text in texts:
        try:
            override: Override = parser.parse_override(text)
        except Exception as error:  # noqa: BLE001 - the grammar's errors have no common base
            noted.add((), _unread(text, error), "override")
            continue
        override = _with_name(override, text)
        key, wrong = override.key_or_group, None
        if not key.strip("."):
            wrong = "is not key=value: the key is missing."
        elif key.split(".")[0].split("/")[0] == "hydra":
            wrong = "is Hydra's: it only composes recipes, and has no settings here."
        elif override.is_sweep_override():
            wrong = "gives several values: a recipe takes one value per key, not a sweep."
        if wrong is not None:
            noted.add((), f"{text!r} {wrong}", "override")
        elif override.type is OverrideType.CHANGE and not (folder / key).is_dir():
            taken.append(Taken(text, override, f"++{override.input_line}"))
        else:
            taken.append(Taken(text, override, str(override.input_line)))
    return taken


def _unread(text: str, error: Exception) -> str:
    """What is wrong with an override that Hydra's grammar does not know."""
    key, equals, value = text.partition("=")
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if not equals:
        return f"{text!r} is not key=value."
    if value[:1] in tuple("{['\""):
        return f"{text!r} cannot be read: {told(error)}"
    quoted = f"{key}='{value:.{_SHOWN}}'"
    return (
        f"{text!r} cannot be read ({told(error)}): put the value in quotes, and the whole in "
        f'others for the shell: "{quoted}"'
    )


def _with_name(override: Override, text: str) -> Override:
    """A name that reads as a number (a job's id, a commit) is text all the same."""
    value = text.partition("=")[2].strip()
    is_name = override.key_or_group in _NAMES and re.fullmatch(r"[\w.+-]+", value)
    if not is_name or not isinstance(override.value(), (bool, int, float)):
        return override
    return OverridesParser.create().parse_override(text.replace(f"={value}", f"='{value}'", 1))


def _check_file(file: FilePath, noted: Mistakes) -> None:
    """Adds the mistakes in the recipe file itself.

    Raises:
        RecipeError: it cannot be read at all; the message has the mistakes so far too.
    """
    node = None
    if not file.is_file():
        noted.add((), _no_file(file))
    elif file.suffix != ".yaml":
        noted.add((), f"a recipe's name ends in .yaml: rename it to {file.stem}.yaml.")
    else:
        try:
            node = read_node(file)
        except Exception as error:  # noqa: BLE001 - PyYAML's, and the decoder's
            noted.add((), told(error), _place(error, file))
        else:
            if node is not None and not isinstance(node, yaml.MappingNode):
                noted.add((), "a recipe is a mapping of keys to values.", f"{file}:1")
                node = None
            elif node is None:
                return
    if node is None:
        noted.raise_any(file)
        return
    for key, value in node.value:
        if key.value == "defaults":
            _check_defaults(value, file, noted)
        if key.value == "hydra":
            # It configures an application that does not run here, and can import packages.
            noted.add(
                ("hydra",),
                "Hydra only composes recipes, so its own settings have no effect. Remove them; "
                "run.dir says where a run is written.",
                f"{file}:{key.start_mark.line + 1}",
            )
            noted.raise_any(file)


def _no_file(file: FilePath) -> str:
    known = [str(other) for other in (file if file.is_dir() else file.parent).glob("*.yaml")]
    if file.is_dir():
        there = f": name one of its recipes, {some(sorted(known))}." if known else "."
        return f"{str(file)!r} is a folder that holds no {RECIPE_FILE}{there}"
    if file.exists():
        return f"{str(file)!r} is no file, but a pipe or a device: write the recipe into a file"
    whole = f"{file}.yaml"
    meant = f"; did you mean {whole!r}?" if whole in known else nearest(str(file), known)
    return f"there is no recipe file {str(file)!r}{meant}"


def _check_defaults(node: yaml.Node, file: FilePath, noted: Mistakes) -> None:
    """Adds a mistake for each option above the recipe's folder, where Hydra looks for none.

    Raises:
        RecipeError: there is one.
    """
    above = [
        part
        for item in (node.value if isinstance(node, yaml.SequenceNode) else ())
        for part in ([v for _, v in item.value] if isinstance(item, yaml.MappingNode) else [item])
        if ".." in str(part.value).split("/")
    ]
    for part in above:
        noted.add(
            ("defaults",),
            f"{part.value!r} lies outside the recipe's folder, where a recipe finds nothing: put "
            "this recipe beside it, or what they share in a folder of theirs.",
            f"{file}:{part.start_mark.line + 1}",
        )
    if above:
        noted.raise_any(file)


def _compose(file: FilePath, taken: list[Taken], noted: Mistakes) -> tuple[DictConfig, list[Taken]]:
    """Composes what is valid.

    Raises:
        RecipeError: nothing can be composed, whatever is left out.
    """
    try:
        return _hydra(file, taken, noted), taken
    except MissingConfigException as error:
        left = _without_missing(error, file, taken, noted)
    except Exception:  # noqa: BLE001 - Hydra's, OmegaConf's and PyYAML's
        left = _without_culprits(file, taken, noted)
    return _compose(file, left, noted)


def _hydra(file: FilePath, taken: Sequence[Taken], noted: Mistakes) -> DictConfig:
    with _config_loader(file, noted):
        return hydra_compose(file.name, [each.lenient for each in taken])


def _without_missing(
    error: MissingConfigException, file: FilePath, taken: list[Taken], noted: Mistakes
) -> list[Taken]:
    """Adds a mistake for a missing option of a config group, and leaves the group out."""
    name = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = name.rpartition("/")
    path = tuple(group.split("/")) if group else ()
    text = f"there is no {name}.yaml beside the recipe{nearest(option, error.options or ())}"
    culprits = [each for each in taken if each.lenient.lstrip("+") == f"{group}={option}"]
    if culprits:
        noted.add(path, text, f"override {culprits[0].text!r}", known=False)
        return [each for each in taken if each not in culprits]
    noted.add(path, text, _place_of_default(file, {option, name}), known=False)
    if not group or any(each.lenient == f"~{group}" for each in taken):
        noted.raise_any(file)
    try:
        override = OverridesParser.create().parse_override(f"~{group}")
    except HydraException:  # a name for which there are no overrides
        noted.raise_any(file)
        raise
    return [*taken, Taken(f"~{group}", override, f"~{group}")]


def _place_of_default(file: FilePath, names: set[str]) -> str | None:
    """The line of the recipe's defaults list on which an option stands, alone or with its group."""
    root = read_node(file)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value != "defaults" or not isinstance(value, yaml.SequenceNode):
            continue
        for item in value.value:
            values = [v for _, v in item.value] if isinstance(item, yaml.MappingNode) else [item]
            if any(str(v.value).removesuffix(".yaml") in names for v in values):
                return f"{file}:{item.start_mark.line + 1}"
    return None


def _without_culprits(file: FilePath, taken: list[Taken], noted: Mistakes) -> list[Taken]:
    """Adds a mistake for each override that cannot be applied.

    Raises:
        RecipeError: the overrides are not the cause; the message has the mistakes so far too.
    """
    try:
        _hydra(file, [], noted)
    except MissingConfigException:
        pass  # an override may have been chosen in its place
    except Exception as error:  # noqa: BLE001 - Hydra's, OmegaConf's and PyYAML's
        noted.add((), told(error), _place(error, file))
        noted.raise_any(file)
    left: list[Taken] = []
    for each in taken:
        try:
            _hydra(file, [*left, each], noted)
        except MissingConfigException:
            left.append(each)
        except Exception as error:  # noqa: BLE001
            numbered = next((i for i, key in enumerate(each.path) if key.isdigit()), 0)
            text = _of_list(each.path[:numbered]) if numbered else told(error)
            noted.add((), text, f"override {each.text!r}")
        else:
            left.append(each)
    if len(left) == len(taken):
        noted.add((), "its overrides cannot be applied together.")
        noted.raise_any(file)
    return left


def _of_list(path: Path) -> str:
    name = dotted(path)
    return (
        f"{name} is a list, to which no item is added and from which none is taken: give the whole "
        f"list ({name}=[...]); or make it a mapping of names in the recipe, and write "
        f"+{name}.NAME=... or ~{name}.NAME."
    )


@contextlib.contextmanager
def _config_loader(file: FilePath, noted: Mistakes) -> Iterator[ConfigLoader]:
    """Hydra, set up for the recipe's folder and always reset afterwards."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(file.resolve().parent), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            for source in loader.get_sources():
                if source.provider == "main":
                    source.load_config = _tolerant(source, file, noted)  # pyright: ignore
            yield loader
    finally:
        # A user's program that runs under Hydra gets its own Hydra back.
        GlobalHydra.instance().hydra = before


def _tolerant(
    source: ConfigSource, recipe: FilePath, noted: Mistakes
) -> Callable[[str], ConfigResult]:
    """Hydra's own loading of a file, except that a duplicate key is a mistake and used once."""
    load = source.load_config

    # A plain function: Hydra copies its sources, and would copy a partial's `noted` too.
    def load_config(config_path: str) -> ConfigResult:
        file = recipe.parent / f"{config_path.removesuffix('.yaml')}.yaml"
        # OmegaConf would write out aliases without an end, which are counted here.
        root = read_node(file) if file.is_file() else None
        try:
            result = load(config_path)
            _keep_names(result.config, root)
            return result
        except yaml.constructor.ConstructorError as error:
            if "duplicate" not in str(error.problem):
                raise
        root = read_node(file)
        assert root is not None
        drop_duplicates(
            root,
            lambda path, line, first: noted.add(
                path, f"duplicate key: it is in line {first} already.", f"{file}:{line}"
            ),
        )
        config: Any = OmegaConf.load(StringIO(yaml.serialize(root, allow_unicode=True)))
        header = ConfigSource._get_header_dict(file.read_text(encoding="utf-8")[:512])
        return ConfigResult(source.provider, f"file://{source.path}", config, header)

    return load_config


def _keep_names(config: Any, root: yaml.Node | None) -> None:
    """Gives the run's names as they are written, where YAML reads a number in one.

    Args:
        config: what OmegaConf made of a file.
        root: the file's own nodes.
    """
    sections = {key.value: value for key, value in getattr(root, "value", ()) or ()}
    run = sections.get("run")
    for key, value in run.value if isinstance(run, yaml.MappingNode) else ():
        name = f"run.{key.value}"
        read = OmegaConf.select(config, name) if name in _NAMES else None
        if isinstance(read, (bool, int, float)):
            OmegaConf.update(config, name, value.value)


def told(error: BaseException) -> str:
    """An error's message in one line, without the context that Hydra and PyYAML add."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or something in it contains itself"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8: save it in that encoding"
    if "integer string conversion" in str(error):
        return "a number in it has too many digits"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    return " ".join(lines) or type(error).__name__


def _place(error: Exception, file: FilePath) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}"
    return str(file)


def _resolve_mapping(node: DictConfig, path: Path, mistakes: Mistakes) -> dict[Any, Any]:
    """Keys are as YAML has them: numbers stay numbers."""
    return {key: _resolve(node, key, (*path, str(key)), mistakes) for key in node}


def _resolve(parent: DictConfig | ListConfig, key: Any, path: Path, mistakes: Mistakes) -> Any:
    if len(path) > MAX_DEPTH:
        mistakes.add(path[:1], "it contains itself through an interpolation.", known=False)
        return None
    if OmegaConf.is_missing(parent, key):
        mistakes.add(path, "'???' stands for a value that must be given.", known=False)
        return None
    try:
        value = parent[key]
    except Exception as error:  # noqa: BLE001 - a resolver may raise anything
        mistakes.add(path, f"cannot be resolved: {told(error)}", known=False)
        return None
    if isinstance(value, DictConfig):
        return _resolve_mapping(value, path, mistakes)
    if isinstance(value, ListConfig):
        return [_resolve(value, i, (*path, str(i)), mistakes) for i in range(len(value))]
    return value


def _marks(composed: Composed) -> dict[Path, str]:
    """Where each value comes from: `file:line`, or the override. Later ones win, as in Hydra."""
    marks: dict[Path, str] = {}
    lenient = [each.lenient for each in composed.overrides]
    try:
        with _config_loader(composed.path, Mistakes(str)) as loader:
            parts = loader.compute_defaults_list(composed.path.name, lenient, RunMode.RUN).defaults
    except Exception as error:
        raise RecipeError(f"{composed.path}: {told(error)}") from error
    for part in parts:
        _mark_file(part, composed.path, marks)
    for each in composed.overrides:
        place = f"override {each.text!r}"
        marks[each.path] = place
        for i in range(1, len(each.path)):  # mappings that the override itself created
            marks.setdefault(each.path[:i], place)
    return marks


def _mark_file(part: ResultDefault, recipe: FilePath, marks: dict[Path, str]) -> None:
    name = part.config_path or ""
    package = tuple((part.package or "").split(".")) if part.package else ()
    if package[:1] == ("hydra",):
        return
    file = recipe if part.primary else recipe.parent / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        return
    node = read_node(file)
    if node is not None:
        mark(node, package, file, marks)
