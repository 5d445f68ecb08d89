"""A recipe's sections -> Components and settings: the trainer, its parts, its lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paceline.checkpoint import CheckpointPolicy, engine_class
from paceline.errors import ConfigError
from paceline.recipe.components import HORIZON, Checker, Component, is_component
from paceline.recipe.groups import Group, check_groups
from paceline.recipe.mistakes import Path, suggestion
from paceline.recipe.schema import Schema
from paceline.recipe.targets import KINDS
from paceline.trainer.monitor import MetricMonitor
from paceline.world.layout import Parallel

Part = Component | dict[str, Component] | None
"""A component, or components by name; None where the recipe says null."""

# Slot -> its kind, and the arguments that the builder gives.
PARTS = {
    "model": ("model", ()),
    "train_dataloader": ("dataloader", ()),
    "val_dataloader": ("dataloader", ()),
    "loss_fn": ("loss_fn", ()),
    "optimizer": ("optimizer", ("params", "model")),
    "lr_scheduler": ("lr_scheduler", ("optimizer",)),
}
# Those of which there may be several by name, and what each of them needs one of by that name.
_NAMED = {
    "model": None,
    "val_dataloader": None,
    "optimizer": "model",
    "lr_scheduler": "optimizer",
}
_LISTS = {"callbacks": "callback", "loggers": "logger"}
# The Trainer's arguments that are keys of their own in a recipe, or belong to the command.
_NOT_UNDER_TRAINER = (*PARTS, *_LISTS, "parallel", "checkpoint", "run_dir", "resume")


def each(part: Part) -> Iterator[tuple[str, Component]]:
    """The components of a part with their names; that of a single one is empty."""
    if isinstance(part, Component):
        yield "", part
    elif part is not None:
        yield from part.items()


def check_trainer(node: Mapping[str, Any], checker: Checker) -> Component | None:
    """Checks `trainer:`, the Trainer class and its settings.

    Args:
        node: the section.
        checker: checks components, and collects the mistakes.

    Returns:
        The component, or None if it has mistakes.
    """
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


def check_parts(schema: Schema, checker: Checker) -> tuple[dict[str, Part], dict[str, list[Group]]]:
    """Checks the Trainer's components.

    Args:
        schema: the recipe's top level.
        checker: checks components, and collects the mistakes.

    Returns:
        The components by slot, and the parameter groups by the optimizer's name.
    """
    parts: dict[str, Part] = {}
    groups: dict[str, list[Group]] = {}
    counted = HORIZON if schema.trainer.get("lr_scheduler_interval") != "metric" else ()
    for slot, (kind, given) in PARTS.items():
        node = getattr(schema, slot)
        if node is None:
            continue
        filled = counted if slot == "lr_scheduler" else ()
        found: dict[str, Component] = {}
        for name, one, path in _nodes(slot, node):
            listed = None
            if slot == "optimizer" and isinstance(one, Mapping):
                listed = one.get("groups")
                one = {key: value for key, value in one.items() if key != "groups"}
            part = checker.component(one, KINDS[kind], path, given=given, filled=filled)
            if listed is not None:
                where = (*path, "groups")
                groups[name] = check_groups(listed, where, part, checker.mistakes)
            if part is not None:
                found[name] = part
        parts[slot] = found if is_several(slot, node) else found.get("")
    for slot, needs in _NAMED.items():
        if needs is not None and getattr(schema, slot) is not None:
            _check_names(schema, slot, needs, checker)
    return parts, groups


def is_several(slot: str, node: Any) -> bool:
    """Whether a slot holds several components by name, not one.

    Args:
        slot: the slot's key.
        node: the section.
    """
    if slot not in _NAMED or not isinstance(node, Mapping) or is_component(node):
        return False
    return len(node) > 0 and all(isinstance(one, Mapping) for one in node.values())


def _nodes(slot: str, node: Any) -> list[tuple[str, Any, Path]]:
    """(name, node, path) of a slot's components."""
    if is_several(slot, node):
        return [(name, one, (slot, name)) for name, one in node.items()]
    return [("", node, (slot,))]


def _check_names(schema: Schema, slot: str, needs: str, checker: Checker) -> None:
    """Several optimizers have a model each, and several schedulers an optimizer each, by name."""
    needed, node = getattr(schema, needs), getattr(schema, slot)
    if needed is None:
        if not checker.mistakes.concern((needs,)):
            checker.mistakes.add((slot,), f"needs a `{needs}:`.")
        return
    known = list(needed) if is_several(needs, needed) else []
    if not is_several(slot, node):
        if slot == "lr_scheduler" and known:
            text = (
                f"there are several optimizers; give schedulers by their names: {', '.join(known)}."
            )
            checker.mistakes.add((slot,), text)
        return
    for name in node:
        if not known:
            text = f"several by name need several of `{needs}:` by the same names."
            checker.mistakes.add((slot, name), text)
        elif name not in known:
            text = f"there is no {needs} of this name{suggestion(name, known)}"
            checker.mistakes.add((slot, name), text)


def check_lists(schema: Schema, checker: Checker) -> dict[str, list[Component]]:
    """Checks callbacks and loggers: a list, or a mapping of names (null removes one).

    Args:
        schema: the recipe's top level.
        checker: checks components, and collects the mistakes.

    Returns:
        The components without mistakes; a list that the recipe does not give is absent.
    """
    lists: dict[str, list[Component]] = {}
    for slot, kind in _LISTS.items():
        node = getattr(schema, slot)
        if node is None:
            continue
        if isinstance(node, Mapping) and not is_component(node):
            items = [(name, item) for name, item in node.items() if item is not None]
            if not items:
                continue  # only an empty list turns rows off
        elif isinstance(node, list):
            items = [(str(i), item) for i, item in enumerate(node)]
        else:
            checker.mistakes.add((slot,), f"expected a list or a mapping of names, got {node!r}")
            continue
        found = [checker.component(item, KINDS[kind], (slot, name)) for name, item in items]
        lists[slot] = [component for component in found if component is not None]
    return lists


def check_settings(schema: Schema, checker: Checker) -> dict[str, Any]:
    """Checks `parallel:` and `checkpoint:`.

    Args:
        schema: the recipe's top level.
        checker: checks components, and collects the mistakes.

    Returns:
        The settings that the recipe gives, by key.
    """
    found: dict[str, Any] = {}
    if schema.parallel:
        found["parallel"] = settings(Parallel, schema.parallel, ("parallel",), checker)
    if schema.checkpoint is None or schema.checkpoint is False:
        found["checkpoint"] = None
    elif not isinstance(schema.checkpoint, Mapping):
        text = f"expected a mapping, or null for no checkpoints, got {schema.checkpoint!r}"
        checker.mistakes.add(("checkpoint",), text)
    elif schema.checkpoint:
        policy = settings(CheckpointPolicy, schema.checkpoint, ("checkpoint",), checker)
        found["checkpoint"] = policy
        if policy is not None:
            try:
                engine_class(policy.engine)
            except ConfigError as error:
                checker.mistakes.add(("checkpoint", "engine"), str(error))
    return found


def settings(cls: type, node: Mapping[str, Any], path: Path, checker: Checker) -> Any:
    """Builds an object that holds only settings, since its constructor checks their limits.

    Args:
        cls: its class.
        node: its arguments.
        path: their place in the recipe.
        checker: checks the arguments, and collects the mistakes.

    Returns:
        The object, or None if there are mistakes.
    """
    component = checker.call(cls, node, path, KINDS["part"])
    if component is None:
        return None
    try:
        return cls(**component.kwargs)
    except ConfigError as error:
        checker.mistakes.add(path, str(error))
        return None
