"""Losses of policies equal loops over numbers, whatever the masks, and are means over items."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import double, grpo

from paceline.losses import (
    grpo_items,
    grpo_loss,
    importance_weights,
    kl,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
    sequence_logps,
)

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")
WAYS = [
    {"ratio": ratio, "aggregation": aggregation, "level": level}
    for ratio in ("clip", "cispo")
    for aggregation in AGGREGATIONS
    for level in ("token", "sequence")
]


def tensors(rows: int, length: int, seed: int, mask: Any = None) -> dict[str, torch.Tensor]:
    """Log-probabilities of ragged sequences, one of them perhaps empty, others with holes."""
    generator = torch.Generator().manual_seed(seed)

    def numbers() -> torch.Tensor:
        return torch.randn(rows, length, generator=generator, dtype=torch.float64)

    drawn = torch.rand(rows, length, generator=generator) < 0.7
    logps = -numbers().abs() - 0.1
    return {
        "logps": logps,
        "old_logps": logps + 0.4 * numbers(),
        "advantages": numbers(),
        "mask": drawn if mask is None else mask,
        "ref_logps": logps + 0.4 * numbers(),
    }


def complete(way: dict[str, Any]) -> dict[str, Any]:
    """With the settings that this way needs."""
    way = dict(way)
    if way.get("aggregation") == "dr_grpo":
        way["max_length"] = 7
    if way.get("ratio") == "cispo":
        way["cap"] = 1.1
    return way


@settings(max_examples=60)
@given(
    way=st.sampled_from(WAYS), rows=st.integers(1, 4), length=st.integers(1, 5),
    seed=st.integers(0, 2**31), beta=st.sampled_from([0.0, 0.3]), capped=st.booleans(),
)  # fmt: skip
def test_grpo_equals_a_loop_over_numbers(
    way: dict[str, Any], rows: int, length: int, seed: int, beta: float, capped: bool
) -> None:
    given = tensors(rows, length, seed)
    way = complete(way) | {"beta": beta, "clip_low": 0.15, "clip_high": 0.3}
    if capped and way["ratio"] == "clip":
        way["cap"] = 1.4
    loss, _ = grpo_loss(**given, **way)
    lists = {name: tensor.tolist() for name, tensor in given.items()}
    by_hand = grpo(
        lists["logps"], lists["old_logps"], lists["advantages"], lists["mask"],
        ref=lists["ref_logps"], **way,
    )  # fmt: skip
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_grpo_has_the_gradient_of_its_value(way: dict[str, Any]) -> None:
    """By differences of the value; the weight of "cispo" has none, so its advantages take it."""
    given = tensors(3, 4, seed=2)
    if way["ratio"] == "cispo":
        shift = torch.where(given["mask"], given["logps"] - given["old_logps"], 0.0)
        if way["level"] == "sequence":
            shift = (shift.sum(1) / given["mask"].sum(1).clamp(min=1))[:, None].expand(3, 4)
        given["advantages"] = given["advantages"] * shift.exp().clamp(max=1.1)
        logps = given["logps"].clone().requires_grad_()
        loss, _ = grpo_loss(**tensors(3, 4, seed=2) | {"logps": logps}, beta=0.1, **complete(way))
        divergence = kl(logps, given["ref_logps"], "k3")
        weighted = _aggregate(-given["advantages"] * logps + 0.1 * divergence, given["mask"], way)
        (mine,) = torch.autograd.grad(loss, logps)
        (other,) = torch.autograd.grad(weighted, logps)
        assert torch.allclose(mine, other, atol=1e-12)
        return

    def value(logps: torch.Tensor) -> torch.Tensor:
        return grpo_loss(**given | {"logps": logps}, beta=0.1, **complete(way))[0]

    assert torch.autograd.gradcheck(value, given["logps"].clone().requires_grad_())


def _aggregate(losses: torch.Tensor, mask: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
    losses = losses * mask
    if way["aggregation"] == "grpo":
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return losses.sum() / (len(losses) * 7 if way["aggregation"] == "dr_grpo" else mask.sum())


def everything(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every loss of tokens of the same tensors, and the weights between two policies."""
    logps, old, advantages, mask = (
        given[name] for name in ("logps", "old_logps", "advantages", "mask")
    )
    found = {
        f"grpo-{'-'.join(way.values())}": grpo_loss(**given, beta=0.1, **complete(way))
        for way in WAYS
    }
    found["ppo"] = ppo_policy_loss(logps, old, advantages, mask)
    found["value"] = ppo_value_loss(logps, old, advantages, mask, clip=0.1)
    found["reinforce"] = reinforce_loss(logps, advantages, mask)
    for kind in ("k1", "k2", "k3"):
        found[kind] = (kl(logps, old, kind, mask).sum(), {})
    found["sums"] = (sequence_logps(logps, mask).square().sum(), {})
    found["mean"] = (masked_mean(logps, mask), {})
    for level in ("token", "sequence"):
        weights = importance_weights(logps, old, mask, kind="mask", cap=1.2, level=level)
        found[f"weights-{level}"] = ((weights * torch.where(mask, logps, 0)).sum(), {})
    return {
        f"{name}/{key}": tensor
        for name, (loss, stats) in found.items()
        for key, tensor in {"loss": loss, **stats}.items()
    }


