"""A variational autoencoder of handwritten digits (Kingma and Welling, 2013, arXiv:1312.6114).

Random numbers: the model draws its noise from a generator of its own, and the order of the images
comes from a sampler that draws it from its epoch. In eval mode the model takes the mean and draws
nothing. The loss is summed over pixels and latent numbers and averaged over images: a mean over the
batch's items, as Paceline wants it, and not the sum over the batch that is often written.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


class EpochOrder(DistributedSampler):
    """A permutation for each epoch, drawn from its number, for one process."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, num_replicas=1, rank=0)


class VAE(nn.Module):
    """Images [n, 64] in 0..1 to logits [n, 64], and the posterior's mean and log variance."""

    def __init__(self, width: int, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))
        self.noise = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean
        if self.training:
            noise = torch.randn(mean.shape, generator=self.noise)
            z = mean + noise * (log_variance / 2).exp()
        return self.decoder(z), mean, log_variance


def evidence_bound(model: nn.Module, x: Tensor) -> Tensor:
    """The negative evidence lower bound, a mean over images."""
    logits, mean, log_variance = model(x)
    reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(x)


def make(images: int, width: int) -> tuple[VAE, Loader, Loader]:
    """The model, and loaders for training and validation."""
    pixels, _ = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:images], dtype=torch.float32) / 16
    border = len(x) * 4 // 5
    torch.manual_seed(0)
    model = VAE(width)
    pictures = TensorDataset(x[:border])
    train = DataLoader(pictures, 64, sampler=EpochOrder(pictures))
    return model, train, DataLoader(TensorDataset(x[border:]), 256)


def train(epochs: int = 10, images: int = 1_797, width: int = 128) -> VAE:
    """Trains, prints a line of what came of it, and returns the model."""
    model, train_loader, val_loader = make(images, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    val_loss = float("nan")
    for epoch in range(epochs):
        train_loader.sampler.set_epoch(epoch)  # pyright: ignore
        model.train()
        for (x,) in train_loader:
            optimizer.zero_grad()
            loss = evidence_bound(model, x)
            loss.backward()
            optimizer.step()

        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for (x,) in val_loader:
                total += evidence_bound(model, x).item() * len(x)
                count += len(x)
        val_loss = total / count
    print(f"negative evidence bound {val_loss:.4f} an image")
    return model


if __name__ == "__main__":
    train()
