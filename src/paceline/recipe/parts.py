"""A recipe's sections -> Components and settings: the trainer, and what fills its slots."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from paceline.checkpoint import CheckpointPolicy, engine_class
from paceline.errors import ConfigError
from paceline.recipe.components import Checker, Component, arguments_of, is_component, signature_of
from paceline.recipe.groups import Group, check_groups
from paceline.recipe.mistakes import Path, suggestion
from paceline.recipe.schema import Schema, foreign
from paceline.recipe.targets import KINDS, Kind, kind_of, returned_class
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.settings import ValidationPolicy
from paceline.trainer.slots import Slot, slots_of
from paceline.trainer.trainer import Trainer
from paceline.world.layout import Parallel

Part = Component | dict[str, Component] | list[Component]
"""What fills a slot: one component, several by name, or a list."""

# The arguments that the builder gives to the components of a slot.
_GIVEN = {"optimizer": ("params", "model"), "lr_scheduler": ("optimizer",)}
# Slots that may hold several by name, and the slot in which each name must exist as well.
_NAMED = {
    "model": None,
    "val_dataloader": None,
    "optimizer": "model",
    "lr_scheduler": "optimizer",
}
# The Trainer's other arguments that are keys of their own in a recipe, or belong to the command.
_NOT_UNDER_TRAINER = ("parallel", "checkpoint", "run_dir", "resume")


def each(part: Part | None) -> Iterator[tuple[str, Component]]:
    """The components of a part with their names; that of a single one is empty."""
    if isinstance(part, Component):
        yield "", part
    elif isinstance(part, list):
        yield from ((str(i), component) for i, component in enumerate(part))
    elif part is not None:
        yield from part.items()


def check_trainer(
    node: Mapping[str, Any], checker: Checker
) -> tuple[Callable[..., Any] | None, Component | None]:
    """Checks `trainer:`, the Trainer class and its settings.

    Args:
        node: the section.
        checker: checks components, and collects the mistakes.

    Returns:
        The class, or the function that makes the trainer, None if it is not known; and the
        component, None if it has mistakes.
    """
    node = dict(node) if is_component(node) else {"type": "trainer", **node}
    path, kind = ("trainer",), KINDS["trainer"]
    target = checker.target(node, kind, path)
    cls = Trainer if target is None else trainer_class(target)
    elsewhere = (*slots_of(cls), *_NOT_UNDER_TRAINER)
    for name in [n for n in elsewhere if n in node]:
        place = f"is a key of the recipe's top level: `{name}:`"
        place = {"run_dir": "is `run.dir`", "resume": "is `--resume`"}.get(name, place)
        checker.mistakes.add((*path, name), f"{place}; it does not belong under `trainer:`.")
        del node[name]
    _name_ours(node, cls, path, checker)
    if isinstance(node.get("metric_monitor"), Mapping):
        where = (*path, "metric_monitor")
        node["metric_monitor"] = settings(MetricMonitor, node["metric_monitor"], where, checker)
    if isinstance(node.get("validate_every"), Mapping):
        where = (*path, "validate_every")
        node["validate_every"] = settings(ValidationPolicy, node["validate_every"], where, checker)
    arguments, args = arguments_of(node)
    return target, checker.call(target, arguments, path, kind, filled=elsewhere, args=args)


def _name_ours(node: dict[str, Any], cls: type, path: Path, checker: Checker) -> None:
    """Takes out the keys of other systems that have no namesake here; each mistake names ours."""
    known = signature_of(cls).named
    for name in [n for n in node if n not in known and foreign(n) is not None]:
        checker.mistakes.add((*path, name), f"there is no such key; here it is {foreign(name)}.")
        del node[name]


def trainer_class(target: Callable[..., Any]) -> type[Trainer]:
    """The class of the trainer that a target makes; a function's is its return annotation."""
    cls = target if inspect.isclass(target) else returned_class(target)
    return cls if cls is not None and issubclass(cls, Trainer) else Trainer


def check_parts(
    sections: Mapping[str, Any],
    slots: Mapping[str, Slot],
    counted: Collection[str],
    checker: Checker,
) -> tuple[dict[str, Part], dict[str, list[Group]]]:
    """Checks the Trainer's components.

    Args:
        sections: the recipe's value of each slot that it fills.
        slots: the slots of the trainer's class.
        counted: arguments of a schedule that the builder gives if the recipe does not.
        checker: checks components, and collects the mistakes.

    Returns:
        The components by slot, and the parameter groups by the optimizer's name.
    """
    parts: dict[str, Part] = {}
    groups: dict[str, list[Group]] = {}
    for name, node in sections.items():
        kind = kind_of(name, slots[name].base)
        if slots[name].is_list:
            part = _check_list(name, node, kind, checker)
        else:
            part = _check_single(name, node, kind, counted, groups, checker)
        if part is not None:
            parts[name] = part
    for slot, needs in _NAMED.items():
        if needs is not None and slot in sections:
            _check_names(sections, slot, needs, checker)
    return parts, groups


def _check_single(
    slot: str,
    node: Any,
    kind: Kind,
    counted: Collection[str],
    groups: dict[str, list[Group]],
    checker: Checker,
) -> Part | None:
    """One component, or several by name; an optimizer's groups join `groups`."""
    given, filled = _GIVEN.get(slot, ()), counted if slot == "lr_scheduler" else ()
    found: dict[str, Component] = {}
    for name, one, path in _nodes(slot, node):
        listed = None
        if slot == "optimizer" and isinstance(one, Mapping):
            listed = one.get("groups")
            one = {key: value for key, value in one.items() if key != "groups"}
        component = checker.component(one, kind, path, given=given, filled=filled)
        if listed is not None:
            where = (*path, "groups")
            groups[name] = check_groups(listed, where, component, checker.mistakes)
        if component is not None:
            found[name] = component
    return found if is_several(slot, node) else found.get("")


def _check_list(slot: str, node: Any, kind: Kind, checker: Checker) -> list[Component] | None:
    """Components from a list or from a mapping of names; null takes one out."""
    if isinstance(node, Mapping) and not is_component(node):
        items = [(str(name), item) for name, item in node.items() if item is not None]
        if slot == "loggers" and not items:
            return None  # only an empty list turns rows off
    elif isinstance(node, list):
        items = [(str(i), item) for i, item in enumerate(node) if item is not None]
    else:
        checker.mistakes.add((slot,), f"expected a list or a mapping of names, got {node!r}")
        return None
    found = [checker.component(item, kind, (slot, name)) for name, item in items]
    return [component for component in found if component is not None]


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


def _check_names(sections: Mapping[str, Any], slot: str, needs: str, checker: Checker) -> None:
    """Several optimizers have a model each, and several schedulers an optimizer each, by name."""
    needed, node = sections.get(needs), sections[slot]
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
        node = dict(schema.checkpoint)
        _name_ours(node, CheckpointPolicy, ("checkpoint",), checker)
        policy = settings(CheckpointPolicy, node, ("checkpoint",), checker)
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
