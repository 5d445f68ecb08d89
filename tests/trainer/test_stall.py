"""A run that hangs says where each of its ranks is, before the collective that waits gives up."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Outcome, Ranks
from paceline.trainer import error_context, stall, stop
from paceline.world.world import World

TIMEOUT = 4.0


class Hanging(Trainer):
    """Rank 1 does something else in its third step, or its second validation batch."""

    how = ""

    def on_train_start(self) -> None:
        self.pids = self.world.all_gather_object(os.getpid())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.world.rank == 1 and self.global_step == 2:
            if self.how == "sleeps":
                time.sleep(60)
            if self.how == "is slow":
                time.sleep(0.8 * TIMEOUT)
            if self.how == "is stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.how == "exchanges alone" and self.world.rank == 1 and batch_idx == 1:
            self.world.barrier()
        super().validation_step(batch, batch_idx)


def hang(how: str) -> None:
    stop._PEER_GRACE = 0.5
    stall._STILL, stall._ANSWERS = 0.5, 0.4  # time to answer on a busy machine
    model = nn.Linear(2, 1)
    data = TensorDataset(torch.ones(24, 2), torch.ones(24, 1))
    trainer = Hanging(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(data, 2),
        val_dataloader=DataLoader(data, 2),
        validate_every=2,
        max_steps=4,
        parallel=Parallel(timeout=TIMEOUT),
        progress=False,
    )
    trainer.how = how
    try:
        trainer.train(seed=0)
    finally:
        if how == "is stopped":
            os.kill(trainer.pids[1], signal.SIGKILL)


def reports(outcomes: list[Outcome]) -> list[str]:
    """Each report that a rank has printed: its first line and one for each place."""
    output = "".join(outcome.output for outcome in outcomes)
    return re.findall(r"^paceline: rank \d has made no progress.*\n(?:  .*\n)+", output, flags=re.M)


def test_a_hang_is_reported_with_what_each_rank_was_doing(ranks: Ranks) -> None:
    """Given a rank that sleeps in its training_step while the other waits for its gradients, when
    they have for almost as long as a collective may, then one of them says where both are."""
    outcomes = ranks.outcomes(hang, 2, "sleeps")
    *_, report = reports(outcomes)
    first, *places = report.splitlines()
    assert first.endswith("a collective may wait for 4 s (parallel.timeout). Where the ranks are:")
    waits, sleeps = sorted(places)
    assert re.match(r"  rank 0: step 3, batch 2 of epoch 0: .*\.backward \(\w+\.py:\d+\) > ", waits)
    assert re.fullmatch(
        r"  rank 1: step 3, batch 2 of epoch 0: .* > Hanging.training_step \(test_stall.py:\d+\)",
        sleeps,
    )
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "Timed out" in outcomes[0].output
    assert "PeerError: step 3, batch 2 of epoch 0: rank 0 has waited in a col" in outcomes[0].output
    assert max(outcome.seconds for outcome in outcomes) < 30


def test_ranks_that_wait_for_different_things_are_told_apart(ranks: Ranks) -> None:
    """Given a rank that waits in a validation batch for others that never come to it."""
    *_, report = reports(ranks.outcomes(hang, 2, "exchanges alone"))
    assert re.search(
        r"rank 0: the validation after step 2: .* > World.all_gather_object \(world.py:\d+\) > ",
        report,
    ), report
    assert re.search(r"rank 1: .*Hanging.validation_step .* > World.barrier .* > barrier", report)


def test_a_rank_that_cannot_answer_is_named(ranks: Ranks) -> None:
    *_, report = reports(ranks.outcomes(hang, 2, "is stopped", limit=25))
    assert "\n  rank 1: does not answer\n" in report


def test_a_long_step_is_reported_once_and_the_run_goes_on(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(hang, 2, "is slow")
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert len([each for each in reports(outcomes) if "rank 1: step 3" in each]) == 1


def timeouts(shard: int) -> list[float]:
    world = World(Parallel(dp_shard=shard, timeout=77)).open()
    assert world.mesh is not None
    groups = [
        dist.group.WORLD,
        world.control_group,
        world.new_group(),
        *world.mesh.get_all_groups(),
    ]
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    world.close()
    return [each / timedelta(seconds=1) for each in found]


def test_one_timeout_is_that_of_every_collective(ranks: Ranks) -> None:
    for found in ranks(timeouts, 4, 2):
        assert set(found) == {77.0}


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_a_time(timeout: float) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.timeout"):
        Parallel(timeout=timeout)


def test_a_rank_that_has_waited_says_which_models_it_has_called() -> None:
    """Given two models and a rank that has called one of them, when the others never come."""
    models = {"gen": nn.Linear(2, 1), "disc": nn.Linear(2, 1)}
    replicas = [
        SimpleNamespace(module=model, called=name == "gen") for name, model in models.items()
    ]
    trainer: Any = SimpleNamespace(named_models=lambda: models)
    run: Any = SimpleNamespace(placement=SimpleNamespace(replicas=replicas))
    assert "this one has called gen, and not disc." in error_context._called(trainer, run)
