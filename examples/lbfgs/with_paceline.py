"""The loop of `plain.py` with Paceline; it ends with the same bits.

Only the optimizer knows how often it needs the loss, so `step` gives it a closure. The first loss
of a step is logged, and each has to be finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paceline import Trainer, Window
from plain import LBFGS, make, penalized


class LBFGSTrainer(Trainer):
    """Steps the optimizer with a closure."""

    def step(self, window: Window) -> None:
        for batch, _ in window:

            def closure(batch: Any = batch) -> Tensor:
                loss = penalized(self.model, *batch)
                self.backward(loss)
                return loss

            self.optimizer_step(closure=closure)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/accuracy", (self.model(x).argmax(1) == y).float().mean())


def make_trainer(epochs: int = 10, images: int = 1_797, **settings: Any) -> LBFGSTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, train_loader, val_loader = make(images)
    return LBFGSTrainer(
        model=model,
        optimizer=torch.optim.LBFGS(model.parameters(), **LBFGS),
        train_dataloader=train_loader,
        val_dataloader=val_loader,
        epochs=epochs,
        **settings,
    )


def train(**sizes: int) -> LBFGSTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    print(f"{result.metrics['val/accuracy']:.1%} of the images right")
    return trainer


if __name__ == "__main__":
    train()
