"""MetricMonitor: what counts as better."""

from __future__ import annotations

import math

import pytest

from paceline import MetricMonitor
from paceline.errors import ConfigError, MetricError

NAN, INF = math.nan, math.inf


def verdicts(values: list[float], *given: object, **settings: object) -> list[bool]:
    monitor = MetricMonitor("m", *given, **settings)  # pyright: ignore[reportArgumentType]
    return [monitor({"m": value}) for value in values]


def test_lower_or_higher_is_better() -> None:
    assert verdicts([3, 2, 2, 4, 1]) == [True, True, False, False, True]
    assert verdicts([3, 2, 3, 4, 1], mode="max") == [True, False, False, True, False]


def test_a_value_must_beat_the_best_by_more_than_min_delta() -> None:
    assert verdicts([3, 2.5, 2.4, 1.9], min_delta=0.5) == [True, False, True, False]
    assert verdicts([3, 3.5, 3.6], mode="max", min_delta=0.5) == [True, False, True]


def test_small_steps_add_up_against_the_best_not_against_the_last() -> None:
    assert verdicts([3, 2.8, 2.6, 2.4], min_delta=0.5) == [True, False, False, True]


def test_nan_is_never_better_and_never_the_best() -> None:
    assert verdicts([NAN, 2, NAN, 1]) == [False, True, False, True]
    assert verdicts([NAN, 2, NAN, 3], mode="max") == [False, True, False, True]


def test_an_infinite_value_can_be_beaten() -> None:
    assert verdicts([INF, 2, -INF]) == [True, True, True]
    assert verdicts([-INF, 2], mode="max") == [True, True]


@pytest.mark.parametrize("relative", [False, True])
def test_an_infinite_value_can_be_beaten_by_less_than_any_margin(relative: bool) -> None:
    settings = {"min_delta": 0.1, "relative": relative}
    assert verdicts([INF, 2], **settings) == [True, True]
    assert verdicts([-INF, -2, -2], mode="max", **settings) == [True, True, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_relative_margin_is_a_fraction_of_the_best_whatever_its_sign(sign: int) -> None:
    """Of 10 and -10 alike, a tenth is 1."""
    better = verdicts([10 * sign, 10 * sign - 0.9, 10 * sign - 1.1], min_delta=0.1, relative=True)
    assert better == [True, False, True]
    better = verdicts([10 * sign, 10 * sign + 0.9, 10 * sign + 1.1], "max", 0.1, True)
    assert better == [True, False, True]


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_stands_still_never_gets_better(level: float, mode: str) -> None:
    assert sum(verdicts([level] * 10, mode=mode, min_delta=1e-4, relative=True)) == 1


def test_it_counts_the_validations_since_the_best() -> None:
    monitor = MetricMonitor("m")
    for value in (3, 4, NAN, 2, 5):
        monitor({"m": value})
    assert (monitor.best_value, monitor.worse_count) == (2, 1)


def test_its_state_is_all_of_it() -> None:
    first, second = MetricMonitor("m"), MetricMonitor("m")
    for value in (3, 4):
        first({"m": value})
    second.load_state_dict(first.state_dict())
    assert (second.best_value, second.worse_count) == (3, 1)
    second.reset()
    assert (second.best_value, second.worse_count) == (None, 0)


def test_it_may_be_given_by_position_as_in_its_name() -> None:
    assert MetricMonitor("val/accuracy", "max").mode == "max"
    assert MetricMonitor().metric_name == "val/loss"


def test_a_metric_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(MetricError, match=r"'val/loss'\? There is: val/acc, val/loss\."):
        MetricMonitor("val/los")({"val/loss": 1.0, "val/acc": 2.0})
    with pytest.raises(MetricError, match="There is: none"):
        MetricMonitor("val/los")({})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "lower"}, "'min' or 'max'"),
        ({"min_delta": -1}, "negative"),
        ({"min_delta": NAN}, "n"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetricMonitor("m", **wrong)  # pyright: ignore[reportArgumentType]
