"""Finds settings that are valid alone but not together, without building anything.

The Trainer knows its own rules; they are checked on a placeholder that has the recipe's settings
but whose constructor never ran.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from paceline import registry
from paceline.data.source import WindowSize
from paceline.errors import ConfigError
from paceline.parallel.float8 import missing
from paceline.recipe.components import Component, Signature, fit, signature_of, takes_number
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.parts import Part, each, is_several, trainer_class, trainer_config_type
from paceline.recipe.schema import Schema
from paceline.trainer.checks import wrong_settings, wrong_steps, wrong_validation
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.optimization import takes_metric
from paceline.trainer.settings import ValidationPolicy
from paceline.trainer.slots import slots_of
from paceline.trainer.trainer import Trainer

_NEEDED = {
    "model": "there is nothing to train",
    "optimizer": "nothing would be trained",
    "train_dataloader": "there is nothing to train on",
}
# A line of the Trainer's message: `name=value: why`, or `name: why`.
_LINE = re.compile(r"(\w+)(?:=(.+?))?(?: and \w+)?: (.*)", re.DOTALL)


def check_combinations(
    schema: Schema,
    sections: Mapping[str, Any],
    target: Callable[..., Any] | None,
    parts: dict[str, Part],
    mistakes: Mistakes,
) -> None:
    """Adds a mistake for each invalid combination of settings that are valid alone.

    Args:
        schema: the keys that hold no component.
        sections: the recipe's value of each slot that it fills.
        target: the class or function that makes the trainer; None if it is not known.
        parts: the components of the sections, as far as they have no mistakes.
        mistakes: collects the mistakes.
    """
    values = _given(schema, mistakes)
    cls = Trainer if target is None else trainer_class(target)
    known = {*Schema.model_fields, *slots_of(cls)}
    # A class with its own constructor may fill in settings that the recipe leaves out.
    fills = target is not None and (target is not cls or cls.__init__ is not Trainer.__init__)
    stand_in = _stand_in(Trainer if fills else cls, schema, sections, values)
    lines = wrong_settings(stand_in)
    whole = not fills and not _overrides_configure(cls) and not mistakes.concern(("trainer",))
    needed = _NEEDED if whole else {}
    if whole:
        lines += wrong_validation(stand_in) + wrong_steps(stand_in)
    if target is not None:
        signature = signature_of(target)
        if trainer_config_type(cls) is None:
            _check_taken(signature, sections, mistakes)
        # The builder always gives a callback, the one that records the recipe.
        fillable = set(slots_of(cls)) - {"callbacks"}
        required = [name for name in signature.required if name in fillable]
        needed = dict.fromkeys(required, f"{signature.name} has no default for it") | needed
    _check_present(needed, sections, known, mistakes)
    for line in lines:
        _note(line, values, known, mistakes, only_given=not whole)
    values = {**signature_of(Trainer).defaults, **values}
    if lacking := missing(values["precision"]):
        mistakes.add(("trainer", "precision"), lacking)
    _check_schedulers(parts, values, mistakes)
    _check_batch_size(parts, values, mistakes)


def _given(schema: Schema, mistakes: Mistakes) -> dict[str, Any]:
    """The Trainer's settings that the recipe gives and that are valid alone."""
    known = signature_of(Trainer).named
    return _as_numbers(
        Trainer,
        {
            name: value
            for name, value in schema.trainer.items()
            if name in known and not mistakes.concern(("trainer", name))
        },
    )


def _as_numbers(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a class that are valid alone; texts such as `1.25K` become numbers."""
    hints, found = signature_of(cls).hints, dict(given)
    for name, value in given.items():
        if isinstance(value, str) and takes_number(hints.get(name)):
            found[name] = fit(value, hints[name])
    return found


def _stand_in(
    cls: type[Trainer], schema: Schema, sections: Mapping[str, Any], values: Mapping[str, Any]
) -> Any:
    """A trainer with a recipe's settings, without components; no constructor runs."""
    stand_in = object.__new__(cls)
    held = {**signature_of(Trainer).defaults, **values}
    held |= {"loss_fn": sections.get("loss_fn"), "callbacks": sections.get("callbacks", ())}
    if isinstance(monitor := held["metric_monitor"], Mapping):
        held["metric_monitor"] = MetricMonitor(**_as_numbers(MetricMonitor, monitor))
    if isinstance(policy := held["validate_every"], Mapping):
        policy = ValidationPolicy(**_as_numbers(ValidationPolicy, policy))
        held |= {"validate_every": policy.every, "max_val_batches": policy.max_batches}
    loader = sections.get("val_dataloader")
    one = None if loader is None else ()
    held["val_dataloader"] = loader if is_several("val_dataloader", loader) else one
    held["model"] = {} if is_several("model", sections.get("model")) else None
    held["_epochs"] = held.pop("epochs")
    held["show_progress"] = held.pop("progress")
    held["checkpoint_policy"] = _policy_given(schema.checkpoint)
    held["run_dir"] = "a recipe's run always has one"
    vars(stand_in).update(held)
    return stand_in


def _policy_given(node: Any) -> Any:
    """What `checkpoint:` says of the engine that a run resumes from; None for none."""
    if isinstance(node, list):
        others = registry.names("checkpoint")
        node = next(
            (one for one in node if isinstance(one, Mapping) and one.get("type") not in others),
            None,
        )
    return node if node or node == {} else None


def _overrides_configure(cls: type[Trainer]) -> bool:
    return cls.configure is not Trainer.configure


def _note(
    line: str,
    values: Mapping[str, Any],
    known: Collection[str],
    mistakes: Mistakes,
    *,
    only_given: bool,
) -> None:
    found = _LINE.fullmatch(line)
    if found is None:
        mistakes.add(("trainer",), line)
        return
    name, value, text = found.groups()
    if only_given and name not in values:
        return
    if value is not None:
        text = f"{text.removesuffix('.')}, got {value}" if text.startswith("expected") else text
    path = (name,) if name in known else ("trainer", name)
    mistakes.add(path, text)


def _check_taken(signature: Signature, sections: Mapping[str, Any], mistakes: Mistakes) -> None:
    """Adds a mistake for each section that the trainer's constructor does not take."""
    for name in sections:
        if name not in signature.named and not signature.takes_any:
            mistakes.add((name,), f"{signature.name} has no argument {name!r} to receive it.")


def _check_present(
    needed: Mapping[str, str],
    sections: Mapping[str, Any],
    known: Collection[str],
    mistakes: Mistakes,
) -> None:
    """Adds a mistake for each missing section, with the reason why it is needed."""
    # If there is a misspelt key, it is probably the missing one.
    if any(len(mistake.path) == 1 and mistake.path[0] not in known for mistake in mistakes.found):
        return
    for name, why in needed.items():
        if name not in sections and not mistakes.concern((name,)):
            mistakes.add((name,), f"{why}: a recipe needs `{name}:`.")


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
