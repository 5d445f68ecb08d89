"""Operations on tensors that may be DTensors, without importing torch's DTensor.

That import takes longer than all of Paceline's, and a process that has not done it has no DTensor.
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
    """Whether a tensor is distributed over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a DTensor, all-gathered; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Distributes a full tensor like another one, without communication.

    Args:
        value: a full tensor, equal on all processes; a DTensor is returned as it is.
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
    # from_local would move the part to the mesh's device.
    return DTensor(part, like._spec, requires_grad=False)


@torch.no_grad()
def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy without a gradient, distributed like the tensor; made without communication."""
    return placed_like(local_part(tensor).detach().clone(), tensor)


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """`target.copy_(value)` for tensors that may be DTensors.

    Args:
        target: the tensor to write to, in place.
        value: of the same shape; a full tensor has to be equal on all processes.
    """
    value = spread_like(value, target)
    if is_dtensor(target) and spread_alike(target, value):  # torch would plan each shape first
        target, value = local_part(target), local_part(value)
    target.detach().copy_(value)


def spread_alike(one: Any, other: Any) -> bool:
    """Whether two DTensors lie on the same ranks in the same way.

    Args:
        one, other: DTensors.
    """
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
    """Frees the parameters that FSDP2 has gathered, so that they are sharded and up to date."""
    for model in models:
        for module in model.modules():
            if callable(drop := getattr(module, "reshard", None)):
                drop()


_planned_for: Any = None  # the meshes that operations may be planned for


def forget_other_meshes(meshes: Iterable[Any]) -> None:
    """Clears torch's cached sharding plans if they were made for process groups of other meshes.

    The process groups of an earlier run no longer exist. A mesh that equals one of its meshes would
    find the cached plans of that mesh, which name its groups; in runs of one layout the names are
    the same.

    Args:
        meshes: the meshes of the new run.
    """
    global _planned_for
    names = [[group.group_name for group in mesh.get_all_groups()] for mesh in meshes]
    if names != _planned_for and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    _planned_for = names


def by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Groups tensors that one operation can take together: plain ones, and DTensors by mesh."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(mesh, []).append(tensor)
    return list(groups.values())


def dense_part(gradient: torch.Tensor) -> torch.Tensor:
    """The values of a sparse gradient, each index once; any other gradient as it is."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def total_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector, like `torch.nn.utils.get_total_norm`."""
    dense = (dense_part(gradient) for gradient in gradients if gradient is not None)
    norms = [whole(get_total_norm(group)) for group in by_mesh(dense)]
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
    gradients: list[torch.Tensor] = []
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            if gradient.is_sparse:  # an index may be in it more than once
                parameter.grad = gradient = gradient.coalesce()
            gradients.append(dense_part(gradient))
    norm = norm_of(gradients)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if gradients:
        # On local tensors: for DTensors torch would first plan the product, in each process.
        parts = [local_part(gradient) for gradient in gradients]
        torch._foreach_mul_(parts, factor.to(parts[0].device))  # pyright: ignore[reportPrivateImportUsage]
    return norm


@contextmanager
def groups_by_mesh(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which no parameter group mixes plain tensors and DTensors, or two meshes.

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
            # Some optimizers count steps in their groups.
            group.update({key: value for key, value in first.items() if key != "params"})
