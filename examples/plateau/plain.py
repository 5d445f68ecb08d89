"""Parameter groups with rates of their own, all lowered when the validation loss stops falling.

The body learns slowly, the head fast, and biases have no weight decay, as one fine-tunes. Random
numbers: the order of the images comes from a sampler that draws it from its epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]
PLATEAU: dict[str, Any] = {"factor": 0.3, "patience": 1, "threshold": 0.02}


class EpochOrder(DistributedSampler):
    """A permutation for each epoch, drawn from its number, for one process."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, num_replicas=1, rank=0)


class Classifier(nn.Module):
    """Images [n, 64] to logits [n, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def groups(model: Classifier) -> list[dict[str, Any]]:
    """Parameter groups: weights of the body, weights of the head, and biases."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.startswith("body") and p.dim() > 1], "lr": 0.02},
        {"params": [p for n, p in named if n.startswith("head") and p.dim() > 1], "lr": 0.1},
        {"params": [p for _, p in named if p.dim() == 1], "lr": 0.05, "weight_decay": 0.0},
    ]


def make(images: int, width: int) -> tuple[Classifier, torch.optim.SGD, Loader, Loader]:
    """The model, its optimizer, and loaders for training and validation."""
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:images], dtype=torch.float32) / 16
    y = torch.tensor(digits[:images])
    border = len(x) * 4 // 5
    torch.manual_seed(0)
    model = Classifier(width)
    optimizer = torch.optim.SGD(groups(model), momentum=0.9, weight_decay=1e-3)
    train = TensorDataset(x[:border], y[:border])
    val = TensorDataset(x[border:], y[border:])
    return model, optimizer, DataLoader(train, 32, sampler=EpochOrder(train)), DataLoader(val, 256)


def train(epochs: int = 20, images: int = 1_797, width: int = 64) -> Classifier:
    """Trains, prints a line of what came of it, and returns the model."""
    model, optimizer, train_loader, val_loader = make(images, width)
    criterion = nn.CrossEntropyLoss()
    scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)
    val_loss = float("nan")
    for epoch in range(epochs):
        train_loader.sampler.set_epoch(epoch)  # pyright: ignore
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for x, y in val_loader:
                total += criterion(model(x), y).item() * len(y)
                count += len(y)
        val_loss = total / count
        scheduler.step(val_loss)
    rates = ", ".join(f"{group['lr']:.2g}" for group in optimizer.param_groups)
    print(f"validation loss {val_loss:.4f}, rates {rates}")
    return model


if __name__ == "__main__":
    train()
