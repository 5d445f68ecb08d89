"""Losses and advantages have the values that TRL's own code gives for the same tensors.

All in double precision. TRL's names for what is compared: `GRPOTrainer`, `RLOOTrainer`,
`DPOTrainer`, and the PPO that it had until 1.15.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_losses import double

from paceline.losses import (
    dpo_loss,
    gae,
    group_advantages,
    grpo_loss,
    kl,
    ppo_policy_loss,
    ppo_value_loss,
    rloo_advantages,
    sequence_logps,
    whiten,
)

LOGPS = double([[-1, -2, -3], [-1.5, -0.5, -2]])
OLD = double([[-1.2, -2, -2.5], [-1, -0.9, -2]])
REF = double([[-1.1, -1.8, -3], [-1.4, -0.7, -2]])
MASK = double([[1, 1, 1], [1, 1, 0]])
CISPO = {"aggregation": "dapo", "ratio": "cispo", "cap": 0.2}
DR_GRPO = {"aggregation": "dr_grpo", "max_length": 4}


def close(left: Any, right: Any) -> bool:
    return torch.allclose(left, double(right), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "beta", "value", "norm"),
    [
        ({"aggregation": "grpo"}, 0.0, 0.10520106445821198, 0.42082414281315944),
        ({"aggregation": "grpo"}, 0.04, 0.10561501567772252, 0.4230177869342503),
        ({"aggregation": "bnpo"}, 0.0, -0.1029411924142726, 0.3791263836592706),
        ({"aggregation": "bnpo"}, 0.04, -0.10254005763547451, 0.3812049074590492),
        ({"aggregation": "dapo"}, 0.0, -0.1029411924142726, 0.3791263836592706),
        ({"aggregation": "dapo"}, 0.04, -0.10254005763547451, 0.3812049074590492),
        (DR_GRPO, 0.0, -0.06433824525892037, 0.2369539897870441),
        (DR_GRPO, 0.04, -0.06408753602217157, 0.23825306716190575),
        (CISPO, 0.0, 0.16, 0.0894427190999916),
        (CISPO, 0.04, 0.16040113477879808, 0.09019991294386596),
        ({"level": "sequence"}, 0.0, 0.023196003232377194, None),
    ],
)
def test_the_losses_of_grpo_and_their_gradients(
    settings: dict[str, Any], beta: float, value: float, norm: float | None
) -> None:
    logps = LOGPS.clone().requires_grad_()
    loss, _ = grpo_loss(logps, OLD, double([1, -1]), MASK, ref_logps=REF, beta=beta, **settings)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(value, abs=1e-14)
    assert norm is None or gradient.norm().item() == pytest.approx(norm, abs=1e-14)


def test_the_loss_of_rloo_is_that_of_ppo_for_whole_sequences() -> None:
    new, old = sequence_logps(LOGPS, MASK), sequence_logps(OLD, MASK)
    loss, _ = ppo_policy_loss(new, old, double([1, -1]), torch.ones(2))
    assert loss.item() == pytest.approx(0.08200959867712077, abs=1e-14)
    assert close(sequence_logps(kl(OLD, REF, "k1"), MASK), [0.2, 0.2])


PAIRS = {
    "chosen": double([-10, -12]),
    "rejected": double([-11, -9]),
    "ref_chosen": double([-10.5, -12.5]),
    "ref_rejected": double([-10, -10]),
}
LENGTHS = (torch.tensor([5, 6]), torch.tensor([4, 5]))


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"kind": "sigmoid"}, 0.6697083479014092),
        ({"kind": "robust", "label_smoothing": 0.1}, 0.6634583479014091),
        ({"kind": "hinge"}, 0.95),
        ({"kind": "ipo"}, 21.25),
        ({"kind": "ipo", "lengths": LENGTHS}, 23.90138888888889),
        ({"kind": "sigmoid_norm", "lengths": LENGTHS}, 0.687398912715253),
    ],
)
def test_the_losses_of_pairs(settings: dict[str, Any], value: float) -> None:
    loss, stats = dpo_loss(**PAIRS, beta=0.1, **settings)
    assert loss.item() == pytest.approx(value, abs=1e-13)
    assert stats["reward_chosen"].item() == pytest.approx(0.05)  # of [.05, .05]
    assert stats["reward_rejected"].item() == pytest.approx(0.0)  # of [-.1, .1]
    assert stats["margin"].item() == pytest.approx(0.05)
    assert stats["accuracy"].item() == 0.5
    assert stats["logp_chosen"].item() == -11.0
    assert stats["logp_rejected"].item() == -10.0


def test_advantages_in_groups() -> None:
    pairs, one = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)
    rewards, more = double([1, 0, 0.5, 2]), double([1, 2, 3, 6])
    a, b = 0.7070067953266834, 0.707040120804682
    assert close(group_advantages(rewards, pairs), [a, -a, -b, b])
    a, b = 0.5854714803698716, 0.8782072205548075
    assert close(group_advantages(rewards, pairs, scale="batch"), [a, -a, -b, b])
    assert close(group_advantages(rewards, pairs, scale="none"), [0.5, -0.5, -0.75, 0.75])
    assert close(rloo_advantages(rewards, pairs), [1, -1, -1.5, 1.5])
    fours = [-0.9257772446135025, -0.46288862230675126, 0, 1.3886658669202538]
    assert close(group_advantages(more, one), fours)
    assert close(rloo_advantages(more, one), [-8 / 3, -4 / 3, 0, 4])


def test_ppo_from_scores_to_the_loss() -> None:
    nan = float("nan")
    old = double([[-1, -1.5, -0.5, -2], [-0.7, -1.2, nan, nan]])
    ref = double([[-1.1, -1.4, -0.6, -1.8], [-0.9, -1.0, nan, nan]])
    values = double([[0.1, 0.2, 0.3, 0.4], [0.5, 0.4, 0.3, nan]])
    tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    # TRL gives the score one step after the last token of a sequence that ends early.
    steps = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    scores = double([[0, 0, 0, 1], [0, 0, -0.5, 0]])
    after = double([[0.2, 0.3, 0.4, 0], [0.4, 0.3, 0, nan]])

    rewards = scores - 0.05 * kl(old, ref, "k1", tokens)
    never = torch.zeros(2, 4)
    advantages, returns = gae(rewards, values, after, never, never, steps, gamma=1.0, lam=0.95)
    white = whiten(advantages, tokens)
    change = double([[0.1, -0.3, 0.05, 0], [0.25, -0.05, nan, nan]])
    policy, stats = ppo_policy_loss(old + change, old, white, tokens)
    change = double([[0.05, -0.3, 0.25, 0], [0, 0.1, -0.4, nan]])
    value, _ = ppo_value_loss(values + change, values, returns, steps, clip=0.2)

    assert close(rewards, [[-0.005, 0.005, -0.005, 1.01], [-0.01, 0.01, -0.5, 0]])
    assert close(advantages, [[0.80348625, 0.745775, 0.6745, 0.61], [-0.9175, -0.85, -0.8, 0]])
    assert close(returns, [[0.90348625, 0.945775, 0.9745, 1.01], [-0.4175, -0.45, -0.5, 0]])
    first = [0.7584588547238096, 0.6885111327511052, 0.6021237492928626, 0.5239478638764241]
    assert close(white, [first, [-1.3274267868772138, -1.2456148137669878, 0, 0]])
    assert policy.item() == pytest.approx(0.0640139627600169, abs=1e-14)
    assert value.item() == pytest.approx(0.3116388128260044, abs=1e-14)
    assert (policy + 0.1 * value).item() == pytest.approx(0.09517784404261735, abs=1e-14)
    assert stats["clip_low"].item() == stats["clip_high"].item() == 0
    changes = torch.tensor([0.1, -0.3, 0.05, 0, 0.25, -0.05], dtype=torch.float64)
    by_hand = (changes.exp() - 1 - changes).mean()
    assert stats["approx_kl"].item() == pytest.approx(by_hand.item(), abs=1e-14)
