"""Leaves each rank with its stage of a model: where it is cut, what is kept, who shares what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.parallel.blocks import repeated_blocks
from paceline.parallel.ddp import Synchronizer
from paceline.parallel.fsdp import StageShards
from paceline.parallel.materialize import Materializer
from paceline.parallel.pipeline_parallel import Pipeline
from paceline.parallel.pipeline_stages import give_up, is_given_up, stages_of, tensors_of
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World, send


@dataclass(frozen=True)
class Staged:
    """A model that is cut into stages.

    Attributes:
        pipeline: runs them.
        replicas: what keeps the copies of this rank's stage equal, or its parts together.
        renewed: what became of each parameter that was sharded, by the `id` of what it was.
        plan: which layers each stage has, a line each.
        put_back: gives the model its own `forward` again.
    """

    pipeline: Pipeline
    replicas: list[Synchronizer]
    renewed: dict[int, torch.nn.Parameter]
    plan: list[str]
    put_back: Callable[[], None]


def place_stages(
    model: torch.nn.Module,
    name: str,
    materialize: Materializer,
    world: World,
    compute: torch.dtype | None,
    kept_whole: Iterable[torch.nn.Module] = (),
) -> Staged:
    """Leaves this rank with the weights of its stage, and the model with the pipeline's forward.

    Args:
        model: whole; what is of other stages loses its memory.
        name: the model's name, for messages.
        materialize: gives parts of the model memory, if they have none yet.
        world: the ranks.
        compute: the dtype in which sharded parameters are gathered; None for their own.
        kept_whole: blocks that are recomputed or compiled, which is done where they are called.

    Raises:
        ConfigError: the model cannot be cut, or is cut already.
    """
    if any(is_given_up(tensor) for tensor in tensors_of(model)):
        raise ConfigError(
            f"the model {name!r} is cut already, by an earlier run: make a new Trainer with a new "
            "model and optimizer, which resumes if run_dir is the earlier run's."
        )
    uncut = repeated_blocks(model) if world.shards > 1 else list(kept_whole)
    stages = stages_of(model, name, world.parallel.pipeline, uncut)
    held = [{id(t): t for layer in s.values() for t in tensors_of(layer)} for s in stages]
    pipeline = Pipeline(model, name, stages[world.stage].values(), world)
    mine = held[world.stage]
    renewed: dict[int, Any] = {}
    replicas: list[Synchronizer] = []
    if world.shards == world.parallel.tensor == 1:
        _take_part(model, mine, materialize, world.device)
        if (replica := pipeline.replicate()) is not None:
            replicas.append(replica)
    else:
        shards = StageShards(pipeline.module, model, name, world, compute)
        _take_part(model, mine, materialize, world.device, shards.take_block)
        shards.take_all()
        pipeline.share(shards)
        replicas.append(shards)
        renewed = shards.renewed
    pipeline.shared = _shared(world, held, renewed)
    own = vars(model).get("forward")
    model.forward = pipeline.forward
    ends = [([*layers][:1] + [*layers][1:][-1:]) for layers in stages]
    return Staged(
        pipeline,
        replicas,
        renewed,
        plan=[f"stage {i} of {name}: {' to '.join(ends[i])}" for i in range(len(stages))],
        put_back=partial(_put_back, model, own),
    )


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
        taken: is called with each block.
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
