"""RunConfig: a configuration of dotted paths and keyword dictionaries.

It is a shorter form of a recipe, for users who keep `net:`, `optimizer:` and their `_config`s in
one flat file. The recipes' own checker and builder resolve names, check arguments and build
objects, under the same rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

import pydantic
import torch
import yaml
from torch.utils.data import DataLoader

from paceline.errors import ConfigError, nearest
from paceline.log.files import replacing
from paceline.recipe.builder import Builder
from paceline.recipe.code import find_code, load_code
from paceline.recipe.components import Checker, Component, fit
from paceline.recipe.compose import compose
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.mistakes import Path as Place
from paceline.recipe.schema import different_seeds, folder_name
from paceline.recipe.targets import KINDS, Kind, Roots, find_target
from paceline.world.world import World

_LOAD_DATA = Kind("function that returns a training and a validation set", "", is_value=True)
_Count = Annotated[int, pydantic.Field(ge=1)]
_Config = Mapping[str, Any]


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """When to stop early.

    Attributes:
        enabled: whether to stop early at all.
        patience: epochs in a row without improvement.
        mode: whether lower or higher is better.
        min_delta: the least improvement that counts, as a fraction of the best value's magnitude.
    """

    enabled: bool = False
    patience: _Count = 10
    mode: Literal["min", "max"] = "min"
    min_delta: Annotated[float, pydantic.Field(ge=0)] = 0.0001


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; without `enabled`, only the last epoch's state.

    Attributes:
        enabled: whether the other settings apply.
        save_every_n_epochs: 0 to save only the best and the last.
        keep_last_k: checkpoints to keep beside the best.
        save_best: save whenever the metric is the best so far.
        monitor: the metric; `val_loss` is Paceline's "val/loss".
        mode: whether lower or higher is better.
    """

    enabled: bool = False
    save_every_n_epochs: Annotated[int, pydantic.Field(ge=0)] = 10
    keep_last_k: _Count = 3
    save_best: bool = True
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's settings, frozen at every depth: change them with `with_overrides`.

    Attributes:
        project: the folder of its runs, `runs/<project>`.
        device: "cpu" or "cuda", passed to the model; it has to be the device Paceline uses.
        seeds: one run each.
        net: the model's class, called as `net(net_config, device=device)`.
        optimizer: the optimizer's class, called as `optimizer(parameters, **optimizer_config)`.
        scheduler: the scheduler's class, called as `scheduler(optimizer, **scheduler_config)`; it
            steps once per epoch.
        epochs: passes over the data.
        batch_size: of both loaders.
        net_config, optimizer_config, scheduler_config, criterion_config: the arguments.
        early_stopping_config: when to stop early.
        criterion: the loss's class, called as `criterion(**criterion_config)`.
        data: a function without arguments that returns a training and a validation set of pairs.
        checkpoint_config: when to save and what to keep.
        monitor: the metric that early stopping watches.
        wandb: whether the runs are tracked by Weights & Biases too (extra `wandb`).
        trust: packages that may be named besides torch, Paceline and the modules beside `source`.
        source: the YAML file this was read from, or None.

    Raises:
        RecipeError: there are mistakes; each is listed with its key.
    """

    project: str
    device: str
    seeds: Sequence[int]
    net: str
    optimizer: str
    scheduler: str
    epochs: _Count
    batch_size: _Count
    net_config: _Config
    optimizer_config: _Config
    scheduler_config: _Config
    early_stopping_config: EarlyStoppingConfig = EarlyStoppingConfig()
    criterion: str = "torch.nn.MSELoss"
    criterion_config: _Config = field(default_factory=dict)
    data: str = "util.load_data"
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    monitor: str = "val_loss"
    wandb: bool = False
    trust: Sequence[str] = field(default=(), repr=False, compare=False)
    source: Path | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        mistakes = Mistakes(lambda _: str(self.source or "RunConfig"))
        _check(self.to_dict(), RunConfig, (), mistakes)
        mistakes.raise_any(self.source or "RunConfig(...)")
        for each in fields(self):
            value = getattr(self, each.name)
            kind = _SECTIONS.get(each.name)
            if kind is not None and isinstance(value, Mapping):
                value = kind(**value)
            object.__setattr__(self, each.name, _frozen(value))

    # Reading and writing

    @classmethod
    def from_yaml(
        cls, path: Path | str, overrides: Sequence[str] = (), *, trust: Collection[str] = ()
    ) -> RunConfig:
        """Reads a configuration and checks it as far as possible without importing anything.

        Args:
            path: the YAML file.
            overrides: `key=value` changes, in Hydra's grammar.
            trust: further packages whose classes and functions the file may name.

        Raises:
            RecipeError: there are mistakes; each is listed with file, line, key and the nearest
                right name.
        """
        composed = compose(path, overrides)
        mistakes = composed.mistakes()
        values = composed.resolve(mistakes)
        if "oc.env:" in composed.text():
            mistakes.add((), "a RunConfig is stored as written: it takes no environment look-ups.")
        _check(values, RunConfig, (), mistakes)
        mistakes.raise_any(composed.path)
        return cls(**values, trust=tuple(trust), source=composed.path)

    def to_yaml(self, path: Path | str) -> None:
        """Writes a file that `from_yaml` reads, in the order of the keys above."""
        with replacing(Path(path)) as file:
            yaml.safe_dump(self.to_dict(), file, sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain dictionaries and lists."""
        return {
            each.name: _plain(getattr(self, each.name))
            for each in fields(self)
            if each.name not in _NOT_IN_YAML
        }

    def with_overrides(self, **changes: Any) -> RunConfig:
        """A new configuration with some settings changed; dictionaries are merged at every depth.

        If another `net`, `optimizer`, `scheduler` or `criterion` is named, its `_config` starts
        empty, since the old arguments belong to the old class.
        """
        values = {**self.to_dict(), "trust": self.trust, "source": self.source}
        for part in _PARTS:
            if changes.get(part, values[part]) != values[part]:
                values[f"{part}_config"] = {}
        return RunConfig(**_merged(values, changes))

    # Building

    def create_model(self) -> torch.nn.Module:
        """Builds the model. Seed the generators first for reproducible weights."""
        return self._build("net")

    def create_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Builds the optimizer of a model's parameters."""
        return self._build("optimizer", params=model.parameters())

    def create_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Builds the scheduler of an optimizer."""
        return self._build("scheduler", optimizer=optimizer)

    def create_criterion(self) -> Any:
        """Builds the loss, called with outputs and targets."""
        return self._build("criterion")

    def create_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        """Builds the loaders of the two sets that `data` returns; the first is shuffled.

        Raises:
            ConfigError: `data` does not return two sets.
        """
        sets = self._components()["data"].target()
        if not isinstance(sets, tuple) or len(sets) != 2:
            raise ConfigError(f"data: {self.data} did not return (training set, validation set).")
        train, val = sets
        return DataLoader(train, self.batch_size, shuffle=True), DataLoader(val, self.batch_size)

    def validate_for_execution(self) -> None:
        """Imports every named class and function and checks all arguments; builds nothing.

        Raises:
            RecipeError: there are mistakes; each is listed with its key.
        """
        self._components()

    def validate_semantics(self) -> list[str]:
        """Settings that are allowed but probably a mistake, one line each."""
        found = []
        rate, length = self.optimizer_config.get("lr"), self.scheduler_config.get("T_max")
        patience = self.early_stopping_config.patience
        if isinstance(rate, int | float) and rate <= 0:
            found.append(f"optimizer_config.lr: {rate} is not above 0.")
        if length is not None and length != self.epochs:
            found.append(f"scheduler_config.T_max: {length} is not the {self.epochs} epochs.")
        if self.early_stopping_config.enabled and patience >= self.epochs:
            found.append(
                f"early_stopping_config.patience: {patience} is never reached in {self.epochs} "
                "epochs."
            )
        return found

    # Where its runs are

    @property
    def group(self) -> str:
        """The name that these settings share across seeds, devices and numbers of epochs.

        It is made from the settings that a resumed run cannot change: the model, optimizer,
        schedule, loss, data and batch size.
        """
        shown = [name.rpartition(".")[2] for name in (self.net, self.optimizer)]
        values = self.to_dict()
        settings = json.dumps({name: values[name] for name in _IDENTITY}, sort_keys=True)
        return "_".join([*shown, hashlib.sha256(settings.encode()).hexdigest()[:8]])

    @property
    def folder(self) -> Path:
        """`runs/<project>/<group>`; a seed's run is in `seed_<n>` below."""
        return Path("runs", self.project, self.group)

    def _build(self, part: str, **given: Any) -> Any:
        return Builder(self._locate).build(self._components()[part], **given)

    def _locate(self, place: Place) -> str:
        return str(self.source or "RunConfig")

    def _components(self) -> dict[str, Component]:
        """Every part, checked as a recipe's component would be."""
        mistakes = Mistakes(self._locate)
        self._check_device(mistakes)
        checker = Checker(self._roots(mistakes), mistakes)
        found: dict[str, Component | None] = {}
        for part, (kind, given) in _PARTS.items():
            config = _plain(getattr(self, f"{part}_config"))
            target = _target(self, part, KINDS[kind], checker)
            if target is None:
                continue
            # The model takes its settings whole, as one dictionary.
            args = [config] if part == "net" else []
            kwargs = {"device": self.device} if part == "net" else config
            place = (part,) if part == "net" else (f"{part}_config",)
            found[part] = checker.call(target, kwargs, place, KINDS[kind], given=given, args=args)
        data = _target(self, "data", _LOAD_DATA, checker)
        found["data"] = Component(("data",), _LOAD_DATA, data) if data else None
        mistakes.raise_any(self.source or "RunConfig(...)")
        return {name: component for name, component in found.items() if component is not None}

    def _check_device(self, mistakes: Mistakes) -> None:
        here = World().device
        try:
            wanted = torch.device(self.device)
        except RuntimeError:
            return mistakes.add(("device",), f"{self.device!r} is not a device.")
        if wanted.type != here.type or wanted.index not in (None, here.index):
            mistakes.add(
                ("device",),
                f"{self.device!r}, but Paceline computes on {here} here: it uses the accelerator "
                "if there is one, and CUDA_VISIBLE_DEVICES chooses which (none, if empty).",
            )

    def _roots(self, mistakes: Mistakes) -> Roots:
        """The packages that may be named; modules beside the YAML file are the user's own."""
        found: list[str] = []
        paths = [getattr(self, part) for part in (*_PARTS, "data")]
        for name in sorted({path.partition(".")[0] for path in paths}):
            if self.source is None or Roots(None, self.trust).allows(name):
                continue
            folder = self.source.resolve().parent
            for file in (f"{name}.py", f"{name}/__init__.py"):
                if (folder / file).is_file():
                    _load(file.removesuffix("/__init__.py"), folder, mistakes)
                    found.append(name)
                    break
        return Roots(None, (*self.trust, *found))


