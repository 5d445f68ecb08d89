"""A recipe's sections -> Components and settings: the trainer, and what fills its slots."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from paceline import registry
from paceline.checkpoint import CheckpointPolicy, engine_class
from paceline.checkpoint.engine import KIND as ENGINES
from paceline.checkpoint.policy import NATIVE
from paceline.errors import ConfigError
from paceline.recipe.components import Checker, Component, arguments_of, is_component, signature_of
from paceline.recipe.groups import Group, check_groups
from paceline.recipe.mistakes import Path, suggestion
from paceline.recipe.schema import Schema, foreign
from paceline.recipe.targets import KINDS, Kind, kind_of, returned_class
from paceline.recipe.typed import Config
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.settings import ValidationPolicy
from paceline.trainer.slots import TRAINER_SLOTS, Slot, slots_of
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
    config_type = trainer_config_type(cls)
    own = own_fields(cls)
    given = () if config_type is None else (*TRAINER_SLOTS, "config")
    if config_type is not None and not signature_of(cls).takes_any:
        known = [*own, *(n for n in signature_of(cls).named if n not in given)]
        for name in [n for n in arguments if n not in known]:
            later = config_type.not_yet.get(name)
            text = f"{cls.__qualname__} has no such setting{suggestion(name, known)}"
            text = text if later is None else f"{later} does not exist yet."
            checker.mistakes.add((*path, name), text)
            del arguments[name]
    plain = {name: value for name, value in arguments.items() if name not in own}
    component = checker.call(
        target, plain, path, kind, given=given, filled=(*elsewhere, *own), args=args
    )
    if config_type is None:
        return target, component
    fields = {name: value for name, value in arguments.items() if name in own}
    held = checker.fields(config_type, fields, path, without=slots_of(cls))
    if component is None or held is None:
        return target, None
    return target, replace(component, kwargs={**component.kwargs, **held})


def trainer_config_type(cls: type) -> type[Config] | None:
    """The type of a trainer class's own config; None for one without factories."""
    found = getattr(cls, "config_type", None)
    return found if inspect.isclass(found) and issubclass(found, Config) else None


def own_fields(cls: type) -> frozenset[str]:
    """The keys under `trainer:` that a trainer class's config declares, its sections apart."""
    config_type = trainer_config_type(cls)
    names = () if config_type is None else config_type.model_fields
    return frozenset(names) - {"type", "checkpoint", *slots_of(cls)}


def trainer_config(
    trainer: Component, parts: Mapping[str, Part], checker: Checker
) -> Config | None:
    """The config of a trainer class with factories: its own fields, and one of each section.

    Args:
        trainer: the checked `trainer:`.
        parts: the checked sections.
        checker: collects the mistakes.

    Returns:
        The config; None for a class without factories, or if there are mistakes.
    """
    cls = trainer_class(trainer.target)
    config_type = trainer_config_type(cls)
    if config_type is None:
        return None
    fields = config_type.model_fields
    held = {name: trainer.kwargs[name] for name in own_fields(cls) if name in trainer.kwargs}
    held |= {name: part for name, part in parts.items() if name in fields}
    name = getattr(cls, "name", "")
    return checker.config(config_type, held, ("trainer",), type=name)


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
    *,
    any_choice: bool = False,
) -> tuple[dict[str, Part], dict[str, list[Group]]]:
    """Checks the Trainer's components.

    Args:
        sections: the recipe's value of each slot that it fills.
        slots: the slots of the trainer's class.
        counted: arguments of a schedule that the builder gives if the recipe does not.
        checker: checks components, and collects the mistakes.
        any_choice: whether a slot with choices takes any other class of its kind as well.

    Returns:
        The components by slot, and the parameter groups by the optimizer's name.
    """
    parts: dict[str, Part] = {}
    groups: dict[str, list[Group]] = {}
    defaults = {
        name: {}
        for name, slot in slots.items()
        if slot.choices and not slot.optional and name not in sections
    }
    for name, node in {**sections, **defaults}.items():
        kind = kind_of(name, slots[name].base)
        if slots[name].choices:
            part = _check_choice(name, node, kind, slots[name], any_choice, checker)
        elif slots[name].is_list:
            part = _check_list(name, node, kind, checker)
        else:
            part = _check_single(name, node, kind, slots[name], counted, groups, checker)
        if part is not None:
            parts[name] = part
    for slot, needs in _NAMED.items():
        if needs is not None and slot in sections and not slots[slot].choices:
            _check_names(sections, slot, needs, checker)
    return parts, groups


