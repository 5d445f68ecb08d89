"""Softmax regression on handwritten digits with L-BFGS, which evaluates the loss several times a
step.

All images are one batch, and the model starts from zero: nothing is random.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

LBFGS: dict[str, Any] = {"max_iter": 10, "line_search_fn": "strong_wolfe"}
PENALTY = 1e-3
Loader = DataLoader[tuple[Tensor, ...]]


def make(images: int) -> tuple[nn.Linear, Loader, Loader]:
    """The model, and loaders for training and validation, of one batch each."""
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:images], dtype=torch.float32) / 16
    y = torch.tensor(digits[:images])
    border = len(x) * 4 // 5
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    train = TensorDataset(x[:border], y[:border])
    val = TensorDataset(x[border:], y[border:])
    return model, DataLoader(train, len(train)), DataLoader(val, len(val))


def penalized(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy and a penalty on the size of the weights."""
    return cross_entropy(model(x), y) + PENALTY * model.weight.square().sum()


def train(epochs: int = 10, images: int = 1_797) -> nn.Linear:
    """Trains, prints a line of what came of it, and returns the model."""
    model, train_loader, val_loader = make(images)
    optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS)
    for _ in range(epochs):
        for x, y in train_loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = penalized(model, x, y)
                loss.backward()
                return loss

            optimizer.step(closure)  # pyright: ignore[reportArgumentType]

    right, count = 0, 0
    with torch.no_grad():
        for x, y in val_loader:
            right += int((model(x).argmax(1) == y).sum())
            count += len(y)
    print(f"{right / count:.1%} of the images right")
    return model


if __name__ == "__main__":
    train()
