"""Outlines: what models were before they were spread, without their values.

A spread model stays spread after its run, when the run's process groups are gone: it computes
nothing any more, and cannot be spread once more. So an outline of it is kept, a copy whose
parameters and buffers have no memory. To evaluate the model later, a copy of its outline is placed,
which takes the values from it, each rank its own part: nothing is exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from paceline.errors import ConfigError
from paceline.parallel.blocks import outermost
from paceline.parallel.pipeline_stages import is_given_up, tensors_of
from paceline.world.dtensors import copied, copy_into, is_dtensor, reshard, spread_alike

_PLAIN = (bool, int, float, str, type(None), np.ndarray)
_OF_EVERY_MODULE = vars(torch.nn.Module()).keys() - {"training"}
_INSTEAD = (
    "To evaluate the run, make a new Trainer with a new model, and give it the run's run_dir."
)

# Of each module of a model that has been spread; or why there is none.
_outlines: WeakKeyDictionary[torch.nn.Module, torch.nn.Module | Exception] = WeakKeyDictionary()


def keep_outlines(models: Iterable[torch.nn.Module]) -> None:
    """Keeps the outlines of models that are about to be spread, as long as the models are there.

    Args:
        models: whole, as their owner made them.
    """
    models = [model for model in models if not is_spread(model)]
    parts = [part for model in models for part in model.modules()]
    try:
        outlines = _without_values(models)
    except Exception as error:  # noqa: BLE001  of a part of the user's own; `_outline` shows it
        _outlines.update(dict.fromkeys(parts, error))
    else:
        of_parts = [part for outline in outlines for part in outline.modules()]
        _outlines.update(zip(parts, of_parts, strict=True))


def copies_to_place(
    held: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, tuple[torch.nn.Module, torch.nn.Module]]]:
    """Copies of models, made to be placed; of those that are spread, copies of the outline.

    Args:
        held: modules, or dictionaries of them, which may share parts.

    Returns:
        The same with copies in their place; and by name each model that is spread, with its copy,
        which has no values yet.

    Raises:
        ConfigError: a model that is spread has no outline.
    """
    found = outermost({name: model for name, model in _modules(held) if is_spread(model)})
    outlines = _without_values([_outline(model, name) for name, model in found.items()])
    pairs = {
        name: (model, outline)
        for (name, model), outline in zip(found.items(), outlines, strict=True)
    }
    memo: dict[int, Any] = {}
    for model, outline in pairs.values():
        names = dict(outline.named_modules())
        memo |= {id(part): names[key] for key, part in model.named_modules() if key in names}
    return copy.deepcopy(dict(held), memo), pairs


@torch.no_grad()
def take_over(source: torch.nn.Module, target: torch.nn.Module, name: str) -> None:
    """Gives a model what another one has now: values, buffers, and what its modules keep as data.

    Objects that are neither numbers, text, tensors, arrays nor containers of these stay as they
    are.

    Args:
        source: a model, placed in an earlier run or in this one.
        target: placed in the same way.
        name: of both, for messages.

    Raises:
        ConfigError: they have other parts, or lie on the ranks in other ways.
    """
    reshard((source, target))
    theirs, mine = dict(source.named_modules()), dict(target.named_modules())
    if changed := sorted(theirs.keys() ^ mine.keys()):
        raise ConfigError(
            f"{name}.{changed[0]}: training has added or removed it, which is not part of the "
            f"model that was made. {_INSTEAD}"
        )
    for key, part in theirs.items():
        path = f"{name}.{key}" if key else name
        _take_parameters(part, mine[key], path)
        _take_buffers(part, mine[key], path)
        for attribute, value in vars(part).items():
            if attribute not in _OF_EVERY_MODULE and _is_data(value):
                vars(mine[key])[attribute] = copy.deepcopy(value)


def is_spread(model: torch.nn.Module) -> bool:
    """Whether the ranks share the model's values out.

    Args:
        model: whole, or after it was placed.
    """
    return any(is_dtensor(tensor) or is_given_up(tensor) for tensor in tensors_of(model))


def is_outlined(tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to an outline or its copy, which takes its values over later.

    Args:
        tensor: a parameter or buffer.
    """
    return getattr(tensor, "outlined", False)


def _modules(held: Mapping[str, Any]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, value in held.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def _outline(model: torch.nn.Module, name: str) -> torch.nn.Module:
    outline = _outlines.get(model)
    if outline is None:
        raise ConfigError(f"{name} is spread over ranks, though not by a Trainer. {_INSTEAD}")
    if isinstance(outline, Exception):
        raise ConfigError(
            f"{name} is spread over the ranks since it was trained, and could not be copied before "
            f"({type(outline).__name__}: {outline}). {_INSTEAD}"
        )
    return outline


def _without_values(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Copies of models whose parameters and buffers are on the meta device; shared parts stay so.

    Attributes that users have set on parameters come along.
    """
    empty = {id(tensor): _empty(tensor) for model in models for tensor in tensors_of(model)}
    return copy.deepcopy(models, empty)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(empty).update(vars(tensor), outlined=True)
    return empty


def _take_parameters(source: torch.nn.Module, target: torch.nn.Module, path: str) -> None:
    for key in source._parameters.keys() | target._parameters.keys():
        theirs, mine = source._parameters.get(key), target._parameters.get(key)
        if theirs is None and mine is None:
            continue
        if theirs is None or mine is None or theirs.shape != mine.shape:
            raise ConfigError(f"{path}.{key}: training has changed its shape. {_INSTEAD}")
        _take(theirs, mine, f"{path}.{key}")


def _take_buffers(source: torch.nn.Module, target: torch.nn.Module, path: str) -> None:
    for key in target._buffers.keys() - source._buffers.keys():
        del target._buffers[key]
    for key, theirs in source._buffers.items():
        mine = target._buffers.get(key)
        if theirs is None:
            target.register_buffer(key, None)
        elif mine is not None and (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype):
            _take(theirs, mine, f"{path}.{key}")
        else:  # training has made it, or made it larger
            persistent = key not in source._non_persistent_buffers_set
            target.register_buffer(key, copied(theirs), persistent=persistent)


def _take(theirs: torch.Tensor, mine: torch.Tensor, path: str) -> None:
    apart = is_dtensor(theirs) and not (is_dtensor(mine) and spread_alike(theirs, mine))
    if apart or theirs.is_meta != mine.is_meta:
        raise ConfigError(
            f"{path} is spread over the ranks as it was in training, and parallel=... says another "
            f"layout now: leave it as it was. {_INSTEAD}"
        )
    if not mine.is_meta:  # else it is of another stage
        copy_into(mine, theirs)


def _is_data(value: Any) -> bool:
    return all(
        isinstance(leaf, _PLAIN)
        or (isinstance(leaf, torch.Tensor) and not leaf.is_meta and not is_dtensor(leaf))
        for leaf in tree_leaves(value)
    )
