"""SWA is the plain mean of the weights it has taken, and of no others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from fake_trainer import FakeTrainer
from real_runs import build
from torch import nn

from builders import loader
from paceline.callbacks import SWA
from paceline.checkpoint.export import export
from paceline.errors import CheckpointError, ConfigError
from paceline.log.run_record import read_run
from paceline.testing import StopAt, bits
from small import batches, line


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("swa", "taken"),
    [
        (SWA(3), [3, 4, 5, 6, 7, 8, 9]),
        (SWA(4, 3), [4, 7]),
        (SWA(1, unit="epoch"), [3, 6, 9]),  # epochs of 3 steps
        (SWA(2, 2, unit="epoch"), [6]),
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


def test_epochs_of_unknown_length_cannot_be_counted() -> None:
    from paceline import Trainer
    from small import settings

    class Stream:
        def __iter__(self):
            return iter(batches())

    made = settings(model=line(), train_dataloader=Stream(), callbacks=[SWA(1, unit="epoch")])
    with pytest.raises(ConfigError, match="count steps"):
        Trainer(**made).train()


@pytest.mark.parametrize(
    "wrong", [{"start": 0}, {"start": 1, "every": 0}, {"start": 1, "unit": ""}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="SWA"):
        SWA(**wrong)
