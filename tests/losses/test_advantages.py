"""Advantages equal loops over numbers, whatever the masks, the ends and the groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import deviation, double, mean
from plain_losses import gae as plain_gae

from paceline.losses import gae, group_advantages, moments, rloo_advantages, whiten

WAY = {"gamma": 0.9, "lam": 0.8}


def trajectories(rows: int, time: int, seed: int) -> dict[str, torch.Tensor]:
    """Steps of several environments, some of them ends, some no samples."""
    generator = torch.Generator().manual_seed(seed)

    def numbers() -> torch.Tensor:
        return torch.randn(rows, time, generator=generator, dtype=torch.float64)

    def some(share: float) -> torch.Tensor:
        return torch.rand(rows, time, generator=generator) < share

    terminated = some(0.15)
    return {
        "rewards": numbers(),
        "values": numbers(),
        "next_values": numbers(),
        "terminated": terminated,
        "ended": terminated | some(0.15),
        "mask": some(0.8),
    }


@settings(max_examples=60)
@given(rows=st.integers(1, 3), time=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_gae_equals_a_sum_over_the_steps_that_follow_without_those_that_are_masked(
    rows: int, time: int, seed: int
) -> None:
    given = trajectories(rows, time, seed)
    advantages, returns = gae(**given, **WAY)
    for i in range(rows):
        kept = given["mask"][i]
        row = [given[name][i][kept].tolist() for name in list(given)[:5]]
        assert advantages[i][kept].tolist() == pytest.approx(plain_gae(*row, **WAY), abs=1e-12)
        assert torch.equal(returns[i][kept], advantages[i][kept] + given["values"][i][kept])
        assert not advantages[i][~kept].any()
        assert not returns[i][~kept].any()


def one_row(**changes: Any) -> dict[str, torch.Tensor]:
    """Four steps with rewards of 1, values of 10 and next values of 20, none of them an end."""
    row: dict[str, Any] = {
        "rewards": double([[1.0] * 4]),
        "values": double([[10.0] * 4]),
        "next_values": double([[20.0] * 4]),
        "terminated": torch.zeros(1, 4, dtype=torch.bool),
        "ended": torch.zeros(1, 4, dtype=torch.bool),
        "mask": torch.ones(1, 4, dtype=torch.bool),
    }
    return row | {name: torch.tensor([value]) for name, value in changes.items()}


def test_a_time_limit_bootstraps_where_a_terminal_state_is_worth_nothing() -> None:
    second = [False, True, False, False]
    cut, _ = gae(**one_row(ended=second), gamma=0.5, lam=0.5)
    over, _ = gae(**one_row(terminated=second), gamma=0.5, lam=0.5)
    # A step's error is 1 + .5 * 20 - 10 = 1, that of a terminal one 1 - 10 = -9.
    assert cut.tolist() == [[1.25, 1.0, 1.25, 1.0]]
    assert over.tolist() == [[1 - 9 / 4, -9.0, 1.25, 1.0]]
    both, _ = gae(**one_row(terminated=second, ended=second), gamma=0.5, lam=0.5)
    assert torch.equal(both, over)  # terminated is an end by itself


def test_a_step_that_only_resets_is_no_sample_and_nothing_goes_back_over_it() -> None:
    ends, kept = [False, True, False, False], [True, True, False, True]
    found, returns = gae(**one_row(terminated=ends, mask=kept), gamma=0.5, lam=0.5)
    assert found.tolist() == [[1 - 9 / 4, -9.0, 0.0, 1.0]]
    assert returns.tolist() == [[10 + 1 - 9 / 4, 1.0, 0.0, 11.0]]
    # Without an end before it, as where somebody else speaks in between, it is passed over.
    found, _ = gae(**one_row(mask=kept), gamma=0.5, lam=0.5)
    assert found.tolist() == [[1 + 1.25 / 4, 1.25, 0.0, 1.0]]


def test_what_is_masked_or_after_a_terminal_state_may_be_anything() -> None:
    given = trajectories(3, 8, seed=1)
    mask = given["mask"]
    spoilt = {
        "rewards": given["rewards"].masked_fill(~mask, math.nan),
        "values": given["values"].masked_fill(~mask, math.inf),
        "next_values": given["next_values"].masked_fill(~mask | given["terminated"], math.nan),
    }
    for before, after in zip(gae(**given, **WAY), gae(**given | spoilt, **WAY), strict=True):
        assert torch.equal(before, after)


def test_gae_of_half_precision_is_computed_in_float32_and_has_no_gradient() -> None:
    given = trajectories(2, 6, seed=2)
    numbers = ("rewards", "values", "next_values")
    half = given | {name: given[name].bfloat16().requires_grad_() for name in numbers}
    full = given | {name: half[name].detach().float() for name in numbers}
    for mine, expected in zip(gae(**half, **WAY), gae(**full, **WAY), strict=True):
        assert mine.dtype == torch.float32
        assert not mine.requires_grad
        assert torch.equal(mine, expected)


@settings(max_examples=60)
@given(
    rewards=st.lists(st.sampled_from([0.0, 0.1, 1.0, -2.5, 7.0]), min_size=1, max_size=12),
    seed=st.integers(0, 2**31), scale=st.sampled_from(["group", "batch", "none"]),
)  # fmt: skip
def test_advantages_in_groups_of_any_sizes_equal_loops(
    rewards: list[float], seed: int, scale: str
) -> None:
    """Groups are mixed, some samples have no reward, and their groups' names are any integers."""
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(-2, 3, (len(rewards),), generator=generator) * 1000
    mask = torch.rand(len(rewards), generator=generator) < 0.8
    given = double(rewards).masked_fill(~mask, math.nan)
    mine = group_advantages(given, names, scale=scale, mask=mask).tolist()
    left_out = rloo_advantages(given, names, mask=mask).tolist()
    counted = [i for i in range(len(rewards)) if mask[i]]
    spread = deviation([rewards[i] for i in counted])
    for i in range(len(rewards)):
        group = [j for j in counted if names[j] == names[i]]
        if i not in counted:
            assert mine[i] == left_out[i] == 0
            continue
        values = [rewards[j] for j in group]
        gap = rewards[i] - mean(values)
        scaled = {"group": deviation(values) + 1e-4, "batch": spread + 1e-4, "none": 1.0}[scale]
        assert mine[i] == pytest.approx(gap / scaled, abs=1e-9)
        others = [rewards[j] for j in group if j != i]
        assert left_out[i] == pytest.approx(rewards[i] - mean(others) if others else 0, abs=1e-12)


