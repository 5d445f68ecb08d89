"""SWA is the plain mean of the weights it has taken, and of no others."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_trainer import FakeTrainer
from real_runs import build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import loader
from paceline import Trainer
from paceline.callbacks import SWA
from paceline.checkpoint.export import export
from paceline.errors import CheckpointError, ConfigError
from paceline.log.run_record import read_run
from paceline.testing import StopAt, bits


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("swa", "taken"),
    [
        (SWA(3), [3, 4, 5, 6, 7, 8, 9]),
        (SWA(4, 3), [4, 7]),
    ],
)
def test_the_average_is_the_mean_of_the_weights_at_those_steps(swa: SWA, taken: list[int]) -> None:
    swa = copy.deepcopy(swa)
    trainer = FakeTrainer(swa).start()
    history = {step: weights(trainer.step().model) for step in range(1, 10)}
    for name, average in swa.averaged_state_dict().items():
        if name in history[1]:
            mean = torch.stack([history[step][name].double() for step in taken]).mean(0)
            torch.testing.assert_close(average.double(), mean, rtol=1e-6, atol=1e-7)
    assert swa.state_dict()["updates"] == len(taken)


def test_before_the_first_the_trained_weights_are_validated() -> None:
    swa = SWA(4)
    trainer = FakeTrainer(swa).start().step(3)
    trained = bits(trainer.model.state_dict())
    trainer.while_validating = lambda: seen.append(bits(trainer.model.state_dict()))
    seen: list = []
    trainer.validate()
    assert seen[0] == bits(swa.averaged_state_dict()) == trained
    trainer.step(2).validate()
    assert seen[-1] == bits(swa.averaged_state_dict()) != bits(trainer.model.state_dict())


def test_before_the_first_there_is_nothing_to_export(tmp_path: Path) -> None:
    """The weights that the run began with are no average."""
    build(tmp_path, SWA(8), StopAt(5)).train(seed=5)
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        export(tmp_path, weights="averaged")
    build(tmp_path, SWA(8)).train(seed=5)
    assert export(tmp_path, weights="averaged")


def test_statistics_that_are_not_the_averages_are_in_the_plan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1))
    swa = SWA(2)
    trainer = build(tmp_path, swa)
    trainer.model = model
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.lr_scheduler = None
    trainer.train(seed=1)
    decisions = [line["decision"] for line in read_run(tmp_path)["plan"]]
    assert "the average is validated with the BatchNorm statistics of the trained weights" in (
        decisions
    )
    # What the docstring advises, in a model of which no run depends.
    model.load_state_dict(swa.averaged_state_dict())
    data = torch.randn(64, 8) + 3
    torch.optim.swa_utils.update_bn(loader([(row,) for row in data], 64), model)  # pyright: ignore
    torch.testing.assert_close(model[0].running_mean, data.mean(0))


class OwnLengths:
    """Passes of 4, 3, 5 and 3 batches of the same twelve samples."""

    def __init__(self) -> None:
        self.passes = 0

    def set_epoch(self, epoch: int) -> None:
        self.passes = epoch

    def __iter__(self) -> Iterator[list[int]]:
        number = (4, 3, 5, 3)[self.passes]
        cuts = [round(12 * k / number) for k in range(number + 1)]
        return iter([list(range(a, b)) for a, b in itertools.pairwise(cuts)])


class Streamed(OwnLengths):
    """The same batches as a stream, whose length nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(POINTS[rows], ROWS[rows]) for rows in super().__iter__()])


POINTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
ROWS = POINTS.sum(1, keepdim=True)


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_epochs_end_where_their_pass_over_the_data_does(
    streamed: bool, validates: bool, tmp_path: Path
) -> None:
    """Given epochs that end at steps 4, 7, 12 and 15, the mean is that of the weights there."""
    torch.manual_seed(0)
    hand = nn.Linear(4, 1)
    given = copy.deepcopy(hand.state_dict())
    sgd, sampler = torch.optim.SGD(hand.parameters(), lr=0.05), OwnLengths()
    taken: list[torch.Tensor] = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for rows in sampler:
            sgd.zero_grad()
            nn.functional.mse_loss(hand(POINTS[rows]), ROWS[rows]).backward()
            sgd.step()
        taken.append(hand.weight.detach().clone())

    def run(*stops: Any) -> tuple[SWA, Any, nn.Linear]:
        model, swa = nn.Linear(4, 1), SWA(start=2, unit="epoch")
        model.load_state_dict(given)
        data = TensorDataset(POINTS, ROWS)
        loader: Any = Streamed() if streamed else DataLoader(data, batch_sampler=OwnLengths())  # pyright: ignore[reportArgumentType]
        trainer = Trainer(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            loss_fn=nn.functional.mse_loss, train_dataloader=loader, epochs=4, progress=False,
            val_dataloader=[(POINTS, ROWS)] if validates else None, callbacks=[swa, *stops],
            run_dir=tmp_path,
        )  # fmt: skip
        return swa, trainer.train(seed=0), model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stream is read again
        run(StopAt(7))
        swa, result, model = run()
    assert result.global_step == 15
    assert torch.equal(model.weight, hand.weight)
    mean = torch.stack(taken[1:]).mean(0)
    torch.testing.assert_close(swa.averaged_state_dict()["weight"], mean)
    if validates:
        bias = swa.averaged_state_dict()["bias"]
        loss = nn.functional.mse_loss(POINTS @ mean.T + bias, ROWS)
        assert result.metrics["val/loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize(
    "wrong", [{"start": 0}, {"start": 1, "every": 0}, {"start": 1, "unit": ""}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="SWA"):
        SWA(**wrong)
