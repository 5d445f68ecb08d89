"""Losses and advantages of learning from preferences and rewards: pure functions of tensors.

Every function takes half precision and computes in float32, keeps float64, and never waits for the
device. What lies outside a mask may be anything, NaN too: it changes neither a loss nor a gradient.

A loss is the mean over its ITEMS, and comes with statistics that are detached. A trainer whose
`count_items` returns the number of these items gets the same gradient however a batch is split over
micro-batches and ranks: `grpo_items` for `grpo_loss`, the pairs for `dpo_loss`, `mask.sum()` for
the others.
"""

from paceline.losses.advantages import gae, group_advantages, rloo_advantages
from paceline.losses.masked import masked_mean, moments, sequence_logps, whiten
from paceline.losses.policy import (
    grpo_items,
    grpo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
)
from paceline.losses.preference import dpo_loss
from paceline.losses.ratios import importance_weights, kl
from paceline.losses.tokens import token_entropy, token_logps

__all__ = [
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_items",
    "grpo_loss",
    "importance_weights",
    "kl",
    "masked_mean",
    "moments",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reinforce_loss",
    "rloo_advantages",
    "sequence_logps",
    "token_entropy",
    "token_logps",
    "whiten",
]
