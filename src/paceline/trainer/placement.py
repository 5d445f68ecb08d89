"""Puts a trainer's components in place: checks, devices, compilation, replicas."""

from __future__ import annotations

from collections.abc import Set
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from paceline.checkpoint.state import parameter_names
from paceline.errors import ConfigError
from paceline.trainer.blocks import outermost
from paceline.trainer.ddp import Replica, replicate
from paceline.trainer.materialize import Materializer
from paceline.world.context import ring_attention
from paceline.world.world import World, send

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def components(holder: object, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The attributes of `holder` of a kind, by name; a dictionary of them counts by its keys."""
    found: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name.startswith("_"):
            continue
        if isinstance(value, kind):
            named = {name: value}
        elif isinstance(value, dict) and all(isinstance(v, kind) for v in value.values()):
            named = value
        else:
            continue
        twice = [key for key in named if key in found]
        if twice:
            raise ConfigError(f"two components are called {twice[0]!r}: rename one of them.")
        found.update(named)
    return found


def place(trainer: Trainer) -> None:
    """Moves every module to the device, compiles it if asked, and spreads it over the ranks."""
    if trainer.parallel.tensor > 1:
        from torch.distributed.tensor.parallel import loss_parallel

        trainer.while_placed.enter_context(loss_parallel())  # of logits whose classes are split
    if trainer.parallel.rings:
        trainer.while_placed.enter_context(ring_attention())
    mine = {id(m): n for n, m in outermost(components(trainer, torch.nn.Module)).items()}
    placed: dict[int, torch.nn.Module] = {}

    def put(module: Any) -> Any:
        if id(module) in mine and id(module) not in placed:
            placed[id(module)] = _placed(trainer, module, mine[id(module)])
        return placed.get(id(module), module)

    for name, value in list(vars(trainer).items()):
        if isinstance(value, torch.nn.Module):
            setattr(trainer, name, put(value))
        elif isinstance(value, dict):
            value.update({key: put(v) for key, v in value.items() if id(v) in mine})


def take_back(trainer: Trainer) -> None:
    """Leaves the user with their own modules, after a run. A spread one stays spread."""
    for name, value in list(vars(trainer).items()):
        if isinstance(value, Replica):
            setattr(trainer, name, value.module)
        elif isinstance(value, dict):
            for key, module in value.items():
                if isinstance(module, Replica):
                    value[key] = module.module
    trainer.while_placed.close()
    if trainer.float8 is not None and not trainer.parallel.is_spread:
        trainer.float8.take_back()
    trainer.recomputed, trainer.compiled, trainer.replicas = [], [], []


def _placed(trainer: Trainer, module: torch.nn.Module, name: str) -> torch.nn.Module:
    if isinstance(module, DistributedDataParallel) and not isinstance(module, Replica):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel already: give the module itself; "
            "parallel=Parallel(...) decides how it is spread."
        )
    materializer = Materializer(module, name, trainer.device, trainer.seed)
    trained = any(p.requires_grad for p in module.parameters())
    staged = trained and trainer.parallel.pipeline > 1
    if not materializer.needed and not staged:
        module.to(trainer.device)
    if trainer.float8 is not None and trained:
        trainer.float8.convert(module, name)
    if trained and trainer.parallel.expert > 1:
        # The exchange of rows breaks graphs, which nothing that is repeated within one may do.
        _compile(trainer, module, name, staged=staged)
        _recompute(trainer, module, name)
    else:
        if trained:
            _recompute(trainer, module, name)
        _compile(trainer, module, name, staged=staged)
    for part in {*trainer.recomputed, *trainer.compiled}:
        trainer.while_placed.callback(vars(part).pop, "forward", None)
    if staged:
        from paceline.trainer.stage_placement import place_stages

        trainer.pipeline = place_stages(trainer, module, name, materializer)
        return module
    if trained and trainer.parallel.is_spread:
        return _spread(trainer, module, name, materializer)
    materializer.all()
    if trainer.world.size == 1:
        return module
    if not trained:
        send(chain(module.parameters(), module.buffers()))  # as DDP does with what it replicates
        return module
    return _replicate(trainer, module)


def _recompute(trainer: Trainer, module: torch.nn.Module, name: str) -> None:
    which = trainer.parallel.activation_checkpointing
    if isinstance(which, str):
        from paceline.trainer.recompute import recompute_blocks

        trainer.recomputed += recompute_blocks(module, name, which)


def _compile(trainer: Trainer, module: torch.nn.Module, name: str, *, staged: bool) -> None:
    trained = any(p.requires_grad for p in module.parameters())
    if trainer.compile is True and not (trained and trainer.parallel.is_spread):
        module.compile()
    elif trainer.compile:
        from paceline.trainer.compilation import compile_blocks

        trainer.compiled += compile_blocks(module, name, trainer.compile, staged=staged)


def _replicate(trainer: Trainer, module: torch.nn.Module, group: Any = None) -> Replica:
    whole_way = trainer.parallel.context > 1
    replica = replicate(module, trainer.device, whole_way=whole_way, group=group)
    trainer.replicas.append(replica)
    return replica


def _spread(
    trainer: Trainer, module: torch.nn.Module, name: str, materialize: Materializer
) -> torch.nn.Module:
    from paceline.trainer.sharding import Shards, follow

    calls, compute = trainer.validation_calls, trainer.autocast_dtype
    shards = Shards(module, name, trainer.world, calls, compute, materialize)
    follow(trainer.named_optimizers().values(), shards.renewed)
    trainer.replicas.append(shards)
    return module


def check_spread(trainer: Trainer, optimizer: torch.optim.Optimizer, covered: Set[int]) -> None:
    """Refuses to step parameters whose gradient is this rank's alone: the ranks would part ways.

    Args:
        trainer: whose models give the names.
        optimizer: about to step.
        covered: the `id` of each parameter that replicas take care of.

    Raises:
        ConfigError: naming them.
    """
    alone = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and id(parameter) not in covered
    ]
    if not alone:
        return
    known = parameter_names(trainer.named_models())
    optimizer_name = trainer.get_name_by_optimizer(optimizer)
    names = [known.get(id(p), f"a parameter of {optimizer_name!r}") for p in alone]
    raise ConfigError(
        f"only this rank has the gradient of {', '.join(names[:8])}"
        f"{f' and {len(names) - 8} more' * (len(names) > 8)}: what is trained was made, or set to "
        "require a gradient, after the models were placed. Make it in configure(); what is to be "
        "trained later starts as trainable, in a group whose lr is 0 until then."
    )


def share_buffers(trainer: Trainer) -> None:
    """Gives every rank rank 0's buffers, as DDP does before the next forward pass anyway.

    Of a model in stages, every copy of a stage gets the first one's.
    """
    if trainer.world.size == 1:
        return
    if trainer.pipeline is not None:
        return trainer.pipeline.share_buffers()
    send(chain.from_iterable(model.buffers() for model in trainer.named_models().values()))


def layout(world: World) -> str:
    """How the models lie over the ranks, as a line of the plan."""
    sizes = ("tensor", "context", "expert", "pipeline")
    tensor, context, expert, stages = (getattr(world.parallel, name) for name in sizes)
    if world.shards == tensor == context == expert == stages == 1:
        return f"replicated over {world.size} ranks by DDP"
    ways = [f"cut into {stages} stages"] * (stages > 1)
    ways += [f"split over {tensor} ranks by its plan"] * (tensor > 1)
    ring = ", with attention by torch's ring" * world.parallel.rings
    ways += [f"given sequences in {context} parts{ring}"] * (context > 1)
    ways += [f"with its experts shared out over {expert} ranks"] * (expert > 1)
    ways += [f"sharded over {world.shards} ranks by FSDP2"] * (world.shards > 1)
    copies = "" if world.copies == 1 else f", in {world.copies} copies"
    return ", ".join(ways) + copies
