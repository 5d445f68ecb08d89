"""Batches that a Trainer cannot use, and who is blamed for an error: the batch or the code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset

from paceline import Callback, Trainer, Window
from paceline.errors import (
    DataError,
    PacelineError,
)
from small import batches, fitted, message, points, settings, wide


class Nothing(Dataset):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


class NoBatches:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Nothing()),
        DataLoader(TensorDataset(torch.ones(0, 3), torch.ones(0, 1))),
        DataLoader(points(), batch_sampler=BatchSampler([], 2, False)),
        [],
        NoBatches(),
    ],
    ids=["no rows", "no tensor rows", "empty batch sampler", "empty list", "empty iterable"],
)
def test_an_empty_loader(loader: Any) -> None:
    text = message(DataError, train_dataloader=loader)
    assert "no batch" in text or "empty" in text
    assert "train" in text
    assert "val" in message(DataError, val_dataloader=loader)


def test_drop_last_that_drops_everything() -> None:
    loader = batches(3, 4, drop_last=True)
    text = message(DataError, train_dataloader=loader)
    assert "drop_last drops everything: the data have 3 samples and batch_size is 4" in text


def test_a_batch_without_a_tensor_cannot_be_counted() -> None:
    class Words:
        def __iter__(self) -> Iterator[Any]:
            yield ["a", "b"]

    text = message(DataError, train_dataloader=Words())
    assert "cannot count the items of a batch of type list" in text
    assert "override count_items" in text


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ({"x": torch.ones(4, 3), "y": torch.ones(4, 1)}, "a dict with 'x', 'y'"),
        ({"labels": torch.ones(4), "targets": torch.ones(4)}, "a dict with 'labels', 'targets'"),
        ((torch.ones(4, 3),) * 3, "a tuple of 3"),
        (torch.ones(2, 3), "a Tensor"),
    ],
    ids=["no targets", "two targets", "three", "a tensor of two rows"],
)
def test_a_batch_of_which_inputs_and_targets_are_not_known(batch: Any, shown: str) -> None:
    text = message(DataError, train_dataloader=[batch])
    assert f"or a mapping with either 'labels' or 'targets'; this one is {shown}." in text


def test_a_first_batch_that_the_model_cannot_take_is_described() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        fitted(train_dataloader=wide())
    (text,) = caught.value.__notes__
    assert "training_step failed on its first batch: step 1, batch 0 of epoch 0, rank 0" in text
    assert "list[(4, 4) float32, (4, 1) float32]; samples [0, 1, 2, 3]" in text
    assert "Do the shapes, the dtypes" in text


def test_a_model_that_gets_a_dictionary_is_told_so() -> None:
    batch = {"x": torch.ones(4, 3), "labels": torch.ones(4)}
    with pytest.raises(TypeError) as caught:
        fitted(train_dataloader=[batch])
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "must be Tensor, not dict" in text
    assert "The model got a dictionary of all but the targets" in text


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError, IndexError, KeyError])
@pytest.mark.parametrize("where", ["training_step", "validation_step", "loss", "step"])
def test_an_error_at_the_first_batch_keeps_its_type_and_describes_the_batch(
    kind: type[Exception], where: str
) -> None:
    def fails(*_: Any) -> None:
        raise kind("odd")

    def step(self: Trainer, window: Window) -> None:
        for batch, _ in window:
            fails(batch)

    body = step if where == "step" else fails
    trainer = type("Mine", (Trainer,), {where: body})
    with pytest.raises(kind, match="odd") as caught:
        trainer(**settings(val_dataloader=batches(8))).fit()
    assert type(caught.value) is kind, "an error keeps its type, whatever the batch"
    text = caught.value.__notes__[0]
    assert "failed on its first batch: " in text
    assert "(4, 3) float32" in text


def test_a_later_batch_keeps_its_error_and_gets_a_note() -> None:
    class Ragged(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            return torch.ones(3 + (index >= 8)), torch.ones(1)

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        fitted(train_dataloader=DataLoader(Ragged(), 4))
    assert not isinstance(caught.value, PacelineError)
    assert caught.value.__notes__ == [
        "in step 3, batch 2 of epoch 0, rank 0: list[(4, 4) float32, (4, 1) float32]; "
        "samples [8, 9, 10, 11]"
    ]


def test_a_later_validation_batch_keeps_its_error_and_gets_a_note() -> None:
    class Fails(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if (self.global_step, batch_idx) in ((10, 0), (10, 1)):
                raise ValueError("odd")

    with pytest.raises(ValueError, match="odd") as caught:
        fitted(Fails, val_dataloader=batches(8))
    assert not isinstance(caught.value, PacelineError)
    assert caught.value.__notes__[0].startswith("in the validation after step 10, batch 0, rank 0")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), torch.OutOfMemoryError("x")])
def test_other_errors_in_the_first_batch_keep_their_type(error: Exception) -> None:
    trainer = Trainer(**settings())

    def fails(batch: Any, batch_idx: int) -> None:
        raise error

    trainer.training_step = fails
    with pytest.raises(type(error)) as caught:
        trainer.fit()
    assert "samples [0, 1, 2, 3]" in caught.value.__notes__[0]


def test_an_error_of_a_callback_is_no_data_error() -> None:
    trainer = Trainer(**settings())
    trainer.on_train_batch_start = lambda batch, batch_idx: {}["mine"]
    with pytest.raises(KeyError, match="mine"):
        trainer.fit()


def test_an_error_between_windows_blames_no_batch() -> None:
    trainer = Trainer(**settings())
    trainer.on_step_end = lambda metrics: {}["mine"]
    with pytest.raises(KeyError) as caught:
        trainer.fit()
    assert not hasattr(caught.value, "__notes__")


def test_hooks_that_fail_at_the_end_keep_no_other_from_running() -> None:
    heard: list[str] = []

    class Fails(Callback):
        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            raise OSError("in on_exception")

        def on_teardown(self, trainer: Trainer) -> None:
            raise OSError("in on_teardown")

    class Hears(Callback):
        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            heard.append(str(error))

        def on_teardown(self, trainer: Trainer) -> None:
            heard.append("teardown")

    trainer = Trainer(**settings(callbacks=[Fails(), Hears()]))
    trainer.on_after_backward = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.fit()
    assert heard == ["division by zero", "teardown"]
    assert caught.value.__notes__[1:] == [
        "then, as the run ended: OSError: in on_exception",
        "then, as the run ended: OSError: in on_teardown",
    ]
    with pytest.raises(OSError, match="in on_teardown"):
        fitted(callbacks=[Fails(), Hears()])
    assert heard[2:] == ["teardown"]


@pytest.mark.parametrize("count", [float("nan"), -3, "many"], ids=str)
def test_what_is_no_number_of_items_is_refused(count: object) -> None:
    class Counting(Trainer):
        def count_items(self, batch: object) -> object:
            return count

    assert "count_items(batch) returned" in message(DataError, Counting)
