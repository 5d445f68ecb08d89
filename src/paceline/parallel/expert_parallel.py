"""Expert parallelism: a mixture's experts shared out over ranks that see samples of their own.

A module of experts holds each of its parameters for all experts, [experts, ...], and is called with
rows sorted by expert and how many there are for each. Shared out, each rank keeps the parameters of
some experts, and the module works on the rows of all ranks for these. All other modules are data
parallel over the same ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils.stateless import _reparametrize_module

from paceline.errors import ConfigError, DataError
from paceline.parallel.blocks import outermost, planned_modules
from paceline.parallel.expert_dispatch import dispatch
from paceline.world.dtensors import local_part
from paceline.world.world import World


def expert_modules(model: torch.nn.Module, name: str, world: World) -> dict[str, torch.nn.Module]:
    """The modules of experts in a model, by name, as `parallel.plan` or its `ep_plan` says.

    Args:
        model: a model that is not spread yet.
        name: its name, for messages.
        world: the ranks.

    Raises:
        ConfigError: nothing says which they are, or one of them cannot be shared out.
    """
    plan = world.parallel.plan
    if plan is None:
        plan = getattr(model, "ep_plan", None)
    elif world.parallel.tensor > 1:  # of which the other entries speak
        plan = {pattern: style for pattern, style in plan.items() if style == "experts"}
    if not plan:
        raise ConfigError(
            f"parallel.expert={world.parallel.expert}: nothing says which modules of {name!r} hold "
            "experts: give parallel.plan (module name -> 'experts'), or the model a dictionary "
            "ep_plan."
        )
    found: dict[str, torch.nn.Module] = {}
    for pattern, style in plan.items():
        if style != "experts":
            raise ConfigError(
                f"parallel.plan[{pattern!r}] is {style!r}: with parallel.expert it is 'experts'."
            )
        found |= planned_modules(model, name, pattern)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for key, module in (found := outermost(found)).items():
        _check(key, module, uses, world)
    return found


def _check(name: str, module: torch.nn.Module, uses: Counter[int], world: World) -> None:
    parameters = {f"{name}.{key}": p for key, p in module.named_parameters()}
    counts = {p.shape[0] if p.dim() else 0 for p in parameters.values()}
    shapes = ", ".join(f"{key} {list(p.shape)}" for key, p in parameters.items())
    if len(counts) != 1 or any(True for _ in module.buffers()):
        raise ConfigError(
            f"parallel.plan: {name!r} cannot be shared out by experts: all it holds has to be "
            f"parameters of the shape [experts, ...]. There are {shapes or 'none'}, and "
            f"{sum(1 for _ in module.buffers())} buffers."
        )
    tied = [key for key, p in parameters.items() if uses[id(p)] > 1]
    if tied:
        raise ConfigError(
            f"parallel.plan: {', '.join(tied)} is found in more than one place of the model: "
            "experts that are shared out need parameters of their own."
        )
    size, (count,) = world.parallel.expert, counts
    if count % size:
        raise ConfigError(
            f"parallel.expert={size} does not divide the {count} experts of {name!r}: {shapes}."
        )


def distribute_experts(module: torch.nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Leaves each rank its part of a module's experts, and has it called with all ranks' rows.

    Args:
        module: as `expert_modules` finds it, with equal values on all ranks; changed in place.
        name: its name, for messages.
        mesh: the ranks.
    """
    for part in module.modules():
        for key, whole in list(part._parameters.items()):
            if whole is not None:
                mine = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
                part.register_parameter(key, torch.nn.Parameter(mine, whole.requires_grad))
    vars(module)["forward"] = partial(_call, module, name, module.forward, mesh)
    # A compiled block leaves this call be: how many rows come is another number each time.
    module._compiled_call_impl = torch.compiler.disable(module._call_impl)


def _call(
    module: torch.nn.Module,
    name: str,
    forward: Callable[..., torch.Tensor],
    mesh: DeviceMesh,
    *call: Any,
    **named: Any,
) -> torch.Tensor:
    """What the experts of all ranks make of this rank's rows."""
    if len(call) != 2 or named:
        raise DataError(
            f"{name!r} is called with {len(call) + len(named)} arguments: experts that are shared "
            f"out are called as {name.rpartition('.')[2]}(rows, rows for each expert)."
        )
    try:
        rows, counts, combine = dispatch(*call, mesh)
    except DataError as error:
        raise DataError(f"{name!r}: {error}") from None
    parameters = {key: _of_mean(p, mesh.size()) for key, p in module.named_parameters()}
    with _reparametrize_module(module, parameters):
        if len(rows):
            return combine(forward(rows, counts))
        # One row all the same: nobody's experts were made for none, and the backward pass has to
        # come by here, as the other ranks wait for it.
        rows = torch.cat([rows, rows.new_ones(1, *rows.shape[1:])])
        counts = torch.cat([counts[:1] + 1, counts[1:]])
        return combine(forward(rows, counts)[:0])


def _of_mean(parameter: torch.Tensor, ranks: int) -> torch.Tensor:
    """This rank's part of a parameter, whose gradient becomes that of the mean over the ranks.

    Its rows come from all of them, so that it is their sum; other parameters' are averaged.
    """
    mine = local_part(parameter)
    if mine.requires_grad:
        mine.register_hook(lambda gradient: gradient / ranks)
    return mine


def shard_dimension(module: torch.nn.Module, name: str, shards: int) -> int:
    """The dimension along which FSDP2 shards a rank's experts: 1 where they are too few for 0.

    Args:
        module: after `distribute_experts`.
        name: its name, for messages.
        shards: ranks with the same experts, over which these are sharded.

    Raises:
        ConfigError: neither can be divided.
    """
    shapes = [local_part(p).shape for p in module.parameters()]
    for dimension in (0, 1):
        if all(len(s) > dimension and s[dimension] % shards == 0 for s in shapes):
            return dimension
    raise ConfigError(
        f"parallel.dp_shard: each rank's {shapes[0][0]} experts of {name!r} are sharded over "
        f"{shards} ranks, and neither their number nor the second dimension of their parameters "
        f"({', '.join(str(list(s)) for s in shapes)}) can be divided by it."
    )