# Part -> its kind, and the arguments that Paceline gives it.
_PARTS = {
    "net": ("model", ()),
    "optimizer": ("optimizer", ("params",)),
    "scheduler": ("lr_scheduler", ("optimizer",)),
    "criterion": ("loss_fn", ()),
}
_IDENTITY = (*_PARTS, *(f"{part}_config" for part in _PARTS), "data", "batch_size")
_SECTIONS = {
    "early_stopping_config": EarlyStoppingConfig,
    "checkpoint_config": CheckpointConfig,
}
_NOT_IN_YAML = ("trust", "source")


def _target(config: RunConfig, part: str, kind: Kind, checker: Checker) -> Any:
    """The class or function that a part's dotted path names, or None if that is a mistake."""
    try:
        return find_target(getattr(config, part), kind, checker.roots)
    except (ConfigError, ImportError) as error:
        checker.mistakes.add((part,), str(error))
        return None


def _load(name: str, folder: Path, mistakes: Mistakes) -> None:
    try:
        load_code(find_code(name, folder))
    except ConfigError as error:
        mistakes.add((), str(error))


def _check(values: Mapping[str, Any], cls: type, path: Place, mistakes: Mistakes) -> None:
    """Adds mistakes for unknown or missing keys and wrong types or limits in a section."""
    hints = get_type_hints(cls, include_extras=True)
    known = {each.name: each for each in fields(cls) if each.name not in _NOT_IN_YAML}
    for name in values:
        if name not in known:
            mistakes.add((*path, str(name)), f"there is no such key{nearest(str(name), known)}")
    for name, each in known.items():
        where = (*path, name)
        if name not in values:
            if each.default is MISSING and each.default_factory is MISSING:
                mistakes.add(where, "the key is missing.")
        elif name in _SECTIONS and isinstance(values[name], Mapping):
            _check(values[name], _SECTIONS[name], where, mistakes)
        else:
            try:
                json.dumps(values[name])
                fit(values[name], hints[name])
                _MORE.get(name, _anything)(values[name])
            except (ValueError, TypeError) as error:
                mistakes.add(where, str(error))


def _anything(value: Any) -> None:
    """Accepts any value of the right type."""


def _dotted_path(value: str) -> None:
    if "." not in value:
        raise ValueError(f"expected a dotted path such as 'model.MLP', got {value!r}")


_MORE: dict[str, Callable[[Any], Any]] = {
    "project": folder_name,
    "seeds": different_seeds,
    **dict.fromkeys((*_PARTS, "data"), _dotted_path),
}


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(v) for key, v in value.items()})
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if type(value) in _SECTIONS.values():
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` updated with `new`, at every depth."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        merged[key] = _merged(old[key], value) if both else value
    return merged