def test_what_is_outside_the_mask_changes_neither_a_loss_nor_a_gradient() -> None:
    given = tensors(4, 5, seed=3)
    given["mask"][1] = False
    mask = given["mask"]
    spoilt = {
        "logps": given["logps"].masked_fill(~mask, math.nan),
        "old_logps": given["old_logps"].masked_fill(~mask, math.inf),
        "advantages": given["advantages"].masked_fill(~mask, math.nan),
        "mask": mask,
        "ref_logps": given["ref_logps"].masked_fill(~mask, -math.inf),
    }
    results = []
    for tensors_ in (given, spoilt):
        logps = tensors_["logps"].clone().requires_grad_()
        found = everything(tensors_ | {"logps": logps})
        gradients = {
            name: torch.autograd.grad(loss, logps, retain_graph=True)[0]
            for name, loss in found.items()
            if name.endswith("/loss")
        }
        assert [name for name, g in gradients.items() if g[~mask].any() or not g.any()] == []
        results.append((found, gradients))
    for before, after in zip(*results, strict=True):
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_losses_depend_on_no_order_of_the_rows_and_no_padding() -> None:
    given = tensors(4, 5, seed=4)
    order = torch.tensor([2, 0, 3, 1])
    longer = {name: torch.cat([x, torch.zeros(4, 2).to(x)], 1) for name, x in given.items()}
    whole = everything(given)
    for other in (everything({k: v[order] for k, v in given.items()}), everything(longer)):
        assert {k: v.item() for k, v in other.items()} == pytest.approx(
            {k: v.item() for k, v in whole.items()}, abs=1e-12
        )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_parts_of_a_batch_weighted_by_their_items_give_the_loss_of_the_whole(
    aggregation: str,
) -> None:
    """One part has a single short sequence, another no token at all."""
    given = tensors(6, 5, seed=5)
    given["mask"][0] = torch.tensor([True, False, False, False, False])
    given["mask"][5] = False
    way = complete({"aggregation": aggregation, "beta": 0.1})
    whole, _ = grpo_loss(**given, **way)
    total = torch.zeros((), dtype=torch.float64)
    items = 0.0
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        loss, _ = grpo_loss(**{name: x[part] for name, x in given.items()}, **way)
        count = grpo_items(given["mask"][part], aggregation).item()
        total, items = total + loss * count, items + count
    assert items == (6 if aggregation in ("grpo", "dr_grpo") else given["mask"].sum())
    assert (total / items).item() == pytest.approx(whole.item(), abs=1e-14)


def test_advantages_of_sequences_are_those_of_all_their_tokens() -> None:
    given = tensors(3, 4, seed=6)
    of_sequences = given["advantages"][:, 0]
    each = of_sequences[:, None].expand(3, 4).clone()
    assert torch.equal(
        grpo_loss(**given | {"advantages": of_sequences})[0],
        grpo_loss(**given | {"advantages": each})[0],
    )


