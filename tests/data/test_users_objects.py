"""Datasets, samplers and loaders of the user's own: asked and told as torch's DataLoader would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info

from paceline import Trainer
from paceline.data.loader import open_training
from paceline.data.source import WindowSize
from paceline.errors import ConfigError
from paceline.world.world import World
from small import fitted, message


def read(loader: DataLoader, epochs: int = 1, length: int | None = None) -> list[list[Any]]:
    """The samples of each epoch."""
    source = open_training(loader, WindowSize(epoch_length=length), 0, World())
    seen: list[list[Any]] = []
    for epoch in range(epochs):
        source.start_epoch(epoch)
        seen.append([])
        while (draw := source.draw()) is not None:
            for j in range(len(draw.sizes)):
                seen[-1] += draw.batch(j).tolist()
    source.close()
    return seen


class Numbers(Dataset):
    """0 to 11, plus 100 times the pass that it was told; its gain is a worker's to set."""

    gain = 1
    epoch = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return self.gain * index + 100 * self.epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def order_of(epoch: int) -> torch.Tensor:
    return torch.randperm(12, generator=torch.Generator().manual_seed(epoch))


class ByEpoch(Sampler):
    """Another order for each pass that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order_of(self.epoch).tolist())

    def __len__(self) -> int:
        return 12


class Pairs(Sampler):
    """Batches of two, of the samples that another sampler gives."""

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[list[int]]:
        held = list(self.inner)
        return iter([held[i : i + 2] for i in range(0, 12, 2)])

    def __len__(self) -> int:
        return 6


def gain_of_three(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.gain = 3


def test_a_worker_s_dataset_is_the_user_s() -> None:
    """`get_worker_info().dataset` is what the worker reads, so what is set there counts."""
    loader = DataLoader(Numbers(), 4, num_workers=1, worker_init_fn=gain_of_three)
    assert read(loader) == [[3 * i for i in range(12)]]


def test_each_pass_is_told_wherever_somebody_listens() -> None:
    """A sampler within a batch sampler, and a dataset within a subset, in a persistent worker."""
    loader = DataLoader(
        Subset(Numbers(), range(12)),
        batch_sampler=Pairs(ByEpoch()),
        num_workers=1,
        persistent_workers=True,
    )
    assert read(loader, 3) == [(order_of(epoch) + 100 * epoch).tolist() for epoch in range(3)]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((3,), float(i)), torch.zeros(1)) for i in range(16)])


class Seeing(Trainer):
    seen: list[float]

    def on_train_start(self) -> None:
        self.seen = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += batch[0][:, 0].tolist()
        return self.loss(batch)


def test_validation_and_training_may_share_a_loader_with_persistent_workers() -> None:
    loader = DataLoader(Stream(), 4, num_workers=1, persistent_workers=True)
    trainer = fitted(
        Seeing, train_dataloader=loader, val_dataloader=loader, validate_every=1, epochs=1
    )
    assert trainer.seen == list(range(16))


class Stateful(DataLoader):
    def state_dict(self) -> dict[str, Any]:
        return {}


def test_a_loader_that_keeps_one_place_is_not_shared() -> None:
    loader = Stateful(Stream(), 4)
    text = message(ConfigError, train_dataloader=loader, val_dataloader={"seen": loader})
    assert "val_dataloader['seen']: it is the training loader itself" in text


class Several(Dataset):
    """Asked for several samples at once, it adds noise to each."""

    def __init__(self, noise: float) -> None:
        self.noise, self.asked = noise, 0

    def __len__(self) -> int:
        return 12

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked += 1
        return [i + self.noise * torch.rand(()) if self.noise else torch.tensor(i) for i in indices]


def test_a_sample_s_noise_does_not_depend_on_its_batch() -> None:
    """Whether samples are asked for one, four or six at a time, in passes that share a batch."""
    alone = read(DataLoader(Several(0.1), 1), 2)
    assert alone[0] != alone[1]
    assert read(DataLoader(Several(0.1), 4), 2) == alone
    assert read(DataLoader(Several(0.1), 8), 1, length=3) == [alone[0] + alone[1]]


def test_several_samples_are_asked_for_at_once_where_nothing_is_drawn() -> None:
    data = Several(0)
    assert read(DataLoader(data, 4)) == [list(range(12))]
    assert data.asked == 3


class Whole(Dataset):
    """Its `__getitems__` gives a batch."""

    def __len__(self) -> int:
        return 12

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor(indices)


def test_a_batch_that_getitems_gives_is_left_as_it_is() -> None:
    assert read(DataLoader(Whole(), 4, collate_fn=nn.Identity())) == [list(range(12))]
