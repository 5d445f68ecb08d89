"""What a recipe says of its components, for a resumed run to find unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from paceline.log.secrets import is_credential
from paceline.recipe.components import Component, signature_of
from paceline.recipe.interpolation import expanded, resolvers_in
from paceline.recipe.parts import each
from paceline.recipe.recipe import Recipe
from paceline.recipe.typed import Config
from paceline.trainer.arguments import flattened, kind_of
from paceline.trainer.slots import TRAINER_SLOTS
from paceline.trainer.trainer import Trainer

# Compared as they were set or found: the optimizers' and schedules' classes, the loss's kind.
_KNOWN = ("optimizer", "lr_scheduler", "loss_fn")
_FREE = ("callbacks", "loggers")
# A loader's settings that change no sample, or that the run's own settings include.
_OF_LOADERS = {
    *("batch_size", "num_workers", "pin_memory", "pin_memory_device", "persistent_workers"),
    *("prefetch_factor", "timeout", "multiprocessing_context", "in_order", "shuffle", "drop_last"),
}
_NO_DEFAULT = object()
_SIMPLE = bool | int | float | str | None


def identity_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The arguments of a recipe's components by section, each by its dotted key in the recipe.

    What a resolver looks up outside the recipe (`${oc.env:DATA}`) counts as it is written.

    Args:
        recipe: the checked recipe.
    """
    tree = recipe.composed.tree()
    config = recipe.config
    defaults = {} if config is None else _defaults(type(config))
    free = _trainer_arguments() | (frozenset() if config is None else config.all_free())
    settings = {
        f"trainer.{name}": value
        for name, value in recipe.trainer.kwargs.items()
        if name not in free and not _is_default(name, value, defaults)
    }
    found = {"trainer": _settled(settings, tree)}
    for slot, part in recipe.parts.items():
        if slot in _FREE:
            continue
        keys: dict[str, Any] = {}
        for _, component in each(part):
            keys |= _of_component(component, is_known=slot in _KNOWN)
        found[slot] = _settled(keys, tree)
    return found


def targets_of(recipe: Recipe) -> tuple[Callable[..., Any], ...]:
    """The classes and functions that a recipe names for what a resumed run must find unchanged."""
    found: list[Callable[..., Any]] = [recipe.trainer.target]
    for slot, part in recipe.parts.items():
        if slot not in _FREE:
            found += [one.target for _, top in each(part) for one in _components(top)]
    return tuple(found)


def _trainer_arguments() -> set[str]:
    import inspect

    return {*inspect.signature(Trainer.__init__).parameters, *TRAINER_SLOTS}


def _of_component(component: Component, *, is_known: bool = False) -> dict[str, Any]:
    prefix = ".".join(component.path)
    keys = {} if is_known else {prefix: kind_of(component.target)}
    target = component.target
    is_loader = isinstance(target, type) and issubclass(target, DataLoader)
    values = dict(component.kwargs)
    values |= {f"_args_.{i}": value for i, value in enumerate(component.args)}
    if component.config is None:
        defaults = signature_of(target).defaults
        free = _OF_LOADERS if is_loader else ()
    else:
        config_type = type(component.config)
        defaults = _defaults(config_type)
        free = config_type.all_free()
    for name, value in values.items():
        # To say what is the default is no change.
        if _is_default(name, value, defaults) or name in free:
            continue
        keys |= _of_value(f"{prefix}.{name}", value)
    return keys


def _defaults(config_type: type[Config]) -> dict[str, Any]:
    return {name: field.default for name, field in config_type.model_fields.items()}


def _is_default(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    default = defaults.get(name, _NO_DEFAULT)
    return type(value) is type(default) and isinstance(value, _SIMPLE) and value == default


def _of_value(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Component):
        return _of_component(value)
    items: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping):
        items = value
    elif isinstance(value, list) and any(isinstance(item, Component | Mapping) for item in value):
        items = dict(enumerate(value))
    if items is None:
        prefix, _, name = key.rpartition(".")
        return {} if is_credential(name) else flattened(prefix, {name: value})
    keys: dict[str, Any] = {}
    for name, item in items.items():
        keys |= _of_value(f"{key}.{name}", item)
    return keys


def _components(component: Component) -> Iterator[Component]:
    yield component
    left = [*component.args, *component.kwargs.values()]
    while left:
        value = left.pop()
        if isinstance(value, Component):
            yield from _components(value)
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value


def _settled(keys: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, with the text of those whose values are looked up outside the recipe."""
    found = {}
    for key, value in keys.items():
        text = expanded(tree, key.split("."))
        found[key] = text if resolvers_in(text) else value
    return found
