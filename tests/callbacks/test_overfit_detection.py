"""OverfitDetection warns once of losses that part, and of nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_runs import build

from paceline.callbacks import OverfitDetection
from paceline.callbacks.overfit_detection import trend
from paceline.errors import ConfigError, MetricError
from paceline.testing import rows


def watch(train: list[float], val: list[float], **settings: Any) -> tuple[list[int], list[dict]]:
    """The validations (from 1) at which it warned, and the rows they got."""
    said: list[str] = []
    warned, written, items = [], [], 0
    detection = OverfitDetection(**{"warmup": 0, **settings})
    trainer: Any = SimpleNamespace(say=said.append)
    for i, (loss, measured) in enumerate(zip(train, val, strict=True), start=1):
        for share in (0.5, 1.5):  # two rows between two validations
            items += 10
            detection.on_step_end(trainer, {"items": items, "train/loss": loss * share})
            detection.on_step_end(trainer, {})
        metrics = {"val/loss": measured}
        detection.on_metrics(trainer, metrics)
        written.append(metrics)
        warned += [i] * len(said)
        said.clear()
    return warned, written


FALLING = [1.0 - 0.05 * i for i in range(12)]
RISING = [1.0 + 0.02 * i for i in range(12)]


def test_losses_that_part_are_warned_of_once() -> None:
    assert watch(FALLING, RISING)[0] == [5]


def test_a_new_episode_is_warned_of_again() -> None:
    val = RISING[:6] + [0.9 - 0.05 * i for i in range(8)] + RISING[:6]
    assert len(watch([2 - 0.05 * i for i in range(20)], val)[0]) == 2


def test_one_step_back_does_not_hide_it() -> None:
    """Where losses would have to be strictly monotone, this would never be seen."""
    val = [1.0, 1.1, 1.09, 1.2, 1.3, 1.28, 1.4]
    assert watch(FALLING[:7], val)[0] != []


@pytest.mark.parametrize(
    ("train", "val"),
    [(FALLING, FALLING), (RISING, RISING), (RISING, FALLING), (FALLING, [0.1] * 12)],
)
def test_losses_that_do_not_part_are_not_warned_of(train: list[float], val: list[float]) -> None:
    assert watch(train, val)[0] == []


def test_noise_is_seldom_taken_for_it() -> None:
    """Of a thousand windows of losses that stand still, the signs alone would warn in 250."""
    draw = random.Random(3)
    noise = [[draw.gauss(1, 0.1) for _ in range(5)] for _ in range(2000)]
    warned = sum(len(watch(noise[i], noise[i + 1])[0]) for i in range(0, 2000, 2))
    assert warned < 25


def test_warmup_counts_validations() -> None:
    assert watch(FALLING, RISING, warmup=8)[0] == [9]
    assert watch(FALLING, RISING, window=3)[0] == [3]


def test_rows_have_the_ratio_of_the_losses() -> None:
    """The training loss is the mean over the items of both rows."""
    _, written = watch([2.0, 1.0, 0.0, -1.0], [3.0, 3.0, 3.0, 3.0])
    assert [row.get("overfit/gap_ratio") for row in written] == [1.5, 3.0, None, None]


def test_values_that_are_not_finite_are_passed_over() -> None:
    val = list(RISING)
    val[2] = float("nan")
    assert watch(FALLING, val)[0] == [6]


def test_without_rows_between_validations_it_says_what_is_missing(capsys: Any) -> None:
    build(None, OverfitDetection(), log_every=50).train(seed=5)
    assert capsys.readouterr().err.count("have rows at least as often") == 1


def test_a_loss_that_never_appears_is_told_of() -> None:
    with pytest.raises(MetricError, match="There is: val/loss"):
        build(None, OverfitDetection(val="val/los")).train(seed=5)


def test_the_ratio_is_in_the_rows_of_a_run(tmp_path: Path) -> None:
    build(tmp_path, OverfitDetection()).train(seed=5)
    validations = [row for row in rows(tmp_path) if "val/loss" in row]
    assert len(validations) == 4
    assert all(row["overfit/gap_ratio"] > 0 for row in validations)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=12))
def test_a_trend_turns_with_its_values(values: list[float]) -> None:
    assert trend([-value for value in values]) == -trend(values)
    assert trend([values[0]] * len(values)) == 0


@pytest.mark.parametrize("wrong", [{"window": 2}, {"warmup": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="OverfitDetection"):
        OverfitDetection(**wrong)
