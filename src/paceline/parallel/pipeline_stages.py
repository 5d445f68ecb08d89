"""How a model is cut into stages: the modules that compute it in turn, and which stage has which.

Every rank has the whole model, so that names, optimizers and checkpoints are those of one process.
What is of other stages stays on the meta device, where it has a shape and no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any

import torch

from paceline.errors import ConfigError


def layers_of(
    model: torch.nn.Module, name: str, uncut: Iterable[torch.nn.Module] = ()
) -> dict[str, torch.nn.Module]:
    """The modules that compute a model, each from what the one before it gives, by name.

    Those are the children of a `Sequential`, or what a model's `pipeline_order` names: modules of
    its own, in order. Either may hold further `Sequential`s, or `ModuleList`s of what comes in
    turn.

    Args:
        model: a `Sequential`, or a module with `pipeline_order`.
        name: its name, for messages.
        uncut: parts of it that are one layer each, or belong to one.

    Raises:
        ConfigError: nothing says the order, a name is no module's, or something is left out.
    """
    uncut = list(uncut)
    in_order = list(_in_order(model, "", {id(part) for part in uncut}))
    layers = dict(in_order)
    if len(layers) < len(in_order):
        raise ConfigError(f"pipeline_order of {name!r} names a module twice: {', '.join(layers)}.")
    if not layers or "" in layers:
        raise ConfigError(
            f"parallel.pipeline: nothing says in which order the modules of {name!r} compute it: "
            "make it a Sequential, or give it pipeline_order, the names of modules of which each "
            "works on what the one before it gives."
        )
    reached = {id(t) for layer in layers.values() for t in tensors_of(layer)}
    named = chain(model.named_parameters(), model.named_buffers())
    if left := [key for key, tensor in named if id(tensor) not in reached]:
        raise ConfigError(
            f"parallel.pipeline: {', '.join(left)} of {name!r} belong to none of the modules that "
            f"compute it: {', '.join(layers)}."
        )
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    if any(id(part) not in inside for part in uncut):
        raise ConfigError(
            f"parallel.pipeline: pipeline_order names parts of the repeated blocks of {name!r}, "
            "which are sharded, recomputed or compiled as they are called: name the blocks."
        )
    return layers


def _in_order(
    module: torch.nn.Module, path: str, uncut: Set[int]
) -> Iterator[tuple[str, torch.nn.Module]]:
    order: Iterable[str]
    if id(module) in uncut:
        yield path, module
        return
    if (given := getattr(module, "pipeline_order", None)) is not None:
        order = tuple(given)
    elif isinstance(module, torch.nn.ModuleList) or (
        isinstance(module, torch.nn.Sequential)
        and type(module).forward is torch.nn.Sequential.forward
    ):
        order = module._modules
    else:
        yield path, module
        return
    for key in order:
        try:
            part = module.get_submodule(key)
        except AttributeError as error:
            raise ConfigError(f"pipeline_order of {type(module).__name__}: {error}.") from None
        yield from _in_order(part, f"{path}.{key}".lstrip("."), uncut)


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def balanced(weights: Sequence[int], stages: int) -> list[range]:
    """Cuts a sequence into runs of which the heaviest weighs as little as can be.

    Args:
        weights: of each element, 0 or more.
        stages: number of runs, at most as many as elements; each gets one at least.

    Returns:
        The indices of each run, in order.
    """
    before = (0, *accumulate(weights))

    @cache
    def best(start: int, runs: int) -> tuple[int, int]:
        """The weight of the heaviest run from `start` on, and where the first of them ends."""
        if runs == 1:
            return before[-1] - before[start], len(weights)
        return min(
            (max(before[end] - before[start], best(end, runs - 1)[0]), end)
            for end in range(start + 1, len(weights) - runs + 2)
        )

    cuts = [0]
    for left in range(stages, 0, -1):
        cuts.append(best(cuts[-1], left)[1])
    return [range(*pair) for pair in pairwise(cuts)]


def stages_of(
    model: torch.nn.Module, name: str, stages: int, uncut: Iterable[torch.nn.Module] = ()
) -> list[dict[str, torch.nn.Module]]:
    """The layers of each stage, cut so that the one with most parameters has as few as can be.

    Args:
        model: as for `layers_of`.
        name: its name, for messages.
        stages: number of them.
        uncut: parts of it that are in one stage each.

    Raises:
        ConfigError: there are more stages than layers, or the layers are not known.
    """
    layers = layers_of(model, name, uncut)
    if len(layers) < stages:
        raise ConfigError(
            f"parallel.pipeline={stages}: {name!r} has {len(layers)} layers to share out, "
            f"{', '.join(layers)}, and each stage needs one at least."
        )
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers.values()]
    items = list(layers.items())
    return [dict(items[i] for i in run) for run in balanced(weights, stages)]


@torch.no_grad()
def give_up(tensor: torch.Tensor) -> None:
    """Leaves a parameter or buffer its shape, and no memory; it stays the object that it is."""
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(empty).update(vars(tensor), given_up=True)
    torch.utils.swap_tensors(tensor, empty)


@contextmanager
def given_up_kept(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what was given up of a model, should modules have other tensors in its place."""
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (own, key, tensor)
        for part in model.modules()
        for own in (part._parameters, part._buffers)
        for key, tensor in own.items()
        if tensor is not None and is_given_up(tensor)
    ]
    yield
    for own, key, tensor in kept:
        own[key] = tensor


def is_given_up(tensor: torch.Tensor) -> bool:
    """Whether `give_up` has left the tensor without its values."""
    return getattr(tensor, "given_up", False)
