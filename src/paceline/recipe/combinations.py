"""Finds settings that are valid alone but not together, without building anything.

The Trainer knows its own rules; they are checked on a placeholder that has the recipe's settings
but whose constructor never ran.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from typing import Any, cast

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from paceline.data.source import WindowSize
from paceline.errors import ConfigError
from paceline.parallel.float8 import missing
from paceline.recipe.components import Component, signature_of
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.parts import Part, each, is_several
from paceline.recipe.schema import Schema
from paceline.trainer.checks import wrong_settings, wrong_steps, wrong_validation
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.optimization import takes_metric
from paceline.trainer.trainer import Trainer

# A line of the Trainer's message: `name=value: why`, or `name: why`.
_LINE = re.compile(r"(\w+)(?:=(.+?))?(?: and \w+)?: (.*)", re.DOTALL)


def check_combinations(
    schema: Schema, trainer: Component | None, parts: dict[str, Part], mistakes: Mistakes
) -> None:
    """Adds a mistake for each invalid combination of settings that are valid alone.

    Args:
        schema: the recipe's top level.
        trainer: the Trainer class and its settings; None if they have mistakes.
        parts: the components by the Trainer's argument.
        mistakes: collects the mistakes.
    """
    values = _given(schema, mistakes)
    cls = Trainer if trainer is None else cast(type[Trainer], trainer.target)
    # A class with its own constructor may fill in settings that the recipe leaves out.
    fills = not inspect.isclass(cls) or cls.__init__ is not Trainer.__init__
    stand_in = _stand_in(Trainer if fills else cls, schema, values)
    lines = wrong_settings(stand_in)
    whole = not fills and not _overrides_configure(cls) and not mistakes.concern(("trainer",))
    if whole:
        lines += wrong_validation(stand_in) + wrong_steps(stand_in)
        _check_present(schema, mistakes)
    for line in lines:
        _note(line, values, mistakes, only_given=not whole)
    values = {**signature_of(Trainer).defaults, **values}
    if lacking := missing(values["precision"]):
        mistakes.add(("trainer", "precision"), lacking)
    _check_schedulers(parts, values, mistakes)
    _check_batch_size(parts, values, mistakes)


def _given(schema: Schema, mistakes: Mistakes) -> dict[str, Any]:
    """The Trainer's settings that the recipe gives and that are valid alone."""
    known = signature_of(Trainer).named
    return {
        name: value
        for name, value in schema.trainer.items()
        if name in known and not mistakes.concern(("trainer", name))
    }


def _stand_in(cls: type[Trainer], schema: Schema, values: Mapping[str, Any]) -> Any:
    """A trainer with a recipe's settings, without components; no constructor runs."""
    stand_in = object.__new__(cls)
    held = {**signature_of(Trainer).defaults, **values}
    held |= {"loss_fn": schema.loss_fn, "callbacks": schema.callbacks or ()}
    if isinstance(monitor := held["metric_monitor"], Mapping):
        held["metric_monitor"] = MetricMonitor(**monitor)
    several = is_several("val_dataloader", schema.val_dataloader)
    one = None if schema.val_dataloader is None else ()
    held["val_dataloader"] = schema.val_dataloader if several else one
    held["model"] = {} if is_several("model", schema.model) else None
    held["_epochs"] = held.pop("epochs")
    held["show_progress"] = held.pop("progress")
    held["checkpoint_policy"] = schema.checkpoint or None if schema.checkpoint != {} else {}
    held["run_dir"] = "a recipe's run always has one"
    vars(stand_in).update(held)
    return stand_in


def _overrides_configure(cls: type[Trainer]) -> bool:
    return cls.configure is not Trainer.configure


def _note(line: str, values: Mapping[str, Any], mistakes: Mistakes, *, only_given: bool) -> None:
    found = _LINE.fullmatch(line)
    if found is None:
        mistakes.add(("trainer",), line)
        return
    name, value, text = found.groups()
    if only_given and name not in values:
        return
    if value is not None:
        text = f"{text.removesuffix('.')}, got {value}" if text.startswith("expected") else text
    path = (name,) if name in Schema.model_fields else ("trainer", name)
    mistakes.add(path, text)


def _check_present(schema: Schema, mistakes: Mistakes) -> None:
    unknown = any(len(m.path) == 1 and m.path[0] not in Schema.model_fields for m in mistakes.found)
    for name, what in (
        ("model", "there is nothing to train"),
        ("optimizer", "nothing would be trained"),
        ("train_dataloader", "there is nothing to train on"),
    ):
        # If there is a misspelt key, it is probably the missing one.
        if getattr(schema, name) is None and not unknown and not mistakes.concern((name,)):
            mistakes.add((name,), f"{what}: a recipe needs `{name}:`.")


def _check_schedulers(
    parts: dict[str, Part], values: Mapping[str, Any], mistakes: Mistakes
) -> None:
    interval, monitor = values["lr_scheduler_interval"], values["metric_monitor"]
    for _, scheduler in each(parts.get("lr_scheduler")):
        cls = scheduler.target
        if not (inspect.isclass(cls) and issubclass(cls, LRScheduler)):
            continue
        if interval == "metric" and "metrics" not in inspect.signature(cls.step).parameters:
            mistakes.add(
                ("trainer", "lr_scheduler_interval"),
                f"{cls.__name__} takes no metric: the interval is 'step' or 'epoch'.",
            )
        elif interval != "metric" and takes_metric(cls):
            text = f"{cls.__name__} steps with a metric: set trainer.lr_scheduler_interval=metric."
            mistakes.add(scheduler.path, text)
        elif interval == "metric" and isinstance(monitor, Mapping):
            mode = scheduler.kwargs.get("mode", signature_of(cls).defaults.get("mode"))
            wanted = monitor.get("mode", "min")
            if mode != wanted:
                text = f"{mode!r} here, but trainer.metric_monitor says {wanted!r}."
                mistakes.add((*scheduler.path, "mode"), text)


def _check_batch_size(
    parts: dict[str, Part], values: Mapping[str, Any], mistakes: Mistakes
) -> None:
    loader, wanted = parts.get("train_dataloader"), values["global_batch_size"]
    if not isinstance(wanted, int) or wanted < 1 or not isinstance(loader, Component):
        return
    if loader.target is not DataLoader or loader.args or "batch_sampler" in loader.kwargs:
        return
    batch_size = loader.kwargs.get("batch_size", 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        return
    try:
        # A launcher has no world yet; its workers check this.
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        WindowSize(global_batch_size=wanted).micro_batches(batch_size, ranks)
    except ConfigError as error:
        text = str(error).partition("=")[2].partition(" ")[2]
        mistakes.add(("trainer", "global_batch_size"), f"{wanted} {text}")
