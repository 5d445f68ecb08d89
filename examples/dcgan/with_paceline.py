"""The loop of `plain.py` with Paceline; it ends with the same bits.

`backward(loss, only=NAME)` leaves the other network's gradients alone, so that nothing has to be
cleared by hand. The noise comes from a generator that is an attribute of the trainer: Paceline
saves where it stands, and the sampler is told each epoch.
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import Trainer, Window
from plain import ADAM, LATENT, make, verdict_loss


class DCGANTrainer(Trainer):
    """Trains the discriminator, then the generator, on every batch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.noise = torch.Generator().manual_seed(1)

    def step(self, window: Window) -> None:
        generator, discriminator = self.model["generator"], self.model["discriminator"]
        for (real,), _ in window:
            self.backward(verdict_loss(discriminator(real), 1.0), only="discriminator")
            fake = generator(torch.randn(len(real), LATENT, 1, 1, generator=self.noise))
            self.backward(verdict_loss(discriminator(fake.detach()), 0.0), only="discriminator")
            self.optimizer_step("discriminator")

            loss = verdict_loss(discriminator(fake), 1.0)
            self.backward(loss, only="generator")
            self.optimizer_step("generator")
            self.log("train/generator", loss.detach())


def make_trainer(
    epochs: int = 5, images: int = 1_797, width: int = 32, **settings: Any
) -> DCGANTrainer:
    """The run of `plain.py`; further settings of the Trainer may be given."""
    generator, discriminator, loader = make(images, width)
    return DCGANTrainer(
        model={"generator": generator, "discriminator": discriminator},
        optimizer={
            "generator": torch.optim.Adam(generator.parameters(), **ADAM),
            "discriminator": torch.optim.Adam(discriminator.parameters(), **ADAM),
        },
        train_dataloader=loader,
        epochs=epochs,
        **{"log_every": 1, **settings},
    )


def train(**sizes: int) -> DCGANTrainer:
    """Trains, prints a line of what came of it, and returns the trainer."""
    trainer = make_trainer(progress=False, **sizes)
    result = trainer.train()
    losses = [loss for loss in result.history["train/generator"] if loss == loss]
    print(f"the generator's last loss {losses[-1]:.4f}")
    return trainer


if __name__ == "__main__":
    train()
