"""What is trained: three small tasks, the same for every contestant.

All turns of a run together are a multiple of 50 steps: on the tiny model Paceline writes a row
every 50, on the others, whose epochs are short, some ten an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Task:
    """A model, its loss and its data.

    Args:
        model: makes the model.
        loss_fn: mean loss of `(outputs, targets)`.
        sample: makes n inputs and n targets from a generator.
        batch_size: samples a step.
        turns: how many turns a run takes with the others' runs.
        steps: in each turn.
    """

    model: Callable[[], nn.Module]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sample: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    batch_size: int
    turns: int
    steps: int

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model with the same weights in every process, and its optimizer."""
        torch.manual_seed(0)
        model = self.model()
        return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def loader(self, batches: int, *, shuffle: bool, mapped: bool = False) -> DataLoader:
        """A DataLoader without workers over so many batches.

        Args:
            batches: full batches in an epoch.
            shuffle: as the DataLoader's.
            mapped: a map-style dataset of one's own instead of a TensorDataset.
        """
        generator = torch.Generator().manual_seed(1)
        tensors = self.sample(batches * self.batch_size, generator)
        dataset = Rows(*tensors) if mapped else TensorDataset(*tensors)
        return DataLoader(dataset, self.batch_size, shuffle=shuffle)


class Rows(Dataset):
    """A map-style dataset: what a user writes, one sample at a time."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


class GPT(nn.Module):
    """A small causal transformer over bytes: 4 layers of width 128, 128 tokens."""

    def __init__(
        self, layers: int = 4, width: int = 128, tokens: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids) + self.position
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _numbers(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 16, generator=generator), torch.randn(n, 1, generator=generator)


def _digits(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(n, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


def _text(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (n, 129), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


TASKS = {
    "tiny": Task(_tiny, nn.functional.mse_loss, _numbers, 32, turns=10, steps=100),
    "cnn": Task(_cnn, nn.functional.cross_entropy, _digits, 64, turns=15, steps=10),
    "gpt": Task(GPT, _token_loss, _text, 8, turns=25, steps=2),
}
