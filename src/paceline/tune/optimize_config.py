"""OptimizeConfig: what is searched among the settings of a RunConfig, in one YAML file.

It is a shorter form of a study, for users who keep `search_space:` beside their RunConfig. Trials
are runs of that configuration, one for each seed, and the study is one of a function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from paceline.checkpoint.export import find_checkpoint, read_weights
from paceline.checkpoint.state import load_model_state
from paceline.errors import ConfigError, PacelineError, nearest
from paceline.recipe.compose import compose
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.mistakes import Path as Place
from paceline.recipe.schema import folder_name
from paceline.recipe.seeds import SEEDS_FILE
from paceline.trainer.trainer import Trainer
from paceline.tune.reporting import TrialReports
from paceline.tune.run_config import RunConfig
from paceline.tune.running import CONFIG_FILE, failed, metric_name, train_config
from paceline.tune.space import Space, read_space
from paceline.tune.storages import open_storage
from paceline.tune.study import Study

if TYPE_CHECKING:
    import optuna

GROUP = "group_name"
"""The attribute of Optuna's trials with the name of the folder that has the trial's runs."""
_SAMPLERS = {
    "TPESampler": "tpe",
    "GPSampler": "gp",
    "CmaEsSampler": "cmaes",
    "NSGAIISampler": "nsga2",
    "QMCSampler": "qmc",
    "GridSampler": "grid",
    "RandomSampler": "random",
    "BruteForceSampler": "brute",
}
_PRUNERS = {
    "NopPruner": "none",
    "MedianPruner": "median",
    "PercentilePruner": "percentile",
    "SuccessiveHalvingPruner": "halving",
    "HyperbandPruner": "hyperband",
    "ThresholdPruner": "threshold",
    "PFLPruner": "predicted_final",
}
_DIRECTIONS = {"minimize": "min", "maximize": "max", "min": "min", "max": "max"}
_KINDS = {"float": ("min", "max", "log", "step"), "int": ("min", "max", "log", "step")}


@dataclass(frozen=True)
class OptimizeConfig:
    """A study among the settings of a RunConfig.

    Attributes:
        study_name: its folder, `runs/<project>_Opt/<study_name>`.
        search_space: of each category, a `_config` of the RunConfig, the parameters by name; or of
            another setting, such as `batch_size`, one parameter. A parameter has `type: float` or
            `int` with `min`, `max` and, if wanted, `log` and `step`, or `type: categorical` with
            `choices`. Optuna knows it as `<category>_<name>`.
        trials: how many, over all starts.
        seed: of the sampler.
        metric: that is optimised; `val_loss` is Paceline's "val/loss".
        direction: "minimize" or "maximize".
        sampler: `name` and `kwargs`, as those of `tune.sampler` or under Optuna's own name.
        pruner: the same; the template's `PFLPruner` is `predicted_final`.
        reports: at as many equal shares of a run trials are compared.
        source: the YAML file this was read from, or None.

    Raises:
        RecipeError: there are mistakes; each is listed with its key.
    """

    study_name: str
    search_space: Mapping[str, Any]
    trials: int = 20
    seed: int = 42
    metric: str = "val_loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "tpe"})
    pruner: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    reports: int = 20
    source: Path | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        mistakes = Mistakes(lambda _: str(self.source or "OptimizeConfig"))
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        _check(values, mistakes)
        self._space(mistakes)
        mistakes.raise_any(self.source or "OptimizeConfig(...)")

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> OptimizeConfig:
        """Reads a file.

        Args:
            path: the YAML file.
            overrides: `key=value` changes, in Hydra's grammar.

        Raises:
            RecipeError: there are mistakes; each is listed with file, line, key and the nearest
                right name.
        """
        composed = compose(path, overrides)
        mistakes = composed.mistakes()
        values = composed.resolve(mistakes)
        _check({**values, "source": composed.path}, mistakes)
        mistakes.raise_any(composed.path)
        return cls(**values, source=composed.path)

    @property
    def space(self) -> Space:
        """What is searched, by Optuna's names of the parameters."""
        return self._space(Mistakes(str))

    def overrides(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The changes to a RunConfig, as `with_overrides` takes them.

        Args:
            stored: the parameters' values, as Optuna has them.
        """
        values = self.space.overrides(stored)
        changes: dict[str, Any] = {}
        for category, inner in self.search_space.items():
            if "type" in inner:
                if category in values:
                    changes[category] = values[category]
                continue
            names = [name for name in inner if f"{category}_{name}" in values]
            changes[category] = {name: values[f"{category}_{name}"] for name in names}
        return changes

    def settings(self) -> dict[str, Any]:
        """The study's settings, as a recipe's section `tune:` has them."""
        return {
            "metric": metric_name(self.metric),
            "direction": _DIRECTIONS[self.direction],
            "trials": self.trials,
            "reports": self.reports,
            "sampler": _typed(self.sampler, _SAMPLERS),
            "pruner": _typed(self.pruner, _PRUNERS),
        }

    def check(self, config: RunConfig) -> None:
        """Checks that the configuration takes each value that is searched; builds nothing.

        Args:
            config: that is searched.

        Raises:
            RecipeError: it does not; nothing was trained.
            ConfigError: a category is no setting of it.
        """
        known = [each.name for each in fields(RunConfig)]
        for category in self.search_space:
            if category not in known:
                raise ConfigError(
                    f"search_space.{category}: a RunConfig has no such setting"
                    f"{nearest(category, known)}"
                )
        space = self.space
        first = {p.key: p.samples()[0] for p in space.parameters}
        for parameter in space.parameters:
            for value in parameter.samples():
                changed = config.with_overrides(**self.overrides({**first, parameter.key: value}))
                changed.validate_for_execution()

    def _space(self, mistakes: Mistakes) -> Space:
        node: dict[str, Any] = {}
        for category, inner in self.search_space.items():
            parameters = {category: inner} if "type" in inner else inner
            for name, parameter in parameters.items():
                key = category if "type" in inner else f"{category}_{name}"
                place = ("search_space", category) + (() if "type" in inner else (name,))
                found = _parameter(parameter, place, mistakes)
                if found is not None:
                    node[key] = found
        return read_space(node, ("search_space",), mistakes)


def run(
    config: RunConfig,
    dl_train: Any = None,
    dl_val: Any = None,
    *,
    optimize_config: OptimizeConfig | None = None,
    **settings: Any,
) -> float:
    """Trains one run per seed, or searches settings; see `train_config` and `optimize`.

    Args:
        config: the settings.
        dl_train, dl_val: the loaders; by default those of `config.data`.
        optimize_config: an `OptimizeConfig`, to search settings; None to train these.
        **settings: further keywords of `train_config`, or of `optimize`.

    Returns:
        The mean over the finished seeds of the last validation's loss, or the best trial's value;
        NaN if there is none.
    """
    if optimize_config is None:
        return train_config(config, dl_train, dl_val, **settings)
    return optimize(config, optimize_config, dl_train, dl_val, **settings)


def optimize(
    config: RunConfig,
    optimize_config: OptimizeConfig,
    dl_train: Any = None,
    dl_val: Any = None,
    *,
    trainer: Callable[..., Trainer] = Trainer,
    workers: int = 1,
    **settings: Any,
) -> float:
    """Searches settings of a RunConfig; `run(config, optimize_config=...)` calls this.

    Args:
        config: the settings that are not searched.
        optimize_config: those that are.
        dl_train, dl_val, trainer, **settings: as of `run`. Loaders that are given are those of
            every trial, so that a batch size cannot be searched.
        workers: processes that run trials.

    Returns:
        The best trial's value; NaN if none is complete.

    Raises:
        ConfigError: the configuration does not take what is searched.
        TrialsFailed: too many trials in a row have failed.
        SystemExit: with code 75, a signal has stopped the study; the same call continues it.
    """
    if dl_train is not None and "batch_size" in optimize_config.search_space:
        raise ConfigError("search_space.batch_size: the loaders that were given have their own.")
    optimize_config.check(config)
    base = config.with_overrides(project=f"{config.project}_Opt")
    metric = metric_name(optimize_config.metric)
    space, wanted = optimize_config.space, optimize_config.settings()

    def objective(trial: optuna.Trial) -> float:
        import optuna

        one = base.with_overrides(**optimize_config.overrides(space.suggest(trial)))
        trial.set_user_attr(GROUP, one.group)
        judged = wanted["pruner"]["type"] != "none"
        reports = TrialReports(
            [metric], [wanted["direction"]], optimize_config.reports, trial, judged=judged
        )

        def heard(**given: Any) -> Trainer:
            """Of the first seed alone: what survives it is trained with all of them."""
            if given["run_dir"].name == f"seed_{one.seeds[0]}":
                given["callbacks"] = [*given["callbacks"], reports]
            return trainer(**given)

        first = one.with_overrides(seeds=[one.seeds[0]])
        for part in (first, one)[: 1 if len(one.seeds) == 1 else 2]:
            train_config(part, dl_train, dl_val, trainer=heard, **{"progress": False, **settings})
            if reports.out_of_patience:
                raise optuna.TrialPruned
            if why := failed(part):
                raise PacelineError("\n".join(f"seed {seed}: {text}" for seed, text in why.items()))
        means = json.loads((one.folder / SEEDS_FILE).read_text(encoding="utf-8"))["mean"]
        if means.get(metric) is None:
            raise ConfigError(
                f"metric: no validation has logged {metric!r}{nearest(metric, means)}"
            )
        return float(means[metric])

    folder = Path("runs", base.project, optimize_config.study_name)
    study = Study(objective, folder, settings=wanted, space=space, seed=optimize_config.seed)
    study.optimize(workers=workers)
    ended = [t for t in study.trials if t.state.name == "COMPLETE"]
    return study.best_value if ended else math.nan


def load_study(project: str, study_name: str) -> optuna.Study:
    """Opens the study of an OptimizeConfig, as Optuna has it.

    Args:
        project: of the RunConfig that was searched; its name with or without `_Opt`.
        study_name: of the OptimizeConfig.

    Raises:
        ConfigError: there is none.
    """
    import optuna

    folder = _study_folder(project, study_name)
    name = json.loads((folder / "study.json").read_text(encoding="utf-8"))["name"]
    return optuna.load_study(study_name=name, storage=open_storage(None, folder))


def load_best_model(
    project: str, study_name: str, seed: int | None = None
) -> tuple[torch.nn.Module, RunConfig]:
    """The model of a study's best trial, and its configuration.

    Args:
        project, study_name: as for `load_study`.
        seed: which of its runs; by default the first.

    Raises:
        ConfigError: there is no study, no complete trial or no such seed.
    """
    study = load_study(project, study_name)
    if not any(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)):
        raise ConfigError(f"{study_name}: no trial is complete.")
    group = study.best_trial.user_attrs[GROUP]
    return load_model(_study_folder(project, study_name).parent.name, group, seed)


def load_model(
    project: str, group: str, seed: int | None = None
) -> tuple[torch.nn.Module, RunConfig]:
    """The model that a RunConfig has trained, and the configuration.

    It imports the modules that the configuration names, from the working folder.

    Args:
        project: the RunConfig's.
        group: the folder of its seeds in `runs/<project>`, `RunConfig.group`.
        seed: which of them; by default the first.

    Returns:
        The model in evaluation mode, with the weights that its last validation measured, and the
        configuration.

    Raises:
        ConfigError: there is no such run.
    """
    folder = Path("runs", project, group)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} has no {CONFIG_FILE}: no RunConfig was trained there.")
    config = RunConfig.from_yaml(folder / CONFIG_FILE)
    config = replace(config, source=Path.cwd() / CONFIG_FILE)
    chosen = config.seeds[0] if seed is None else seed
    if chosen not in config.seeds:
        known = ", ".join(map(str, config.seeds))
        raise ConfigError(f"{folder}: seed {chosen} is none of its seeds: {known}.")
    model = config.create_model()
    weights = read_weights(find_checkpoint(folder / f"seed_{chosen}"), "auto")
    load_model_state(model, weights["model"], "the model")
    return model.eval(), config


def _study_folder(project: str, study_name: str) -> Path:
    name = project if project.endswith("_Opt") else f"{project}_Opt"
    folder = Path("runs", name, study_name)
    if not (folder / "study.json").is_file():
        raise ConfigError(f"{folder}: there is no study.")
    return folder


def _check(values: Mapping[str, Any], mistakes: Mistakes) -> None:
    known = {each.name: each for each in fields(OptimizeConfig)}
    for name in values:
        if name not in known:
            mistakes.add((str(name),), f"there is no such key{nearest(str(name), known)}")
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            mistakes.add((name,), "the key is missing.")
    for name, least in (("trials", 1), ("seed", 0), ("reports", 1)):
        value = values.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            mistakes.add((name,), f"expected a whole number of at least {least}, got {value!r}.")
    for name in ("study_name", "metric"):
        if name in values and not isinstance(values[name], str):
            mistakes.add((name,), f"expected a text, got {values[name]!r}.")
    if isinstance(values.get("study_name"), str):
        try:
            folder_name(values["study_name"])
        except ValueError as error:
            mistakes.add(("study_name",), str(error))
    direction = values.get("direction", "minimize")
    if direction not in _DIRECTIONS:
        mistakes.add(
            ("direction",),
            f"expected minimize or maximize, got {direction!r}"
            f"{nearest(str(direction), ['minimize', 'maximize'])}",
        )
    for name, own in (("sampler", _SAMPLERS), ("pruner", _PRUNERS)):
        given = values.get(name, {"name": ""})
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            mistakes.add((name,), "expected `name:` and, if wanted, `kwargs:`.")
        elif wrong := [key for key in given if key not in ("name", "kwargs")]:
            text = f"there is no such key{nearest(str(wrong[0]), ['name', 'kwargs'])}"
            mistakes.add((name, str(wrong[0])), text)
        elif "." in given["name"] and given["name"].rpartition(".")[2] not in own:
            text = f"{given['name']!r} is none of: {', '.join(own)}."
            mistakes.add((name, "name"), text)
    space = values.get("search_space", {})
    if not isinstance(space, Mapping) or not all(isinstance(v, Mapping) for v in space.values()):
        mistakes.add(("search_space",), "expected parameters by category and name.")
        mistakes.raise_any(values.get("source") or "OptimizeConfig(...)")


def _typed(given: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """A sampler or pruner as a recipe names it, from Optuna's or the template's name of it."""
    name = given["name"].rpartition(".")[2]
    return {"type": own.get(name, name), **(given.get("kwargs") or {})}


def _parameter(given: Any, place: Place, mistakes: Mistakes) -> Any:
    """A parameter as a recipe's `tune.space` has it; None if it is a mistake."""
    if not isinstance(given, Mapping):
        return mistakes.add(place, "expected `type:` and its limits, or `choices:`.")
    kind = given.get("type")
    known = ("type", "choices") if kind == "categorical" else ("type", *_KINDS["float"])
    if kind not in (*_KINDS, "categorical"):
        kinds = [*_KINDS, "categorical"]
        text = f"expected one of {', '.join(kinds)}, got {kind!r}{nearest(str(kind), kinds)}"
        return mistakes.add((*place, "type"), text)
    for key in given:
        if key not in known:
            return mistakes.add((*place, str(key)), f"there is no such key{nearest(key, known)}")
    needed = ("choices",) if kind == "categorical" else ("min", "max")
    missing = [key for key in needed if key not in given]
    if missing:
        return mistakes.add(place, f"{missing[0]} is missing.")
    if kind == "categorical":
        return given["choices"]
    more = {key: given[key] for key in ("log", "step") if key in given}
    if kind == "int" and more.get("log") and more.get("step") == 1:
        del more["step"]
    return {kind: [given["min"], given["max"]], **more}
