"""A recipe, checked whole: every component known, nothing built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from paceline.checkpoint.policy import CheckpointPolicy
from paceline.errors import ConfigError, RecipeError
from paceline.recipe.code import find_code, load_code
from paceline.recipe.components import Checker, Component, signature_of
from paceline.recipe.compose import Composed, compose
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.record import CODE_FOLDER
from paceline.recipe.schema import Schema, parse
from paceline.recipe.targets import KINDS, Roots
from paceline.trainer.monitor import MetricMonitor
from paceline.world.parallel import Parallel

# Arguments that mean "optimizer steps in the whole run", which the builder can count.
HORIZON = ("num_training_steps", "total_steps", "T_max")

# Slot -> its kind, and the arguments that the builder gives.
_PARTS = {
    "model": ("model", ()),
    "train_dataloader": ("dataloader", ()),
    "val_dataloader": ("dataloader", ()),
    "loss_fn": ("loss_fn", ()),
    "optimizer": ("optimizer", ("params", "model")),
    "lr_scheduler": ("lr_scheduler", ("optimizer",)),
}
_LISTS = {"callbacks": "callback", "loggers": "logger"}
# The Trainer's arguments that are keys of their own in a recipe, or belong to the command.
_NOT_UNDER_TRAINER = (*_PARTS, *_LISTS, "parallel", "checkpoint", "run_dir", "resume")


@dataclass(frozen=True)
class Recipe:
    """A recipe without mistakes.

    Attributes:
        composed: its text, for the run folder.
        seed: the run's seed; of several, the first.
        seeds: one run each, in folders of their own below `run_dir`; usually empty.
        project, name, run_dir: what the run is called and where it is written.
        code: the user's own module or package, or None.
        trainer: the Trainer class and its scalar settings.
        parts: the components by the Trainer's argument; None where the recipe says null.
        lists: callbacks and loggers; a list that the recipe does not give is absent.
        settings: parallel and checkpoint, if the recipe gives them.
        plan: (decision, setting that changes it), for what was decided so far.
        trust: the packages given with `--trust`.
        whole: the recipe with `seeds` that this is one run of, or None.
    """

    composed: Composed
    seed: int
    seeds: tuple[int, ...]
    project: str
    name: str
    run_dir: Path
    code: Path | None
    trainer: Component
    parts: dict[str, Component | None]
    lists: dict[str, list[Component]]
    settings: dict[str, Any]
    plan: list[tuple[str, str]] = field(default_factory=list)
    trust: tuple[str, ...] = ()
    whole: Recipe | None = None

    @property
    def text(self) -> str:
        """The recipe as its run folder keeps it, so that it can be run again from there."""
        changes: dict[str, Any] = {"run.project": self.project, "run.name": self.name}
        if self.code is not None:
            changes["code"] = f"{CODE_FOLDER}/{self.code.name}"
        return self.composed.changed(changes).text()

    def of_seed(self, seed: int) -> Recipe:
        """The recipe of one of several runs: `seed` in the place of `seeds`, a folder of its own.

        Raises:
            RecipeError: a mistake that shows with this seed alone.
        """
        changes = {"seed": seed, "run.dir": str(self.run_dir / f"seed_{seed}")}
        return replace(check(self.composed.changed(changes, "seeds"), self.trust), whole=self)

    def setting(self, name: str) -> Any:
        """A scalar setting of the trainer: the recipe's, or the Trainer's default."""
        if name in self.trainer.kwargs:
            return self.trainer.kwargs[name]
        return signature_of(self.trainer.target).defaults.get(name)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, trust: Collection[str] = ()
) -> Recipe:
    """Reads a recipe and checks all of it. Imports its `code:`; builds nothing.

    Args:
        path: the YAML file.
        overrides: `key=value` changes, in Hydra's grammar.
        trust: further packages whose classes and functions the recipe may name.

    Raises:
        RecipeError: all its mistakes, each with its place, what was expected and the nearest name.
    """
    return check(compose(path, overrides), trust)


def check(composed: Composed, trust: Collection[str] = ()) -> Recipe:
    """Checks all of a recipe that was read; see `load_recipe`."""
    mistakes = composed.mistakes()
    schema = parse(_values(composed, mistakes), mistakes)
    code = _code(schema.code, composed, mistakes)
    unread = Path(schema.code).stem if schema.code is not None and code is None else None
    checker = Checker(Roots(code.stem if code else None, trust), mistakes, unread)
    trainer = _trainer(schema.trainer, checker)
    parts = _parts(schema, trainer, checker)
    lists = _lists(schema, checker)
    settings = _settings(schema, checker)
    mistakes.raise_any(composed.path)
    assert trainer is not None
    project = schema.run.project or composed.path.stem
    run_dir = Path(schema.run.dir) if schema.run.dir else Path("runs", project, schema.run.name)
    recipe = Recipe(
        composed, schema.seed, tuple(schema.seeds or ()), project, schema.run.name, run_dir, code,
        trainer, parts, lists, settings, trust=tuple(trust),
    )  # fmt: skip
    if schema.run.dir is None:
        recipe.plan.append((f"the run is written to {run_dir}", "run.dir"))
    return recipe


def _values(composed: Composed, mistakes: Mistakes) -> dict[str, Any]:
    """The recipe's values. Where there are several seeds, `${seed}` is looked up as the first."""
    seeds = OmegaConf.select(composed.config, "seeds", throw_on_resolution_failure=False)
    if "seed" in composed.config or not isinstance(seeds, ListConfig) or len(seeds) == 0:
        return composed.resolve(mistakes)
    values = composed.changed({"seed": seeds[0]}).resolve(mistakes)
    del values["seed"]
    return values


