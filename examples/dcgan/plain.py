"""A DCGAN learns handwritten digits: two convolutional networks, two optimizers that take turns.

Random numbers: the noise comes from a generator of the loop's own, and the order of the images from
a sampler that draws it from its epoch. Neither touches torch's global generator, so it makes no
difference who seeds that one while training.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]
LATENT = 16
ADAM = {"lr": 2e-3, "betas": (0.5, 0.999)}


class EpochOrder(DistributedSampler):
    """A permutation for each epoch, drawn from its number, for one process."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, num_replicas=1, rank=0)


class Generator(nn.Sequential):
    """Noise [n, LATENT, 1, 1] to images [n, 1, 8, 8] in -1..1."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(LATENT, width, 4, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        )


class Discriminator(nn.Sequential):
    """Images to logits [n] for "real"."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(1, width, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 4, bias=False),
            nn.Flatten(0),
        )


def as_dcgan(module: nn.Module) -> None:
    """Draws weights with a standard deviation of 0.02 (Radford et al., 2015, arXiv:1511.06434)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def make(images: int, width: int) -> tuple[Generator, Discriminator, Loader]:
    """Both networks and the images."""
    pixels, _ = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:images], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    torch.manual_seed(0)
    generator, discriminator = Generator(width), Discriminator(width)
    generator.apply(as_dcgan)
    discriminator.apply(as_dcgan)
    data = TensorDataset(x)
    return generator, discriminator, DataLoader(data, 64, sampler=EpochOrder(data))


def verdict_loss(logits: Tensor, label: float) -> Tensor:
    """The mean cross-entropy to a label, 1 for real images and 0 for made ones."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def train(epochs: int = 5, images: int = 1_797, width: int = 32) -> dict[str, nn.Module]:
    """Trains, prints a line of what came of it, and returns the models."""
    generator, discriminator, loader = make(images, width)
    noise = torch.Generator().manual_seed(1)
    optimizer_g = torch.optim.Adam(generator.parameters(), **ADAM)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **ADAM)
    loss_g = torch.tensor(float("nan"))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # pyright: ignore
        for (real,) in loader:
            optimizer_d.zero_grad()
            verdict_loss(discriminator(real), 1.0).backward()
            fake = generator(torch.randn(len(real), LATENT, 1, 1, generator=noise))
            verdict_loss(discriminator(fake.detach()), 0.0).backward()
            optimizer_d.step()

            optimizer_g.zero_grad()
            loss_g = verdict_loss(discriminator(fake), 1.0)
            loss_g.backward()
            optimizer_g.step()
    print(f"the generator's last loss {loss_g.item():.4f}")
    return {"generator": generator, "discriminator": discriminator}


if __name__ == "__main__":
    train()
