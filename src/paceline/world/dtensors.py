"""DTensors, met or not: what works on a tensor that may be spread over processes.

Importing torch's DTensor takes longer than all of ours, and nobody who has not made that import
holds one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.nn.utils import get_total_norm


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, gathered by all its processes; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process holds, spread as `like` is; nothing is exchanged.

    Args:
        value: the whole, equal on all processes; a DTensor is returned as it is.
        like: a DTensor of the same shape, or any other tensor, for which `value` stays whole.
    """
    if not is_dtensor(like) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def placed_like(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Wraps a local tensor in a DTensor with the placements of another; nothing is exchanged.

    Args:
        part: this process's part, of the shape of `like`'s own.
        like: a DTensor, or any other tensor, for which `part` is returned as it is.
    """
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    # from_local would move the part to the mesh's device; only the placement is wanted.
    return DTensor(part, like._spec, requires_grad=False)


@torch.no_grad()
def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is spread as the tensor is, and has no gradient; nothing is exchanged."""
    return placed_like(local_part(tensor).detach().clone(), tensor)


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """`target.copy_(value)` for tensors that may be spread over processes.

    Args:
        target: what is written, in place.
        value: of the same shape; a whole tensor is one that every process holds.
    """
    value = spread_like(value, target)
    if is_dtensor(target) and _spread_alike(target, value):  # torch would plan each shape first
        target, value = local_part(target), local_part(value)
    target.detach().copy_(value)


def _spread_alike(one: Any, other: Any) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def respread(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Redistributes a gradient to the placements of its parameter, since torch does not.

    For example, the gradient of a sharded embedding is whole on each process.

    Args:
        gradient: a DTensor, or any other tensor, which is returned as it is.
        parameter: of the same shape.
    """
    if not is_dtensor(gradient):
        return gradient
    return gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def reshard(models: Iterable[torch.nn.Module]) -> None:
    """Drops what FSDP2 has gathered for a call: parameters are sharded again, and up to date."""
    for model in models:
        for module in model.modules():
            if callable(drop := getattr(module, "reshard", None)):
                drop()


_planned_for: Any = None  # the meshes that operations may be planned for


def forget_other_meshes(meshes: Iterable[Any]) -> None:
    """Drops torch's plans of operations if they were made for groups that these meshes do not have.

    Groups of a run that is over are gone. A mesh that equals one of its meshes finds the plans for
    that one, which name its groups; those of runs in one layout have the same names.

    Args:
        meshes: those of the run that begins.
    """
    global _planned_for
    names = [[group.group_name for group in mesh.get_all_groups()] for mesh in meshes]
    if names != _planned_for and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    _planned_for = names


def by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors that one operation can take together: whole ones, and DTensors of each mesh."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


def total_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector, as `torch.nn.utils.get_total_norm` takes it."""
    norms = [whole(get_total_norm(g)) for g in by_mesh(t for t in gradients if t is not None)]
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[torch.Tensor],
    max_norm: float,
    norm_of: Callable[[Iterable[torch.Tensor | None]], torch.Tensor] = total_norm,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also for parameters of several meshes.

    Args:
        parameters: of any shapes; their gradients are scaled in place.
        max_norm: the largest norm to keep.
        norm_of: computes the norm of all gradients, a 0-dim tensor.

    Returns:
        The norm before clipping, a 0-dim tensor on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = norm_of(gradients)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if gradients:
        # Part by part: for DTensors torch would first plan the product, anew in each process.
        parts = [local_part(gradient) for gradient in gradients]
        torch._foreach_mul_(parts, factor.to(parts[0].device))  # pyright: ignore[reportPrivateImportUsage]
    return norm


@contextmanager
def groups_by_mesh(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While it lasts, no parameter group has whole parameters and DTensors, or those of two meshes.

    Fused and foreach steps take a group's parameters together.
    """
    groups = optimizer.param_groups
    parts = [[{**g, "params": part} for part in by_mesh(g["params"]) or [[]]] for g in groups]
    optimizer.param_groups = list(chain.from_iterable(parts))
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, (first, *_) in zip(groups, parts, strict=True):
            # What some optimizers count by group.
            group.update({key: value for key, value in first.items() if key != "params"})
