"""A siamese network says whether two handwritten digits are the same: one network looks at both.

Random numbers: the pairs are drawn once, when the data are made, and each epoch reads them in this
order. So nothing is drawn while training.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

Triple = tuple[Tensor, Tensor, Tensor]


class Pairs(Dataset[Triple]):
    """Pairs of images [1, 8, 8], and 1.0 for the same digit (every second pair) or 0.0."""

    def __init__(self, x: Tensor, y: Tensor, pairs: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.pairs = x, []
        for i in range(pairs):
            same = i % 2 == 0
            first = int(torch.randint(len(x), (), generator=generator))
            others = ((y == y[first]) == same).nonzero().flatten()
            second = int(others[torch.randint(len(others), (), generator=generator)])
            self.pairs.append((first, second, torch.tensor(float(same))))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Triple:
        first, second, same = self.pairs[index]
        return self.x[first], self.x[second], same


class Siamese(nn.Module):
    """Two batches of images [n, 1, 8, 8] to logits [n] for "the same digit"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(9 * width, 32),
        )
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.cat([self.features(first), self.features(second)], dim=1))


def make(pairs: int, width: int) -> tuple[Siamese, DataLoader[Triple], DataLoader[Triple]]:
    """The model, and loaders for training and validation, whose images differ."""
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(digits)
    torch.manual_seed(0)
    model = Siamese(width)
    train = DataLoader(Pairs(x[:1400], y[:1400], pairs, seed=1), 64)
    return model, train, DataLoader(Pairs(x[1400:], y[1400:], pairs // 4, seed=2), 256)


def train(epochs: int = 6, pairs: int = 4_000, width: int = 16) -> Siamese:
    """Trains, prints a line of what came of it, and returns the model."""
    model, train_loader, val_loader = make(pairs, width)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    accuracy = float("nan")
    for _ in range(epochs):
        model.train()
        for first, second, same in train_loader:
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(model(first, second), same)
            loss.backward()
            optimizer.step()
        scheduler.step()

        model.eval()
        right, count = 0, 0
        with torch.no_grad():
            for first, second, same in val_loader:
                right += int(((model(first, second) > 0) == (same > 0.5)).sum())
                count += len(same)
        accuracy = right / count
    print(f"{accuracy:.1%} of the pairs right")
    return model


if __name__ == "__main__":
    train()
