"""Tensor parallelism: modules split over ranks that work on the same samples.

torch's ParallelStyles do the splitting. Whatever no style takes stays whole on every rank of a
split, and has to come by the same gradient on each: `check_whole_gradients` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from paceline.errors import ConfigError
from paceline.parallel.blocks import planned_modules
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World

_GATHERED = partial(ColwiseParallel, output_layouts=Replicate())
_OF_MATRICES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": _GATHERED,
    "colwise_loss": partial(ColwiseParallel, output_layouts=Shard(-1), use_local_output=False),
    # as plans of Hugging Face Transformers call them:
    "colwise_gather_output": _GATHERED,
    "embedding_rowwise": RowwiseParallel,
}
_OF_NORMS = {  # likewise; of what a norm gets, any dimension but the last may be the split one
    "replicated_with_grad_allreduce": partial(
        SequenceParallel, sequence_dim=-2, use_local_output=True
    ),
}


def split_modules(model: torch.nn.Module, name: str, world: World) -> None:
    """Splits a model's modules over the ranks of the mesh's "tensor" dimension, in place.

    How is said by `parallel.plan`, else by the model: its method `parallelize(mesh)`, or the
    dictionary `tp_plan`, which models of Hugging Face Transformers have.

    Args:
        model: a model with equal weights on all ranks.
        name: its name, for messages.
        world: the ranks.

    Raises:
        ConfigError: nothing says how, the plan does not fit the model, or a size does not divide.
    """
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    plan, ties = world.parallel.plan, _ties(model)
    if plan is None and callable(own := getattr(model, "parallelize", None)):
        own(mesh)
    else:
        plan = getattr(model, "tp_plan", None) if plan is None else plan
        if plan and world.parallel.expert > 1:
            plan = {pattern: style for pattern, style in plan.items() if style != "experts"}
        if not plan:
            raise ConfigError(
                f"parallel.tensor={mesh.size()}: nothing says how the model {name!r} splits: give "
                "parallel.plan (module name -> 'colwise' or 'rowwise'), or the model a method "
                "parallelize(mesh)."
            )
        parallelize_module(model, mesh, _styles(plan, model, name))
    _tie_again(model, ties, name)
    split = {key: p for key, p in model.named_parameters() if is_dtensor(p)}
    if not split:
        raise ConfigError(f"parallel.tensor={mesh.size()}: no parameter of {name!r} was split.")
    uneven = [
        f"{key} {list(p.shape)}"
        for key, p in split.items()
        for placement in p.placements  # type: ignore[attr-defined]
        if placement.is_shard() and p.shape[placement.dim] % mesh.size()
    ]
    if uneven:
        raise ConfigError(
            f"parallel.tensor={mesh.size()} does not divide the sizes of {', '.join(uneven)} "
            f"of {name!r} along the dimension that is split."
        )


def _ties(model: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    return [tied for tied in names.values() if len(tied) > 1]


def _tie_again(model: torch.nn.Module, ties: list[list[str]], name: str) -> None:
    """Makes one again of what the styles have split in the same way, each for itself.

    Raises:
        ConfigError: they were split in different ways, or only some of them.
    """
    for first, *others in ties:
        one: Any = model.get_parameter(first)
        for key in others:
            other: Any = model.get_parameter(key)
            if other is one:
                continue
            if getattr(other, "placements", None) != getattr(one, "placements", None):
                raise ConfigError(
                    f"parallel.plan: {first} and {key} of {name!r} are one parameter, so they "
                    "have to be split along the same dimension, or neither of them."
                )
            path, _, attribute = key.rpartition(".")
            setattr(model.get_submodule(path), attribute, one)


def _styles(plan: dict[str, Any], model: torch.nn.Module, name: str) -> dict[str, ParallelStyle]:
    """The plan in torch's own styles.

    Raises:
        ConfigError: an entry is no style, or no module has its name.
    """
    styles: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        meant = planned_modules(model, name, pattern)
        if isinstance(style, str) and style in _OF_NORMS:
            style = _OF_NORMS[style]()
        elif isinstance(style, str) and style in _OF_MATRICES:
            for key, part in meant.items():
                if not isinstance(part, torch.nn.Linear | torch.nn.Embedding):
                    raise ConfigError(
                        f"parallel.plan: {style!r} does not fit the {type(part).__name__} {key!r}, "
                        "which is no Linear and no Embedding."
                    )
            style = _OF_MATRICES[style](**_inputs(style, meant.values()))
        if not isinstance(style, ParallelStyle):
            raise ConfigError(
                f"parallel.plan[{pattern!r}] is {style!r}: expected "
                f"{', '.join(_OF_MATRICES | _OF_NORMS)} or a "
                "torch.distributed.tensor.parallel.ParallelStyle."
            )
        styles[pattern] = style
    return styles


def _inputs(style: str, parts: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """A Linear split by its rows takes split features; an Embedding, the same tokens on all."""
    by_rows = _OF_MATRICES[style] is RowwiseParallel
    whole = by_rows and any(isinstance(part, torch.nn.Embedding) for part in parts)
    return {"input_layouts": Replicate()} if whole else {}


def check_whole_gradients(models: Mapping[str, torch.nn.Module], world: World) -> None:
    """Compares the gradients of parameters that no style splits, before the first step.

    Args:
        models: by name, with gradients.
        world: the ranks.

    Raises:
        ConfigError: the ranks of a tensor-parallel group have different gradients for some, since
            each saw only its part of the computation; the message names these parameters.
    """
    wholes = {
        f"{model_name}.{name}": p.grad
        for model_name, model in models.items()
        for name, p in model.named_parameters()
        if p.grad is not None and not _is_split(p)
    }
    sums = [_checksum(gradient) for gradient in wholes.values()]
    everywhere = world.all_gather_object(sums)
    size = world.parallel.tensor
    mine = everywhere[world.rank // size * size : (world.rank // size + 1) * size]
    apart = [
        name
        for name, *found in zip(wholes, *mine, strict=True)
        if any(abs(each - found[0]) > 1e-4 * abs(found[0]) for each in found)
    ]
    if any(everywhere := world.all_gather_object(apart)):
        names = sorted({name for found in everywhere for name in found})
        raise ConfigError(
            f"parallel.tensor={size}: the ranks have different gradients of {', '.join(names)}, "
            "which no entry of the plan covers: each sees the part of the computation between "
            "split modules that is its own. Add an entry for the module (torch's SequenceParallel, "
            "or a style of your own), or gather what it works on."
        )


def _is_split(parameter: torch.Tensor) -> bool:
    if not is_dtensor(parameter):
        return False
    return "tensor" in (parameter.device_mesh.mesh_dim_names or ())  # type: ignore[attr-defined]


def _checksum(gradient: torch.Tensor) -> float:
    local: Any = gradient.to_local() if is_dtensor(gradient) else gradient  # type: ignore
    return local.double().norm().item()