def test_the_ratios_are_told_before_they_are_clipped() -> None:
    ratios = double([[0.5, 0.9, 2.0, 4.0], [0.5, 1.0, 1.1, 2.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    old = torch.zeros(2, 4, dtype=torch.float64)
    for told in (
        grpo_loss(ratios.log(), old, double([1, -1]), mask, ref_logps=old)[1],
        ppo_policy_loss(ratios.log(), old, double([[1] * 4, [-1] * 4]), mask)[1],
    ):
        assert told["ratio"].item() == pytest.approx(10 / 7)
        assert told["clip_high"].item() == pytest.approx(2 / 7)  # 2 and 4, at an advantage of 1
        assert told["clip_low"].item() == pytest.approx(1 / 7)  # .5, at an advantage of -1
        assert not any(x.requires_grad for x in told.values())
    told = grpo_loss(ratios.log(), old, double([1, -1]), mask, ref_logps=old)[1]
    by_hand = (1 / ratios - 1 + ratios.log())[mask.bool()].mean()
    assert told["kl"].item() == pytest.approx(by_hand.item())


def test_reinforce_is_the_mean_over_what_was_sampled() -> None:
    given = tensors(3, 4, seed=7)
    logps, advantages, mask = given["logps"], given["advantages"], given["mask"]
    of_tokens, _ = reinforce_loss(logps, advantages, mask)
    assert of_tokens.item() == pytest.approx(-(advantages * logps)[mask].mean().item())
    rewards = double([1, -2, 0.5])
    of_sequences, told = reinforce_loss(sequence_logps(logps, mask), rewards, torch.ones(3))
    sums = double([logps[i][mask[i]].sum().item() for i in range(3)])
    assert of_sequences.item() == pytest.approx(-(rewards * sums).mean().item())
    assert told["logp"].item() == pytest.approx(sums.mean().item())


def test_the_value_loss_with_and_without_a_clip() -> None:
    values, old = double([1.0, 1.0, 3.0]), double([0.0, 0.9, 0.0])
    returns, mask = double([2.0, 2.0, 0.0]), torch.ones(3)
    plain, told = ppo_value_loss(values, old, returns, mask)
    assert plain.item() == pytest.approx((1 + 1 + 9) / 6)
    assert told["clipped"].item() == 0
    # Held to .5, 1 and .5: the first is further from 2 then, the last would be nearer to 0.
    clipped, told = ppo_value_loss(values, old, returns, mask, clip=0.5)
    assert clipped.item() == pytest.approx((1.5**2 + 1 + 9) / 6)
    assert told["clipped"].item() == pytest.approx(1 / 3)
    assert told["value"].item() == pytest.approx(5 / 3)
    assert told["return"].item() == pytest.approx(4 / 3)


def test_the_three_estimates_of_a_divergence_are_near_it() -> None:
    """KL(N(0.3, 1) || N(0, 1)) is .3^2 / 2; k2 is biased, by little."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64) + 0.3
    logps, ref = -((x - 0.3) ** 2) / 2, -(x**2) / 2
    for kind, error in (("k1", 3e-3), ("k2", 2e-3), ("k3", 1e-3)):
        assert kl(logps, ref, kind).mean().item() == pytest.approx(0.045, abs=error)
    assert (kl(logps, ref, "k3") >= 0).all()
    assert torch.equal(kl(logps, ref), kl(logps, ref, "k1"))


def test_importance_weights() -> None:
    trainer = double([[0.0, 0.5, -0.5], [1.0, 1.0, 9.0]]).requires_grad_()
    sampler = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    e = math.exp

    def weights(**settings: Any) -> list[list[float]]:
        found = importance_weights(trainer, sampler, mask, **settings)
        assert not found.requires_grad
        return found.tolist()

    assert weights() == [[1, 1, 1], [1, 1, 0]]
    near = pytest.approx
    assert weights(kind="truncate", cap=2.0) == [near([1, e(0.5), e(-0.5)]), [2, 2, 0]]
    assert weights(kind="mask", cap=2.0) == [near([1, e(0.5), e(-0.5)]), [0, 0, 0]]
    sequence: dict[str, Any] = {"level": "sequence"}
    assert weights(kind="truncate", cap=8.0, **sequence) == [near([1] * 3), near([e(2), e(2), 0])]
    assert weights(kind="mask", cap=7.0, **sequence) == [near([1] * 3), [0, 0, 0]]
    assert importance_weights(trainer, sampler).tolist() == [[1] * 3] * 2


def test_half_precision_is_computed_in_float32() -> None:
    half = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in tensors(4, 5, 8).items()}
    full = {k: v if v.dtype == torch.bool else v.float() for k, v in half.items()}
    expected = everything(full)
    for name, tensor in everything(half).items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name
    logps = half["logps"].clone().requires_grad_()
    grpo_loss(**half | {"logps": logps})[0].backward()
    assert logps.grad is not None
    assert logps.grad.dtype == torch.bfloat16


def test_a_batch_without_a_token_has_a_loss_of_zero_and_no_gradient() -> None:
    given = tensors(2, 3, 9, mask=torch.zeros(2, 3, dtype=torch.bool))
    logps = given["logps"].clone().requires_grad_()
    for name, loss in everything(given | {"logps": logps}).items():
        assert loss.item() == 0, name
        if name.endswith("/loss"):
            (gradient,) = torch.autograd.grad(loss, logps, retain_graph=True)
            assert not gradient.any(), name


def test_no_mask_is_a_mask_of_everything() -> None:
    torch.manual_seed(0)
    new, old, advantages, values = torch.randn(4, 3, 5)
    new.requires_grad_()
    whole = torch.ones(3, 5, dtype=torch.bool)
    for loss, *tensors in (
        (ppo_policy_loss, new, old, advantages),
        (ppo_value_loss, new, values, advantages),
    ):
        one, stats = loss(*tensors, whole)
        other, others = loss(*tensors, None)
        torch.testing.assert_close(other, one)
        torch.testing.assert_close(others, stats)
        first, second = (torch.autograd.grad(each, new)[0] for each in (one, other))
        torch.testing.assert_close(second, first)


def test_statistics_that_are_asked_for_are_the_same_as_among_all() -> None:
    given = tensors(3, 5, 0)
    logps, old, advantages, mask = (
        given[name] for name in ("logps", "old_logps", "advantages", "mask")
    )
    for loss, wanted in (
        (ppo_policy_loss, ("approx_kl", "clip_low")),
        (ppo_value_loss, ("value",)),
    ):
        whole, among = loss(logps, old, advantages, mask)
        found, some = loss(logps, old, advantages, mask, stats=wanted)
        assert torch.equal(found, whole)
        assert some == {name: among[name] for name in wanted}
        assert loss(logps, old, advantages, mask, stats=())[1] == {}
