"""The loop of `plain.py` with Paceline; it ends with the same bits.

Batches are three tensors here, so the two steps say what to do with them. The schedule steps once
an epoch, which is `lr_scheduler_interval="epoch"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import StepLR

from paceline import Trainer
from plain import make


class SiameseTrainer(Trainer):
    """Learns from pairs, and measures how many it gets right."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second, same = batch
        return binary_cross_entropy_with_logits(self.model(first, second), same)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        first, second, same = batch
        right = (self.model(first, second) > 0) == (same > 0.5)
        self.log("val/accuracy", right.float().mean())


def make_trainer(
    epochs: int = 6, pairs: int = 4_000, width: int = 16, **settings: Any
) -> SiameseTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, train_loader, val_loader = make(pairs, width)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    return SiameseTrainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=StepLR(optimizer, step_size=1, gamma=0.7),
        lr_scheduler_interval="epoch",
        train_dataloader=train_loader,
        val_dataloader=val_loader,
        epochs=epochs,
        **settings,
    )


def train(**sizes: int) -> SiameseTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    print(f"{result.metrics['val/accuracy']:.1%} of the pairs right")
    return trainer


if __name__ == "__main__":
    train()
