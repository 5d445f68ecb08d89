"""The loop of `plain.py` with Paceline; it ends with the same bits.

`loss(batch)` is all that a trainer of one loss needs: training and validation both use it. The
generator that the model draws its noise from is part of a checkpoint, since it is an attribute of a
module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paceline import Trainer
from plain import evidence_bound, make


class VAETrainer(Trainer):
    """Minimises the negative evidence lower bound."""

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        return evidence_bound(self.model, x)


def make_trainer(
    epochs: int = 10, images: int = 1_797, width: int = 128, **settings: Any
) -> VAETrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, train_loader, val_loader = make(images, width)
    return VAETrainer(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        train_dataloader=train_loader,
        val_dataloader=val_loader,
        epochs=epochs,
        **settings,
    )


def train(**sizes: int) -> VAETrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    print(f"negative evidence bound {result.final_val_loss:.4f} an image")
    return trainer


if __name__ == "__main__":
    train()
