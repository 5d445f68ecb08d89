"""Averages and gradient norms of weights sharded over two ranks are those of whole ones."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from fake_trainer import FakeTrainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from paceline.callbacks import AveragedWeights, GradientMonitor
from paceline.testing import Ranks


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in tensors.items()}


@torch.no_grad()
def look(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def play() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 1))
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trainers, averages, seen = [], [], []
    for model in (plain, sharded):
        ema, optimizer = AveragedWeights(0.9), torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = FakeTrainer(ema, GradientMonitor(), model=model, optimizers={"o": optimizer})
        x = torch.linspace(-1, 1, 12).reshape(4, 3)
        trainer.while_validating = lambda model=model, x=x: seen.append(look(model, x))
        trainers.append(trainer.start().step(3).validate().step(3).validate())
        averages.append(ema)
    for mine, theirs in zip(trainers[1].norms, trainers[0].norms, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(seen[4:], seen[:4])
    torch.testing.assert_close(whole(sharded.state_dict()), dict(plain.state_dict()))
    exported = whole(averages[1].averaged_state_dict())
    torch.testing.assert_close(exported, averages[0].averaged_state_dict())
    dist.destroy_process_group()


def test_sharded_weights_are_averaged_and_measured_like_whole_ones(ranks: Ranks) -> None:
    """The second validation and the steps between tell whether gathered weights were dropped."""
    ranks(play, 2)