def _code(name: str | None, composed: Composed, mistakes: Mistakes) -> Path | None:
    if name is None:
        return None
    try:
        path = find_code(name, composed.path.parent)
        load_code(path)
    except RecipeError as error:
        mistakes.add(("code",), str(error))
        return None
    return path


def _trainer(node: Mapping[str, Any], checker: Checker) -> Component | None:
    """The Trainer class and its settings."""
    node = dict(node)
    path = ("trainer",)
    for name in [n for n in _NOT_UNDER_TRAINER if n in node]:
        place = f"is a key of the recipe's top level: `{name}:`"
        place = {"run_dir": "is `run.dir`", "resume": "is `--resume`"}.get(name, place)
        checker.mistakes.add((*path, name), f"{place}; it does not belong under `trainer:`.")
        del node[name]
    if isinstance(node.get("metric_monitor"), Mapping):
        where = (*path, "metric_monitor")
        node["metric_monitor"] = settings(MetricMonitor, node["metric_monitor"], where, checker)
    if "_target_" not in node and "type" not in node:
        node["type"] = "trainer"
    return checker.component(node, KINDS["trainer"], path, filled=_NOT_UNDER_TRAINER)


def _parts(
    schema: Schema, trainer: Component | None, checker: Checker
) -> dict[str, Component | None]:
    parts: dict[str, Component | None] = {}
    interval = trainer.kwargs.get("lr_scheduler_interval", "step") if trainer else "step"
    for slot, (kind, given) in _PARTS.items():
        node = getattr(schema, slot)
        if node is None:
            continue
        counted = HORIZON if slot == "lr_scheduler" and interval != "metric" else ()
        parts[slot] = checker.component(node, KINDS[kind], (slot,), given=given, filled=counted)
    for slot, needs in (("optimizer", "model"), ("lr_scheduler", "optimizer")):
        if getattr(schema, slot) is not None and getattr(schema, needs) is None:
            checker.mistakes.add((slot,), f"needs a `{needs}:`.")
    return parts


def _lists(schema: Schema, checker: Checker) -> dict[str, list[Component]]:
    """Callbacks and loggers, from a list or from a mapping of names (null takes one out)."""
    lists: dict[str, list[Component]] = {}
    for slot, kind in _LISTS.items():
        node = getattr(schema, slot)
        if node is None:
            continue
        if isinstance(node, Mapping) and not ("_target_" in node or "type" in node):
            items = [(name, item) for name, item in node.items() if item is not None]
        elif isinstance(node, list):
            items = [(str(i), item) for i, item in enumerate(node)]
        else:
            checker.mistakes.add((slot,), f"expected a list or a mapping of names, got {node!r}")
            continue
        found = [checker.component(item, KINDS[kind], (slot, name)) for name, item in items]
        lists[slot] = [component for component in found if component is not None]
    return lists


def _settings(schema: Schema, checker: Checker) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if schema.parallel:
        found["parallel"] = settings(Parallel, schema.parallel, ("parallel",), checker)
    if schema.checkpoint is None or schema.checkpoint is False:
        found["checkpoint"] = None
    elif not isinstance(schema.checkpoint, Mapping):
        text = f"expected a mapping, or null for no checkpoints, got {schema.checkpoint!r}"
        checker.mistakes.add(("checkpoint",), text)
    elif schema.checkpoint:
        found["checkpoint"] = settings(
            CheckpointPolicy, schema.checkpoint, ("checkpoint",), checker
        )
    return found


def settings(cls: type, node: Mapping[str, Any], path: tuple[str, ...], checker: Checker) -> Any:
    """An object that holds nothing but settings; made at once, since only it knows its limits."""
    component = checker.call(cls, node, path, KINDS["part"])
    if component is None:
        return None
    try:
        return cls(**component.kwargs)
    except ConfigError as error:
        checker.mistakes.add(path, str(error))
        return None
