"""LossPrediction finds the ends of known curves, and says how sure it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_runs import build

from paceline.callbacks import LossPrediction
from paceline.callbacks.loss_prediction import predict_final
from paceline.errors import ConfigError
from paceline.testing import rows

HORIZON = 1000.0
STEPS = np.arange(1, 41) * 10.0  # rows up to 40 % of the run
scales = st.floats(0.01, 100)
ends = st.floats(-100, 100)


def exponential(t: Any, a: float, rate: float, c: float) -> Any:
    return a * np.exp(-rate * t / HORIZON) + c


def power(t: Any, a: float, rate: float, c: float) -> Any:
    return a * (t / 10) ** -rate + c


@settings(max_examples=40)
@given(scales, st.floats(2, 30), ends, st.sampled_from([1, -1]))
def test_exponentials_end_where_they_end(a: float, rate: float, c: float, sign: int) -> None:
    """Losses of either sign, falling or rising."""
    value, error = predict_final(list(STEPS), list(exponential(STEPS, sign * a, rate, c)), HORIZON)
    assert value == pytest.approx(exponential(HORIZON, sign * a, rate, c), abs=1e-3 * a)
    assert error < 1e-2 * a


@settings(max_examples=40)
@given(scales, st.floats(0.2, 2), ends, st.sampled_from([1, -1]))
def test_power_laws_end_where_they_end(a: float, rate: float, c: float, sign: int) -> None:
    value, error = predict_final(list(STEPS), list(power(STEPS, sign * a, rate, c)), HORIZON)
    assert value == pytest.approx(power(HORIZON, sign * a, rate, c), abs=1e-3 * a)
    assert error < 1e-2 * a


@pytest.mark.parametrize("level", [-3.0, 0.0, 0.1, 1e9])
def test_what_stands_still_ends_where_it_is(level: float) -> None:
    assert predict_final(list(STEPS), [level] * len(STEPS), HORIZON) == (level, 0.0)


@pytest.mark.parametrize("curve", [exponential, power])
def test_with_noise_the_end_lies_within_the_error_as_often_as_it_should(curve: Any) -> None:
    """Within two standard errors in about 19 of 20 runs; the noise is a twentieth of the fall."""
    draw = np.random.default_rng(0)
    rate = 6.0 if curve is exponential else 0.7
    within, errors = 0, []
    for _ in range(60):
        noisy = curve(STEPS, 1.0, rate, -0.3) + draw.normal(0, 0.05, len(STEPS))
        value, error = predict_final(list(STEPS), list(noisy), HORIZON)
        end = curve(HORIZON, 1.0, rate, -0.3) + draw.normal(0, 0.05)
        within += abs(value - end) <= 2 * error
        errors.append(error)
    assert within >= 51
    assert np.median(errors) < 0.2, "and the error says something"


def test_noise_about_a_level_stays_at_the_level() -> None:
    noisy = 2.0 + np.random.default_rng(1).normal(0, 0.1, len(STEPS))
    value, error = predict_final(list(STEPS), list(noisy), HORIZON)
    assert value == pytest.approx(2.0, abs=0.3)
    assert 0.05 < error < 0.5


def test_a_loss_that_rises_steadily_goes_on_to() -> None:
    value, _ = predict_final(list(STEPS), list(STEPS / HORIZON), HORIZON)
    assert 0.7 < value <= 1.1  # 0.4 at the last row


@settings(max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=30))
def test_whatever_the_losses_the_answer_is_finite(losses: list[float]) -> None:
    steps = [5.0 * (i + 1) for i in range(len(losses))]
    value, error = predict_final(steps, losses, 200.0)
    assert math.isfinite(value)
    assert error >= 0


def predicted(run_dir: Path, name: str = "train/loss") -> dict[int, tuple[float, float]]:
    return {
        row["step"]: (row["predicted/final_loss"], row["predicted/final_loss_se"])
        for row in rows(run_dir)
        if "predicted/final_loss" in row and name in row
    }


def test_rows_have_it_once_there_are_enough(tmp_path: Path) -> None:
    build(tmp_path, LossPrediction(), log_every=1).train(seed=5)
    assert list(predicted(tmp_path)) == [10, 11, 12]
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert predicted(tmp_path)[12] == predict_final(range(1, 13), losses, 12)


def test_a_validations_loss_is_predicted_in_its_rows(tmp_path: Path) -> None:
    build(tmp_path, LossPrediction("val/loss"), validate_every=1).train(seed=5)
    assert list(predicted(tmp_path, "val/loss")) == [10, 11, 12]
    assert predicted(tmp_path, "train/loss") == {}


def test_without_a_known_end_nothing_is_said(tmp_path: Path) -> None:
    class Endless:
        training_horizon = None
        global_step = 0

    prediction, row = LossPrediction(min_points=6), {}
    for step in range(20):
        Endless.global_step = step + 1
        row = {"train/loss": 1.0 / (step + 1)}
        prediction.on_step_end(Endless(), row)  # pyright: ignore[reportArgumentType]
    assert list(row) == ["train/loss"]


def test_its_memory_is_bounded_and_the_points_are_means() -> None:
    prediction = LossPrediction(min_points=6, max_points=12)
    for step in range(1, 101):
        prediction._take(step, float(step))
    state = prediction.state_dict()
    assert len(state["points"]) < 12
    assert all(step == loss for step, loss in state["points"])
    stride = state["stride"]
    assert state["points"][1][0] - state["points"][0][0] == stride
    assert len(state["points"]) * stride + state["open"][0] == 100


@pytest.mark.parametrize("stop", [5, 23, 24, 47, 70])
def test_its_state_is_all_of_it(stop: int) -> None:
    """Also where points are means of several rows, one of them not complete."""
    whole, first, second = (LossPrediction(min_points=6, max_points=12) for _ in range(3))
    for step in range(1, 101):
        whole._take(step, 1 / step)
        part = first if step <= stop else second
        if step == stop + 1:
            second.load_state_dict(first.state_dict())
        part._take(step, 1 / step)
    assert second.state_dict() == whole.state_dict()


def test_values_that_are_not_finite_are_passed_over() -> None:
    prediction = LossPrediction()
    prediction._take(1, math.nan)
    prediction._take(2, math.inf)
    assert prediction.state_dict()["points"] == []


@pytest.mark.parametrize("wrong", [{"min_points": 5}, {"min_points": 10, "max_points": 19}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="LossPrediction"):
        LossPrediction(**wrong)
