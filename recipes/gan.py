"""A generative adversarial network on eight Gaussians in a ring: two models, two optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import Dataset

from paceline import Trainer, Window

MODES = 8
SPREAD = 0.1


def centres() -> Tensor:
    """The Gaussians' means, [8, 2], on a circle of radius 2."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return 2 * torch.stack([angles.cos(), angles.sin()], dim=1)


class Ring(Dataset):
    """Points [2] of the mixture; drawn once, from a generator of their own.

    Args:
        n: how many.
    """

    def __init__(self, n: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = centres().repeat(n // MODES + 1, 1)[:n]
        self.x = self.x + SPREAD * torch.randn(n, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


class Network(nn.Sequential):
    """Two hidden layers.

    Args:
        inputs, outputs: numbers that go in and come out.
        width: of the hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 64) -> None:
        super().__init__(
            nn.Linear(inputs, width), nn.LeakyReLU(0.2),
            nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, outputs),
        )  # fmt: skip


class GANTrainer(Trainer):
    """Trains the critic, then the generator, on every window.

    The losses are the non-saturating ones of Goodfellow et al. (2014), arXiv:1406.2661, with the
    gradient penalty R1 on real points of Mescheder et al. (2018), arXiv:1801.04406, eq. 9, which
    lets the two converge.

    Args:
        noise: numbers that the generator starts from.
        penalty: gamma of R1.
        **settings: the Trainer's.
    """

    def __init__(self, *, noise: int = 8, penalty: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.noise, self.penalty = noise, penalty

    def generate(self, n: int) -> Tensor:
        """`n` points [n, 2] of the generator's."""
        return self.model["generator"](torch.randn(n, self.noise, device=self.device))

    def step(self, window: Window) -> None:
        """One step of the critic and one of the generator."""
        critic = self.model["critic"]
        for real, _ in window:
            fake = self.generate(len(real))
            real = real.requires_grad_()
            verdict = critic(real)
            (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
            critic_loss = softplus(-verdict).mean() + softplus(critic(fake.detach())).mean()
            critic_loss = critic_loss + self.penalty / 2 * slope.square().sum(1).mean()
            self.backward(critic_loss, only="critic")
            self.optimizer_step("critic")
            generator_loss = softplus(-critic(fake)).mean()
            self.backward(generator_loss, only="generator")
            self.optimizer_step("generator")
            self.log("train/critic", critic_loss.detach())
            self.log("train/generator", generator_loss.detach())

    def on_validation_start(self) -> None:
        """Nothing has been generated yet."""
        self.hits = torch.zeros(MODES + 1, device=self.device)  # the last: near none

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Generates as many points as there are real ones and looks where they lie."""
        fake = self.generate(len(batch))
        distance, mode = torch.cdist(fake, centres().to(self.device)).min(dim=1)
        mode[distance > 4 * SPREAD] = MODES
        self.hits += torch.bincount(mode, minlength=MODES + 1)

    def get_val_metrics(self) -> dict[str, float]:
        """The share of points that lie near a mean, none counted beyond its mean's fair eighth.

        1 is perfect; a generator that makes one Gaussian well has 1/8.
        """
        hits = self.world.all_reduce(self.hits)
        return {"val/covered": float((hits[:-1] / hits.sum()).clamp(max=1 / MODES).sum())}
