"""Windows: what a step sees of its micro-batches, and what is said of a batch."""

from __future__ import annotations

from collections import UserDict, defaultdict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from paceline import Trainer, Window
from paceline.data.batches import count_first_dimension, describe, to_device
from paceline.errors import DataError
from small import batches, fitted, settings

Pair = namedtuple("Pair", "left right")


class Notes(Trainer):
    """Notes what each window says of itself."""

    def step(self, window: Window) -> None:
        inside = [
            (batch_idx, window.batch_idx, window.weight, window.is_last, window.ids())
            for _, batch_idx in window
        ]
        self.notes.append((len(window), window.items, window.samples, inside))

    notes: list[Any]


def test_a_window_and_its_micro_batches() -> None:
    trainer = type("Own", (Notes,), {"notes": []})
    fitted(trainer, train_dataloader=batches(7, 2), gradient_accumulation_steps=2, epochs=1)
    assert trainer.notes == [
        (2, 4, 4, [(0, 0, 0.5, False, [0, 1]), (1, 1, 0.5, True, [2, 3])]),
        (2, 3, 3, [(2, 2, 2 / 3, False, [4, 5]), (3, 3, 1 / 3, True, [6])]),
    ]


def test_items_are_the_weight_of_what_is_logged() -> None:
    class Logs(Trainer):
        def step(self, window: Window) -> None:
            for _, batch_idx in window:
                self.log("mine", float(batch_idx))
            self.log("after", 5.0)

    seen: list[Any] = []
    trainer = Logs(**settings(train_dataloader=batches(7, 2), epochs=1, log_every=4))
    trainer.on_step_end = lambda metrics: seen.append(metrics) if metrics else None
    trainer.fit()
    assert seen[0]["mine"] == pytest.approx((0 * 2 + 1 * 2 + 2 * 2 + 3 * 1) / 7)
    assert seen[0]["after"] == 5.0


def test_the_items_of_a_batch_are_the_rows_that_its_tensors_share() -> None:
    x, y = torch.ones(4, 3), torch.ones(4)
    assert count_first_dimension(x) == 4
    for batch in ([x, y], (x, x), {"ids": ["a"], "x": x}, [(x, x), y], ((x, x), (y, y)), ("a", x)):
        assert count_first_dimension(batch) == 4
    for nothing in (["a", "b"], {}, 3, torch.tensor(1.0), None):
        with pytest.raises(DataError, match="override count_items"):
            count_first_dimension(nothing)


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(3, 2, 2)] * 4,
        [torch.ones(3, 2, 2)] * 2,
        [torch.ones(5), torch.ones(7), torch.ones(2)],
        [{"x": torch.ones(3)}] * 4,
        [(torch.ones(3), torch.ones(3))] * 4,
        ((torch.ones(3, 2, 2), torch.ones(3, 2, 2)), ({"boxes": torch.ones(1, 4)}, {})),
    ],
    ids=["images", "two images", "sequences", "mappings", "pairs", "images and boxes"],
)
def test_a_batch_whose_items_cannot_be_told_is_asked_about(batch: Any) -> None:
    with pytest.raises(DataError, match=r"cannot count the items .*: override count_items"):
        count_first_dimension(batch)


class Images(IterableDataset):
    """Ten images of three channels."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.full((3, 2, 2), float(i)) for i in range(10)])


class MeanOfImages(Trainer):
    def loss(self, batch: Any) -> torch.Tensor:
        return torch.stack([self.model(image.mean().view(1)) for image in batch]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/mean", torch.stack([image.mean() for image in batch]).mean())


class CountedImages(MeanOfImages):
    def count_items(self, batch: Any) -> int:
        return len(batch)


def test_a_stream_of_lists_weighs_what_the_user_counts() -> None:
    """Given ten streamed images in lists of 4, 4 and 2, the mean of 0 to 9 is 4.5."""
    given: dict[str, Any] = {
        "train_dataloader": DataLoader(Images(), 4, collate_fn=list),
        "val_dataloader": DataLoader(Images(), 4, collate_fn=list),
        "gradient_accumulation_steps": 3,
        "epochs": 1,
        "progress": False,
    }
    for kind in (MeanOfImages, CountedImages):
        model = torch.nn.Linear(1, 1)
        before = model.weight.item()
        trainer = kind(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.125), **given
        )
        if kind is MeanOfImages:
            with pytest.raises(DataError, match="list of 4 samples"):
                trainer.fit()
            continue
        result = trainer.fit()
        assert model.weight.item() == pytest.approx(before - 0.125 * 4.5)
        assert result.metrics["val/mean"] == pytest.approx(4.5)
        assert trainer.progress.samples == 10


def test_a_stream_that_torch_stacks_counts_its_rows() -> None:
    """Three tensors of one shape, which torch's collate_fn gives as a list, are no samples."""

    class Three(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(1), torch.ones(1), torch.ones(1))] * 10)

    class Mine(Trainer):
        def loss(self, batch: Any) -> torch.Tensor:
            return self.model(batch[0]).mean()

    model = torch.nn.Linear(1, 1)
    trainer = Mine(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), progress=False,
        train_dataloader=DataLoader(Three(), 4), val_dataloader=DataLoader(Three(), 4), epochs=1,
    )  # fmt: skip
    trainer.fit()
    assert trainer.progress.samples == 10


def test_a_batch_is_described_by_shapes_and_dtypes() -> None:
    batch = {"x": torch.ones(2, 3), "y": [torch.ones(2, dtype=torch.int64), "a"]}
    assert describe(batch) == "{x: (2, 3) float32, y: list[(2,) int64, str]}"


def test_a_batch_keeps_its_containers_on_the_way_to_a_device() -> None:
    class Own:
        def to(self, device: torch.device) -> str:
            return f"moved to {device}"

    cpu = torch.device("cpu")
    batch = {"pair": Pair(torch.ones(1), "b"), "list": [torch.ones(2)], "own": Own(), "n": 3}
    moved = to_device(batch, cpu)
    assert isinstance(moved["pair"], Pair)
    assert (moved["pair"].right, moved["own"], moved["n"]) == ("b", "moved to cpu", 3)
    assert isinstance(moved["list"], list)


@dataclass(frozen=True)
class Item:
    x: torch.Tensor
    more: Any


def test_a_batch_of_dataclasses_and_kinds_of_dictionaries_goes_to_a_device_whole() -> None:
    """At any depth; what was given stays where it was."""
    nested = defaultdict(list, pairs=[Pair(torch.ones(1), UserDict(z=(torch.ones(1), "a")))])
    batch = Item(torch.ones(2), nested)
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Item)
    assert isinstance(moved.more, defaultdict)
    assert moved.more.default_factory is list
    [pair] = moved.more["pairs"]
    assert (type(pair), type(pair.right)) == (Pair, UserDict)
    assert [t.device.type for t in (moved.x, pair.left, pair.right["z"][0])] == ["meta"] * 3
    assert pair.right["z"][1] == "a"
    left = (batch.x, nested["pairs"][0].left, nested["pairs"][0].right["z"][0])
    assert [t.device.type for t in left] == ["cpu"] * 3
