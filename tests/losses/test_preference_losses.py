"""Losses of pairs equal a formula over numbers, and have its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import double, dpo

from paceline.losses import dpo_loss

KINDS = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")
NUMBERS = st.lists(st.floats(-4, 4), min_size=4, max_size=4)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), beta=st.sampled_from([0.05, 0.7]), smoothing=st.floats(0, 0.4),
    pairs=st.lists(NUMBERS, min_size=1, max_size=4), per_token=st.booleans(),
    size=st.integers(0, 5),
)  # fmt: skip
def test_the_loss_is_the_mean_over_pairs_of_the_formula(
    kind: str,
    beta: float,
    smoothing: float,
    pairs: list[list[float]],
    per_token: bool,
    size: int,
) -> None:
    smoothing = smoothing if kind in ("sigmoid", "robust") else 0.0
    normalised = kind == "sigmoid_norm" or (kind == "ipo" and per_token)
    sizes = [(size, i + 1) for i in range(len(pairs))] if normalised else [None] * len(pairs)
    lengths = tuple(torch.tensor(x) for x in zip(*sizes, strict=True)) if normalised else None  # pyright: ignore[reportArgumentType]
    loss, _ = dpo_loss(
        *double(pairs).unbind(1), beta=beta, kind=kind, label_smoothing=smoothing,
        lengths=lengths,
    )  # fmt: skip  # pyright: ignore[reportArgumentType]
    each = [
        dpo(p[0] - p[2], p[1] - p[3], kind, beta, smoothing, s)
        for p, s in zip(pairs, sizes, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / len(each), abs=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_has_the_gradient_of_the_loss_and_the_reference_none(kind: str) -> None:
    given = [x.requires_grad_() for x in double([[-5, -7], [-6, -4], [-5.5, -7], [-5, -5.5]])]
    lengths = (torch.tensor([3, 4]), torch.tensor([2, 5]))
    way: dict[str, Any] = {"kind": kind, "lengths": lengths if kind == "sigmoid_norm" else None}

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo_loss(chosen, rejected, given[2], given[3], beta=0.3, **way)[0]

    assert torch.autograd.gradcheck(value, tuple(given[:2]))
    loss, stats = dpo_loss(*given, **way)
    gradients = torch.autograd.grad(loss, given, allow_unused=True)
    assert gradients[2] is gradients[3] is None
    assert not any(stat.requires_grad for stat in stats.values())


def test_parts_of_a_batch_weighted_by_their_pairs_give_the_loss_of_the_whole() -> None:
    given = -torch.rand(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, told = dpo_loss(*given)
    parts = [dpo_loss(*given[:, part]) for part in (slice(0, 1), slice(1, 7), slice(7, 7))]
    total = sum(n * loss for n, (loss, _) in zip((1, 6, 0), parts, strict=True)) / 7
    assert float(total) == pytest.approx(whole.item(), abs=1e-14)
    assert parts[2][0] == 0  # of no pair
    for name, stat in told.items():
        mean = (parts[0][1][name] + 6 * parts[1][1][name]) / 7
        assert stat.item() == pytest.approx(mean.item(), abs=1e-14)


def test_pairs_far_apart_have_finite_losses_and_half_precision_is_computed_in_float32() -> None:
    given = torch.tensor([[-1000.0, -2], [-2.0, -1000], [-3, -3], [-3, -3]], dtype=torch.bfloat16)
    loss, _ = dpo_loss(*given, beta=1.0)
    expected, _ = dpo_loss(*given.float(), beta=1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert loss.item() == pytest.approx((1000 - 2) / 2, rel=1e-2)
    assert math.isfinite(loss.item())
