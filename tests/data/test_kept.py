"""What samplers, datasets and loaders keep across passes comes back when a run is resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from paceline import Trainer
from paceline.testing.tracing import StopAt
from small import points, settings

Read = list[list[float]]


class Notes(Trainer):
    """Notes what each batch holds; its sampler gets new weights as each epoch begins and ends."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.seen: Read = []
        self.validated: Read = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0][:, 0].tolist())
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch[0][:, 0].tolist())
        self.log("val/loss", self.loss(batch))

    def on_train_epoch_start(self) -> None:
        if isinstance(self.train_dataloader.sampler, Adaptive):
            self.train_dataloader.sampler.weights[2 * self.current_epoch] = 0

    def on_train_epoch_end(self) -> None:
        if isinstance(self.train_dataloader.sampler, Adaptive):
            self.train_dataloader.sampler.weights[2 * self.current_epoch + 1] = 0


class Adaptive(Sampler[int]):
    """Draws by weights, which training changes and which are its state."""

    def __init__(self) -> None:
        self.weights = torch.ones(20)

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(torch.multinomial(self.weights, 20, replacement=True).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


class Position(Sampler[int]):
    """Its state is how many it has yielded, as that of torchdata's samplers."""

    yielded = skip = 0

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.skip = self.skip, 0
        for i in torch.randperm(20).tolist()[self.yielded :]:
            self.yielded += 1
            yield i

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["yielded"]


class Noise:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + float(self.rng.normal())


class Rows(Dataset[Any]):
    """Noise from generators of its own and of a transform."""

    def __init__(self) -> None:
        self.rng, self.transforms = np.random.default_rng(0), [Noise()]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        x, y = points()[index]
        return self.transforms[0](x + float(self.rng.normal())), y


class Stream(IterableDataset[Any]):
    """Rows in another order each pass, by generators of its own and a count that it saves."""

    def __init__(self) -> None:
        self.rng, self.python = np.random.RandomState(0), random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        for i in self.rng.permutation(20):
            x, y = points()[int(i)]
            yield x + self.python.random() + torch.randn(3), y


class Counts(IterableDataset[Any]):
    """Rows shifted by the number of passes, which it saves."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for x, y in points():
            yield x + self.passes, y

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


def loader(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, 4, **options)


def seeded(data: Any, **options: Any) -> DataLoader:
    return loader(data, num_workers=1, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(points(), sampler=Adaptive()),
        lambda: loader(points(), sampler=Adaptive(), drop_last=True),
        lambda: loader(points(), sampler=Position()),
        lambda: loader(Rows()),
        lambda: loader(Stream()),
        lambda: loader(Counts()),
        lambda: seeded(Stream(), persistent_workers=True),
    ],
    ids=["adaptive", "trimmed", "position", "rows", "stream", "counts", "workers"],
)
@pytest.mark.filterwarnings("ignore:resuming reads")
def test_a_resumed_run_reads_what_was_left(make: Callable[[], DataLoader], tmp_path: Path) -> None:
    """Given training and validation data of a kind, stopped in the second of three passes."""

    def run(folder: str, *callbacks: Any) -> tuple[Read, Read]:
        data: dict[str, Any] = {"train_dataloader": make(), "val_dataloader": make()}
        data |= {"callbacks": callbacks, "run_dir": tmp_path / folder, "epochs": 3}
        trainer = Notes(**settings(validate_every=8, **data))
        trainer.fit(seed=1)
        return trainer.seen, trainer.validated

    train, val = run("whole")

    parts = [run("parts", StopAt(6)), run("parts", StopAt(11)), run("parts")]

    assert [batch for part in parts for batch in part[0]] == train
    assert [batch for part in parts for batch in part[1]] == val


def test_weights_set_as_an_epoch_begins_count_in_it() -> None:
    """Given a sampler whose weights are zero but for one sample, when they are set at its start."""

    class OneSample(Notes):
        def on_train_epoch_start(self) -> None:
            self.train_dataloader.sampler.weights = torch.eye(20)[self.current_epoch]

        def on_train_epoch_end(self) -> None: ...

    trainer = OneSample(**settings(train_dataloader=loader(points(), sampler=Adaptive())))
    trainer.fit(seed=1)

    x = points().tensors[0][:, 0].tolist()
    assert trainer.seen == [[x[0]] * 4] * 5 + [[x[1]] * 4] * 5