def test_groups_of_equal_rewards_or_of_one_sample_have_advantages_of_exactly_zero() -> None:
    """The mean of seven times .1 is not .1 in floating point."""
    rewards = torch.tensor([0.1] * 7 + [0.3] + [1.0, 2.0])
    groups = torch.tensor([3] * 7 + [1] + [2, 2])
    for advantages in (
        group_advantages(rewards, groups),
        group_advantages(rewards, groups, scale="batch"),
        group_advantages(rewards, groups, scale="none"),
        rloo_advantages(rewards, groups),
    ):
        assert not advantages[:8].any()
        assert advantages[8] < 0 < advantages[9]


def test_whitened_values_have_mean_0_and_variance_1_within_the_mask() -> None:
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mask = values < 4
    white = whiten(values.masked_fill(~mask, math.nan), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any()


@pytest.mark.parametrize(
    "values", [[0.1] * 7, [3.0], [-2e6] * 3, [0.0] * 4, [0.1, 0.1 + 2**-27, 0.1 - 2**-27]]
)
def test_a_constant_or_a_single_value_is_not_whitened(values: list[float]) -> None:
    given = torch.tensor([*values, math.nan])
    mask = torch.tensor([True] * len(values) + [False])
    assert torch.equal(whiten(given, mask), given.nan_to_num(0.0))


def test_small_differences_are_whitened() -> None:
    given = torch.tensor([1.0, 1.001, 1.002])
    assert whiten(given, torch.ones(3))[2].item() == pytest.approx(0.995, abs=1e-3)


def test_parts_are_whitened_by_the_moments_of_the_whole() -> None:
    """As the ranks do, which add up their moments; one has a single value, one none."""
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    rows = list(zip(values, mask, strict=True))
    over = torch.stack([moments(v, m) for v, m in rows]).sum(0)
    parts = torch.stack([whiten(v, m, over=over) for v, m in rows])
    assert torch.allclose(parts, whiten(values, mask), rtol=0, atol=1e-14)
    assert over[0] == 5
