"""GradientExplosion warns of the steps it should, with norms that are taken once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import STEPS, build

from paceline import Callback
from paceline.callbacks import GradientExplosion, GradientMonitor, gradient_explosion
from paceline.errors import ConfigError
from paceline.testing import rows
from small import step_rows


class Explode(Callback):
    """Makes the gradients of chosen steps a hundred times larger; keeps every norm."""

    priority = 1

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        for gradient in gradients:
            gradient *= 100 if trainer.global_step + 1 in self.steps else 1
        self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))


def usual(**changes: Any) -> GradientExplosion:
    return GradientExplosion(**{"factor": 10.0, "window": 6, "warmup": 4, **changes})


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "gradient norm" in line]


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_it_warns_of_the_step_with_its_norm_and_the_usual_one(
    clipped: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    explode = Explode(7)
    build(None, explode, usual(), max_grad_norm=clipped).train(seed=5)
    (line,) = warnings(capsys)
    median = sorted(explode.norms[:6])[2:4]
    assert f"of step 7 was {explode.norms[6]:.4g}, " in line
    assert line.endswith(f"times the usual {sum(median) / 2:.4g}.")


def test_the_worst_step_since_the_row_before_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    build(None, Explode(7, 8), usual(), log_every=4).train(seed=5)
    assert len(warnings(capsys)) == 1


def test_an_ordinary_run_and_a_run_that_starts_wildly_are_not_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(None, usual()).train(seed=5)
    build(None, Explode(2), usual()).train(seed=5)
    assert warnings(capsys) == []


def test_outliers_do_not_become_usual(capsys: pytest.CaptureFixture[str]) -> None:
    build(None, Explode(6, 8, 10), usual()).train(seed=5)
    assert len(warnings(capsys)) == 3


def test_rows_have_the_largest_norm_since_the_row_before(tmp_path: Path) -> None:
    explode = Explode(7)
    build(tmp_path, explode, usual(), log_every=3, val_dataloader=None).train(seed=5)
    largest = [row["grad_norm/max"] for row in step_rows(tmp_path)]
    norms = explode.norms
    assert largest == pytest.approx([max(norms[i : i + 3]) for i in range(0, STEPS, 3)])


@pytest.mark.parametrize("other", [{"max_grad_norm": 1.0}, {"callbacks": [GradientMonitor()]}])
def test_a_norm_that_is_there_is_not_taken_again(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gradient_explosion, "norm_of_all_stages", lambda *_: 1 / 0)
    more = other.pop("callbacks", [])
    build(tmp_path, usual(), *more, **other).train(seed=5)
    first = rows(tmp_path)[0]
    assert first["grad_norm/max"] >= first["grad_norm"] > 0


def test_a_norm_that_is_not_finite_is_no_usual_norm(tmp_path: Path) -> None:
    """The policy drops that step; the callback goes on with the others."""

    class Break(Callback):
        priority = 1

        def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                trainer.model[3].bias.grad.fill_(torch.inf)

    explosion = usual(window=20)
    build(tmp_path, Break(), explosion, on_nonfinite="skip").train(seed=5)
    assert len(explosion.state_dict()["usual"]["optimizer"]) == STEPS - 1


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.0}, {"warmup": 0}, {"window": 5, "warmup": 6}, {"factor": float("nan")}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="GradientExplosion"):
        GradientExplosion(**wrong)
