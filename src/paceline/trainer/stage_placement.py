"""Leaves each rank with its stage of a model: where it is cut, what is kept, who shares what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError
from paceline.trainer.blocks import repeated_blocks
from paceline.trainer.materialize import Materializer
from paceline.trainer.pipeline import Pipeline
from paceline.trainer.sharding import StageShards, follow
from paceline.trainer.stages import give_up, is_given_up, stages_of, tensors_of
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World, send

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def place_stages(
    trainer: Trainer, model: torch.nn.Module, name: str, materialize: Materializer
) -> Pipeline:
    """Leaves this rank with the weights of its stage, and the model with the pipeline's forward.

    Args:
        trainer: whose model it is.
        model: whole; what is of other stages loses its memory.
        name: the model's name, for messages.
        materialize: gives parts of the model memory, if they have none yet.

    Raises:
        ConfigError: the model cannot be cut, is cut already, or is not the only one.
    """
    world = trainer.world
    if trainer.pipeline is not None:
        raise ConfigError("parallel.pipeline: several trained models do not exist yet beside it.")
    if any(is_given_up(tensor) for tensor in tensors_of(model)):
        raise ConfigError(f"the model {name!r} is cut already, by an earlier run: build it anew.")
    stages = stages_of(model, name, world.parallel.pipeline, _kept_whole(trainer, model))
    held = [{id(t): t for layer in s.values() for t in tensors_of(layer)} for s in stages]
    pipeline = Pipeline(trainer, model, stages[world.stage].values())
    mine = held[world.stage]
    renewed: dict[int, Any] = {}
    if world.shards == world.parallel.tensor == 1:
        _take_part(model, mine, materialize, trainer.device)
        pipeline.replicate()
    else:
        shards = StageShards(pipeline.module, model, name, world, trainer.autocast_dtype)
        _take_part(model, mine, materialize, trainer.device, shards.take_block)
        shards.take_all()
        pipeline.share(shards)
        follow(trainer.named_optimizers().values(), renewed := shards.renewed)
    pipeline.shared = _shared(world, held, renewed)
    own = vars(model).get("forward")
    model.forward = pipeline.forward
    trainer.while_placed.callback(_put_back, model, own)
    for i, layers in enumerate(stages):
        ends = [*layers][:1] + [*layers][1:][-1:]
        trainer.plan.add(f"stage {i} of {name}: {' to '.join(ends)}", "parallel.pipeline")
    return pipeline


def _kept_whole(trainer: Trainer, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that are sharded, recomputed or compiled, which is done where they are called."""
    if trainer.world.shards > 1:
        return repeated_blocks(model)
    return [*trainer.recomputed, *trainer.compiled]


def _take_part(
    model: torch.nn.Module,
    mine: dict[int, Any],
    materialize: Materializer,
    device: torch.device,
    taken: Callable[[torch.nn.Module], None] = lambda unit: None,
) -> None:
    """Block by block: memory, the first rank's values, and nothing of it kept that is not ours.

    Args:
        model: whole.
        mine: what is ours, by `id`.
        materialize: gives a block memory.
        device: where that is.
        taken: is told of each block.
    """
    seen: set[int] = set()
    for unit in (*repeated_blocks(model), model):
        materialize(unit)
        whole = (t for t in tensors_of(unit) if not is_dtensor(t))
        fresh = {id(t): t for t in whole if id(t) not in seen and not t.is_meta}
        for tensor in fresh.values():
            tensor.data = tensor.data.to(device)
        send(tensor.detach() for tensor in fresh.values())  # a group may keep what it was given
        for key, tensor in fresh.items():
            if key not in mine:
                give_up(tensor)
        seen |= fresh.keys()
        taken(unit)


def _shared(
    world: World, held: list[dict[int, torch.Tensor]], renewed: dict[int, Any]
) -> list[tuple[torch.nn.Parameter, Any, bool]]:
    """The parameters of this rank's stage that others have too; see `Pipeline`."""
    groups: dict[tuple[int, ...], Any] = {}
    found = []
    for key, tensor in {key: t for tensors in held for key, t in tensors.items()}.items():
        stages = tuple(i for i, tensors in enumerate(held) if key in tensors)
        if len(stages) == 1 or not isinstance(tensor, torch.nn.Parameter):
            continue
        if stages not in groups:
            groups[stages] = world.group_of_stages(stages)
        if world.stage in stages:
            found.append((renewed.get(key, tensor), groups[stages], world.stage == stages[0]))
    return found


def _put_back(model: torch.nn.Module, own: Any) -> None:
    vars(model).pop("forward", None)
    if own is not None:
        model.forward = own
