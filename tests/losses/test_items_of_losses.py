"""A trainer that counts a loss's items ends the same however its batches are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer
from paceline.losses import (
    dpo_loss,
    grpo_items,
    grpo_loss,
    ppo_policy_loss,
    sequence_logps,
    token_logps,
)
from paceline.testing import Ranks
from small import fitted, weights

WORDS = 5


def sequences() -> TensorDataset:
    """Eight sequences of up to six tokens, none as long as the next, with what they were worth."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (8, 6), generator=generator)
    lengths = torch.tensor([6, 1, 4, 2, 0, 5, 3, 6])
    mask = torch.arange(6) < lengths[:, None]
    worth = torch.randn(8, generator=generator, dtype=torch.float64)
    return TensorDataset(ids, mask, worth)


class Policy(Trainer):
    """Words are drawn from a distribution that depends on the position alone."""

    way: str

    def count_items(self, batch: Any) -> Any:
        _, mask, _ = batch
        if self.way in ("grpo", "bnpo", "dr_grpo", "dapo"):
            return grpo_items(mask, self.way)
        return mask.sum() if self.way == "ppo" else len(mask) // 2

    def loss(self, batch: Any) -> torch.Tensor:
        ids, mask, worth = batch
        logits = self.model(torch.eye(6, dtype=torch.float64)).expand(len(ids), 6, WORDS)
        logps = token_logps(logits, ids, mask)
        old = torch.full_like(logps, -1.6)
        if self.way == "ppo":
            return ppo_policy_loss(logps, old, worth[:, None].expand_as(logps), mask)[0]
        if self.way == "dpo":
            sums, ref = sequence_logps(logps, mask), sequence_logps(old, mask)
            return dpo_loss(sums[::2], sums[1::2], ref[::2], ref[1::2])[0]
        size = 6 if self.way == "dr_grpo" else None
        return grpo_loss(
            logps, old, worth, mask, aggregation=self.way, max_length=size,
            ref_logps=old, beta=0.1,
        )[0]  # fmt: skip


def trained(way: str, size: int, accumulated: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Linear(6, WORDS, dtype=torch.float64)
    kind = type("Policy", (Policy,), {"way": way})
    loader = DataLoader(sequences(), size)
    return weights(
        fitted(
            kind, model=model, loss_fn=None, train_dataloader=loader, lr=0.5,
            gradient_accumulation_steps=accumulated,
        )
    )  # fmt: skip


WAYS = ("grpo", "bnpo", "dr_grpo", "dapo", "ppo", "dpo")


def near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(left[key], right[key], rtol=0, atol=1e-12) for key in left)


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_end_with_the_weights_of_one_batch(way: str) -> None:
    assert near(trained(way, 2, 4), trained(way, 8, 1))


def on_ranks() -> dict[str, dict[str, torch.Tensor]]:
    """By sequences, and by tokens."""
    return {way: trained(way, 2, 2) for way in ("grpo", "dapo")}


def test_ranks_end_with_the_weights_of_one_process(ranks: Ranks) -> None:
    for found in ranks(on_ranks, 2):
        for way, ended in found.items():
            assert near(ended, trained(way, 8, 1)), way
