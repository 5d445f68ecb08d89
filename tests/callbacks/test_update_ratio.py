"""UpdateRatio measures what a step does to the weights, on steps with a row only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_trainer import FakeTrainer
from real_runs import build
from torch import nn

from paceline import Callback
from paceline.callbacks import UpdateRatio
from paceline.errors import ConfigError
from paceline.testing import rows


def flat(parameters: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def ratios(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("update_ratio")}


def test_it_is_the_change_over_the_weights() -> None:
    trainer = FakeTrainer(UpdateRatio(), log_every=2).start().step()
    assert ratios(trainer.row) == {}
    before = {i: flat(trainer.model[i].parameters()) for i in (0, 2, 3)}
    trainer.step()
    expected = {
        f"update_ratio/{i}": float((flat(trainer.model[i].parameters()) - old).norm() / old.norm())
        for i, old in before.items()
    }
    assert ratios(trainer.row) == pytest.approx(expected, rel=1e-5)


def test_groups_have_a_ratio_each() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "name": "body"}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    trainer = FakeTrainer(UpdateRatio(per="group"), model=model, optimizers={"o": optimizer})
    trainer.start().step()
    before = flat(model[1].parameters())
    found = ratios(trainer.step().row)
    assert list(found) == ["update_ratio/body", "update_ratio/1"]
    change = flat(model[1].parameters()) - before
    assert found["update_ratio/1"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)


def test_weights_without_size_have_no_ratio() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[1].weight)
    trainer = FakeTrainer(
        UpdateRatio(),
        model=model,
        optimizers={"o": torch.optim.SGD(model.parameters(), lr=0.1)},
        log_every=1,
    )
    assert ratios(trainer.start().step().row) == {"update_ratio/0": 0.0}
    model[1].weight.data.fill_(1.0)
    assert list(ratios(trainer.step().row)) == ["update_ratio/0", "update_ratio/1"]


def test_half_precision_is_measured_in_full() -> None:
    model = nn.Linear(3, 1).bfloat16()
    callback = UpdateRatio()
    trainer = FakeTrainer(callback, model=model, log_every=1)
    trainer.start()
    model.weight.grad = torch.ones_like(model.weight)
    trainer.fire("on_before_optimizer_step", torch.optim.SGD([model.weight], lr=0.1))
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(0.01)
    row: dict[str, Any] = {"step": 1}
    trainer.fire("on_step_end", row)
    change = flat([model.weight]) - flat([before])
    expected = float(change.norm() / flat([before]).norm())
    assert list(ratios(row).values()) == pytest.approx([expected], rel=1e-3)


class Copies(Callback):
    """How many weights the callback holds a copy of, within each step."""

    def __init__(self, watched: UpdateRatio) -> None:
        self.watched = watched
        self.held: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        self.held.append(len(self.watched._before))


@pytest.mark.parametrize("every", [1, 4])
def test_weights_are_copied_on_steps_with_a_row_only(every: int, tmp_path: Path) -> None:
    callback = UpdateRatio(every)
    copies = Copies(callback)
    build(tmp_path, callback, copies, log_every=2).train(seed=5)
    due = [step % 2 == 0 and step % every == 0 for step in range(1, 13)]
    assert copies.held == [4 if each else 0 for each in due]
    assert callback._before == {}
    measured = [row["step"] for row in rows(tmp_path) if ratios(row)]
    assert measured == [step for step, each in enumerate(due, start=1) if each]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"per": "tensor"}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="UpdateRatio"):
        UpdateRatio(**wrong)
