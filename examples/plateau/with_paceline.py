"""The loop of `plain.py` with Paceline; it ends with the same bits.

A `Trainer` with a model, an optimizer and a loss needs no code. `lr_scheduler_interval="metric"`
gives the schedule each validation's monitored metric. Rows have the rate of every group.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from paceline import MetricMonitor, Trainer
from plain import PLATEAU, make


def make_trainer(
    epochs: int = 20, images: int = 1_797, width: int = 64, **settings: Any
) -> Trainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, optimizer, train_loader, val_loader = make(images, width)
    return Trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer, **PLATEAU),
        lr_scheduler_interval="metric",
        metric_monitor=MetricMonitor("val/loss", mode="min"),
        loss_fn=nn.CrossEntropyLoss(),
        train_dataloader=train_loader,
        val_dataloader=val_loader,
        epochs=epochs,
        **settings,
    )


def train(**sizes: int) -> Trainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    shown = ", ".join(f"{rate:.2g}" for rate in rates)
    print(f"validation loss {result.final_val_loss:.4f}, rates {shown}")
    return trainer


if __name__ == "__main__":
    train()
