"""Parts of a model: its repeated blocks, which are sharded, compiled and recomputed one by one, and
the modules that an entry of a plan names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from paceline.errors import ConfigError


def repeated_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a model that are sharded, compiled and recomputed one by one.

    Those are the children of its outermost `ModuleList`, `ModuleDict` and `Sequential` containers
    whose class is there more than once and whose parameters nobody else uses. In place of a child
    without a `forward`, such as a list within a list, its own children are taken.
    """
    uses = _uses(module)
    blocks = []
    for container in _containers(module):
        children = list(_called_children(container))
        classes = Counter(map(type, children))
        for child in children:
            own = _uses(child)
            if classes[type(child)] > 1 and own and all(uses[p] == n for p, n in own.items()):
                blocks.append(child)
    return blocks


def planned_modules(model: torch.nn.Module, name: str, pattern: str) -> dict[str, torch.nn.Module]:
    """The modules that an entry of `parallel.plan` means, by their names within the model.

    Args:
        model: the model.
        name: its name, for messages.
        pattern: a module's name, in which "*" stands for anything.

    Raises:
        ConfigError: there is none.
    """
    meant = {key: part for key, part in model.named_modules() if fnmatchcase(key, pattern)}
    if not meant:
        raise ConfigError(f"parallel.plan: {name!r} has no module {pattern!r}.")
    return meant


def needed_blocks(module: torch.nn.Module, name: str, setting: str) -> list[torch.nn.Module]:
    """The same for a setting that cannot do without.

    Args:
        module: the model.
        name: its name, for messages.
        setting: what needs them, as the user gave it.

    Raises:
        ConfigError: there are none.
    """
    if blocks := repeated_blocks(module):
        return blocks
    raise ConfigError(
        f"{setting}: the model {name!r} has no repeated blocks: put them into a ModuleList, "
        "ModuleDict or Sequential."
    )


def outermost(modules: dict[str, Any]) -> dict[str, Any]:
    """Without modules that are part of another one, or the same as one before."""
    known = {id(part) for m in modules.values() for part in m.modules() if part is not m}
    found: dict[str, Any] = {}
    for name, module in modules.items():
        if id(module) not in known:
            known.add(id(module))
            found[name] = module
    return found


def _uses(module: torch.nn.Module) -> Counter[int]:
    """How often each parameter is found, by its `id`; a module in two places counts twice."""
    parts = module.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, part in parts for p in part._parameters.values() if p is not None)


def _containers(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    for child in (module,) if _holds_blocks(module) else module.children():
        if _holds_blocks(child):
            yield child
        else:
            yield from _containers(child)


def _called_children(container: torch.nn.Module) -> Iterable[torch.nn.Module]:
    for child in container.children():
        if "forward" in vars(child) or type(child).forward is not torch.nn.Module.forward:
            yield child
        else:
            yield from _called_children(child)


def _holds_blocks(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict | torch.nn.Sequential)
