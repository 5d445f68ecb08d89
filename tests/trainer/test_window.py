"""Windows: what a step sees of its micro-batches, and what is said of a batch."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch

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


def test_the_items_of_a_batch_are_its_first_tensors_rows() -> None:
    assert count_first_dimension(torch.ones(3, 2)) == 3
    assert count_first_dimension({"ids": ["a"], "x": torch.ones(4)}) == 4
    assert count_first_dimension(["text", (torch.ones(5), torch.ones(9))]) == 5
    for nothing in (["a", "b"], {}, 3, torch.tensor(1.0), None):
        with pytest.raises(DataError, match="override count_items"):
            count_first_dimension(nothing)


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
