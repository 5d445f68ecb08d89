"""Handwritten digits (8 x 8 pixels, 1,797 of them, part of scikit-learn): a small CNN."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from paceline import Trainer


class Digits(Dataset):
    """Images [1, 8, 8] in 0..1 and their digits; every fifth image is for validation.

    Args:
        split: "train" or "val".
        augment: shift each image by up to one pixel either way, anew each time it is drawn.
    """

    def __init__(self, split: str = "train", augment: bool = False) -> None:
        images, digits = load_digits(return_X_y=True)
        parts = train_test_split(images, digits, test_size=0.2, stratify=digits, random_state=0)
        train_x, val_x, train_y, val_y = parts
        x, y = (train_x, train_y) if split == "train" else (val_x, val_y)
        self.x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.y = torch.tensor(y)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.x[index]
        if self.augment:
            top, left = torch.randint(0, 3, (2,)).tolist()
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
        return image, self.y[index]


class CNN(nn.Sequential):
    """Two stages of convolutions, then one linear layer.

    Args:
        width: channels of the first stage; the second has twice as many.
        dropout: share of the features dropped before the linear layer.
    """

    def __init__(self, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, 10),
        )  # fmt: skip


class MLP(nn.Sequential):
    """Two hidden layers, blind to which pixels are neighbours.

    Args:
        width: of the hidden layers.
        dropout: share of each hidden layer dropped.
    """

    def __init__(self, width: int = 256, dropout: float = 0.2) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, 10),
        )  # fmt: skip


class DigitsTrainer(Trainer):
    """Adds the accuracy to the default steps."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.model(x)
        self.log("train/accuracy", (logits.argmax(1) == y).float().mean())
        return self.loss_fn(logits, y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self.model(x)
        self.log("val/loss", self.loss_fn(logits, y))
        self.log("val/accuracy", (logits.argmax(1) == y).float().mean())
