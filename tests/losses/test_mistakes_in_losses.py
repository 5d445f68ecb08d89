"""A wrong argument is an error that says what to give instead, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline.errors import ConfigError
from paceline.losses import (
    dpo_loss,
    gae,
    group_advantages,
    grpo_items,
    grpo_loss,
    importance_weights,
    kl,
    masked_mean,
    moments,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
    rloo_advantages,
    sequence_logps,
    token_entropy,
    token_logps,
    whiten,
)

X, WIDE, ROWS = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)
TOKENS: dict[str, Any] = {"logps": X, "old_logps": X, "advantages": ROWS, "mask": X}
STEPS: dict[str, Any] = dict.fromkeys(
    ("rewards", "values", "next_values", "terminated", "ended", "mask"), X
)


def grpo(**changes: Any) -> Callable[[], Any]:
    return lambda: grpo_loss(**TOKENS | changes)


def pairs(**changes: Any) -> Callable[[], Any]:
    return lambda: dpo_loss(ROWS, ROWS, ROWS, ROWS, **changes)


def steps(**changes: Any) -> Callable[[], Any]:
    return lambda: gae(**{**STEPS, "gamma": 1.0, "lam": 1.0, **changes})


def weights(**changes: Any) -> Callable[[], Any]:
    return lambda: importance_weights(X, X, X, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (grpo(ratio="clipp"), r"no ratio='clipp'; did you mean 'clip'\? There are clip, cispo"),
        (grpo(aggregation="dapi"), "did you mean 'dapo'"),
        (grpo(level="word"), "There are token, sequence"),
        (grpo(mask=WIDE), r"mask has shape \[2, 4\], but logps has \[2, 3\]"),
        (grpo(old_logps=ROWS), r"old_logps has shape \[2\]"),
        (grpo(ref_logps=WIDE), "ref_logps has shape"),
        (grpo(advantages=torch.zeros(3)), r"advantages has shape \[3\]"),
        (grpo(advantages=torch.zeros(2, 1)), r"advantages has shape \[2, 1\]"),
        (lambda: grpo_loss(ROWS, ROWS, ROWS, ROWS), r"shape \[2\]; give \[sequences, length\]"),
        (grpo(beta=0.1), "without a reference: give ref_logps"),
        (grpo(ratio="cispo"), "needs cap, the largest weight"),
        (grpo(ratio="cispo", cap=0.0), "cap=0.0 .* above 0"),
        (grpo(cap=1.1), r"above 1 \+ clip_high"),
        (grpo(aggregation="dr_grpo"), "max_length=None .* give the longest completion"),
        (grpo(max_length=3), "None for the others"),
        (grpo(clip_low=-0.2), "clip_low is from 0 to 1"),
        (lambda: grpo_items(X, "tokens"), "There are grpo, bnpo, dr_grpo, dapo"),
        (lambda: ppo_policy_loss(X, X, ROWS, X), r"advantages has shape \[2\]"),
        (lambda: ppo_policy_loss(X, X, X, X, clip_high=-1), "clip_high at least 0"),
        (lambda: ppo_policy_loss(X, X, X, X, stats=["kl"]), "no stats='kl'"),
        (lambda: ppo_value_loss(X, X, X, X, stats=["clip"]), r"no stats='clip'.*clipped"),
        (lambda: ppo_value_loss(X, X, WIDE, X), "returns has shape"),
        (lambda: ppo_value_loss(X, X, X, X, clip=0), "clip=0; it is above 0, or None"),
        (lambda: reinforce_loss(X, ROWS, X), r"advantages has shape \[2\]"),
        (pairs(kind="apo"), "There are sigmoid, ipo, hinge, robust, sigmoid_norm"),
        (pairs(beta=0.0), "beta=0.0; it is above 0"),
        (pairs(label_smoothing=0.5), "from 0 to below 0.5"),
        (pairs(kind="ipo", label_smoothing=0.1), "does nothing with kind='ipo'"),
        (pairs(lengths=(ROWS, ROWS)), "lengths do nothing with kind='sigmoid'"),
        (pairs(kind="sigmoid_norm"), r"give lengths=\("),
        (pairs(kind="ipo", lengths=(X, ROWS)), r"lengths has shape \[2, 3\]"),
        (lambda: dpo_loss(ROWS, ROWS, ROWS, X), "ref_rejected has shape"),
        (steps(ended=WIDE), "ended has shape"),
        (steps(gamma=1.1), "gamma=1.1; it is from 0 to 1"),
        (steps(lam=-1), "lam=-1; it is from 0 to 1"),
        (lambda: group_advantages(ROWS, torch.zeros(3)), "groups has shape"),
        (lambda: group_advantages(ROWS, ROWS, scale="std"), "There are group, batch, none"),
        (lambda: rloo_advantages(X, X), r"rewards has shape \[2, 3\]; give \[samples\]"),
        (lambda: kl(X, X, "k4"), "There are k1, k2, k3"),
        (lambda: kl(X, WIDE), "ref_logps has shape"),
        (weights(kind="clip", cap=1.0), "There are none, truncate, mask"),
        (weights(kind="mask"), "give the largest weight, such as cap=2.0"),
        (weights(level="batch"), "There are token, sequence"),
        (lambda: whiten(X, WIDE), "mask has shape"),
        (lambda: moments(X, WIDE), "mask has shape"),
        (lambda: masked_mean(X, WIDE), "mask has shape"),
        (lambda: sequence_logps(X, WIDE), "mask has shape"),
        (lambda: token_logps(X[..., None], X, WIDE), "mask has shape"),
        (lambda: token_logps(torch.zeros(2, 4, 5), X, X), "both shifted alike"),
        (lambda: token_entropy(torch.zeros(2, 3, 5), X, temperature=0), "temperature=0; it is"),
    ],
)
def test_it_is_refused_with_what_to_give(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
