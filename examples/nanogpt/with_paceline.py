"""The loop of `plain.py` with Paceline; it ends with the same bits.

The places of all batches are drawn at once, from a generator with the same seed, which gives the
same numbers as drawing them batch by batch. So the data are a dataset in a fixed order, of which
any position is known at once: a run that is stopped resumes without drawing again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from paceline import Trainer
from plain import (
    ACCUMULATION,
    BATCH,
    BLOCK,
    MAX_NORM,
    make,
    make_optimizer,
    share_of_peak,
    token_loss,
)


class Pieces(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text from random places, drawn once."""

    def __init__(self, text: Tensor, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.text = text
        self.places = torch.randint(len(text) - BLOCK, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.text[self.places[index] :][: BLOCK + 1]
        return piece[:-1], piece[1:]


class GPTTrainer(Trainer):
    """Predicts the next character."""

    def loss(self, batch: Any) -> Tensor:
        return token_loss(self.model, *batch)


def make_trainer(
    steps: int = 80,
    every: int = 40,
    warm_up: int = 20,
    val_batches: int = 8,
    width: int = 64,
    layers: int = 2,
    **settings: Any,
) -> GPTTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, train_text, val_text = make(width, layers)
    optimizer = make_optimizer(model)
    pieces = Pieces(train_text, steps * ACCUMULATION * BATCH, seed=1)
    return GPTTrainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, partial(share_of_peak, warm_up=warm_up, steps=steps)),
        train_dataloader=DataLoader(pieces, BATCH),
        val_dataloader=DataLoader(Pieces(val_text, val_batches * BATCH, seed=2), BATCH),
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_NORM,
        validate_every=every,
        max_steps=steps,
        **settings,
    )


def train(**sizes: int) -> GPTTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    print(f"validation loss {result.final_val_loss:.4f} a character")
    return trainer


if __name__ == "__main__":
    train()
