"""The loop of `plain.py` with Paceline; it ends with the same bits.

The hidden state is an attribute of the trainer. It is neither a weight nor a number, so two hooks
put it into the checkpoint and take it back: a run that is stopped between two chunks resumes
exactly. A validation carries a hidden state of its own and leaves training's alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from paceline import Trainer
from plain import LEARNING_RATE, MAX_NORM, Hidden, make


class WordTrainer(Trainer):
    """Carries the hidden state from one chunk to the next."""

    hidden: Hidden | None = None
    val_hidden: Hidden | None = None

    def count_items(self, batch: Any) -> int:
        """Words, so that a validation's mean is over words and the short last chunk weighs less."""
        return batch[1].numel()

    def on_train_epoch_start(self) -> None:
        self.hidden = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, (h, c) = self.model(x, self.hidden)
        self.hidden = (h.detach(), c.detach())
        return cross_entropy(logits.flatten(0, 1), y.flatten())

    def on_validation_start(self) -> None:
        self.val_hidden = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits, self.val_hidden = self.model(x, self.val_hidden)
        self.log("val/loss", cross_entropy(logits.flatten(0, 1), y.flatten()))

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        state["hidden"] = self.hidden

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        self.hidden = state["hidden"]


def make_trainer(
    epochs: int = 2,
    words: int = 40_000,
    vocabulary: int = 2_000,
    width: int = 64,
    **settings: Any,
) -> WordTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    model, train_chunks, val_chunks = make(words, vocabulary, width)
    return WordTrainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        train_dataloader=DataLoader(train_chunks, batch_size=None),  # chunks are batches already
        val_dataloader=DataLoader(val_chunks, batch_size=None),
        epochs=epochs,
        max_grad_norm=MAX_NORM,
        **settings,
    )


def train(**sizes: int) -> WordTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    print(f"validation loss {result.final_val_loss:.4f} a word")
    return trainer


if __name__ == "__main__":
    train()