def _check_choice(
    name: str, node: Any, kind: Kind, slot: Slot, any_choice: bool, checker: Checker
) -> Component | None:
    """A component of one of a slot's classes, by default of the first."""
    if not isinstance(node, Mapping):
        checker.mistakes.add((name,), f"expected a mapping of settings, got {node!r}")
        return None
    if not is_component(node):
        arguments, _ = arguments_of(node)
        return checker.call(slot.choices[0], arguments, (name,), kind)
    component = checker.component(node, kind, (name,))
    if component is None or any_choice or component.target in slot.choices:
        return component
    known = ", ".join(getattr(one, "name", "") or one.__qualname__ for one in slot.choices)
    key = "_target_" if "_target_" in node else "type"
    text = f"{node[key]!r} is none of those that this trainer takes: {known}."
    checker.mistakes.add(
        (name, key), f"{text} `trainer.skip_validation: true` takes it all the same."
    )
    return None


def _check_single(
    slot: str,
    node: Any,
    kind: Kind,
    declared: Slot,
    counted: Collection[str],
    groups: dict[str, list[Group]],
    checker: Checker,
) -> Part | None:
    """One component, or several by name; an optimizer's groups join `groups`."""
    given = _GIVEN.get(slot, declared.given)
    filled = counted if slot == "lr_scheduler" else ()
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
    if slot == "loggers":
        items = [(n, {"type": item} if isinstance(item, str) else item) for n, item in items]
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


def check_settings(
    schema: Schema, checker: Checker
) -> tuple[dict[str, Any], tuple[Component, ...]]:
    """Checks `parallel:` and `checkpoint:`.

    Args:
        schema: the recipe's top level.
        checker: checks components, and collects the mistakes.

    Returns:
        The settings that the recipe gives, by key; and the engines that `checkpoint:` lists besides
        the one that resumes.
    """
    found: dict[str, Any] = {}
    exporters: tuple[Component, ...] = ()
    if schema.parallel:
        found["parallel"] = settings(Parallel, schema.parallel, ("parallel",), checker)
    node = schema.checkpoint
    if isinstance(node, list):
        found["checkpoint"], exporters = _check_engines(node, checker)
    elif node is None or node is False:
        found["checkpoint"] = None
    elif not isinstance(node, Mapping):
        text = f"expected a mapping, a list of engines, or null for no checkpoints, got {node!r}"
        checker.mistakes.add(("checkpoint",), text)
    elif node:
        found["checkpoint"] = _check_policy(node, ("checkpoint",), checker)
    return found, exporters


def _check_engines(
    nodes: list[Any], checker: Checker
) -> tuple[CheckpointPolicy | None, tuple[Component, ...]]:
    """A list of engines: at most one that a run resumes from, and others that save models."""
    resuming, exporters = [], []
    for i, node in enumerate(nodes):
        path = ("checkpoint", str(i))
        name = node.get("type") if isinstance(node, Mapping) else None
        if not isinstance(name, str):
            checker.mistakes.add(path, f"expected an engine with its `type:`, got {node!r}")
            continue
        name = NATIVE if name == "paceline" else name
        if name in registry.names(ENGINES):
            engine = {key: value for key, value in node.items() if key != "type"}
            resuming.append((path, {**engine, "engine": name}))
            continue
        engines = KINDS["checkpoint"]
        if name not in registry.names("checkpoint"):
            known = ["paceline", *registry.names("checkpoint"), *registry.names(ENGINES)]
            text = f"no checkpoint engine is registered as {name!r}{suggestion(name, known)}"
            checker.mistakes.add((*path, "type"), text)
        elif component := checker.component(node, engines, path):
            exporters.append(component)
    for path, _ in resuming[1:]:
        text = "a run resumes from one engine, and the list has one already: take one of them out."
        checker.mistakes.add(path, text)
    policy = _check_policy(resuming[0][1], resuming[0][0], checker) if resuming else None
    return policy, tuple(exporters)


def _check_policy(node: Mapping[str, Any], path: Path, checker: Checker) -> CheckpointPolicy | None:
    node = dict(node)
    _name_ours(node, CheckpointPolicy, path, checker)
    policy = settings(CheckpointPolicy, node, path, checker)
    if policy is not None:
        try:
            engine_class(policy.engine)
        except ConfigError as error:
            checker.mistakes.add((*path, "engine"), str(error))
    return policy


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
