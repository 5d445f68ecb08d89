"""Packs hold each sample once and are full; their batches go through the Trainer like any other."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from paceline import CheckpointPolicy, Trainer
from paceline.data.batches import count_first_dimension, describe, samples_in, to_device
from paceline.errors import ConfigError, DataError, ResumeError
from paceline.lm.data.packing import (
    Collate,
    PackedDataset,
    Packs,
    PaddedDataset,
    chop,
    count_trained,
    lengths_of,
    plan_packs,
)
from paceline.lm.data.sample import IGNORED, Sample
from paceline.testing import Ranks, assert_resumes_exactly

VOCABULARY = 64


def sample(number: int, length: int) -> Sample:
    """Its first token is its number; a third of its tokens, the question, is not trained."""
    ids = np.arange(number, number + 7 * length, 7, dtype=np.int32) % VOCABULARY
    ids[0] = number
    labels = ids.copy()
    labels[: length // 3] = IGNORED
    return Sample(ids, labels)


def samples(n: int = 23, longest: int = 16) -> list[Sample]:
    return [sample(i, 2 + (5 * i) % (longest - 1)) for i in range(n)]


def log_normal(n: int, capacity: int, mean: float = 150.0) -> np.ndarray:
    drawn = np.random.default_rng(3).lognormal(np.log(mean) - 0.32, 0.8, n)
    return np.clip(drawn.astype(np.int64), 1, capacity)


def rooms(packs: Packs) -> list[int]:
    return sorted(packs.capacity - sum(p.stop - p.start for p in pack) for pack in packs)


def best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The rooms left by best-fit decreasing, as a textbook has it."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in left if room >= length]
        if enough:
            left.remove(min(enough))
        left.append((min(enough) if enough else capacity) - length)
    return sorted(left)


# The plan


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_each_sample_is_in_one_pack_and_the_best_fit_is_found(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 70))
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    packs = plan_packs(lengths, capacity)
    held = [piece for pack in packs for piece in pack]
    assert sorted(held) == [(i, 0, length) for i, length in enumerate(lengths)]
    assert rooms(packs) == best_fit(lengths, capacity)
    assert min(rooms(packs)) >= 0
    assert packs.tokens == sum(lengths)
    firsts = [pack[0].sample for pack in packs]
    assert firsts == sorted(firsts)
    assert all(pack == sorted(pack) for pack in packs)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_long_samples_are_cut_into_pieces_if_asked_for(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 20))
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=30))
    packs = plan_packs(lengths, capacity, cut=True)
    held = sorted(piece for pack in packs for piece in pack)
    for i, length in enumerate(lengths):
        mine = [piece for piece in held if piece.sample == i]
        assert [piece.start for piece in mine] == list(range(0, length, capacity))
        assert [piece.stop for piece in mine] == [*range(capacity, length, capacity), length]
    assert min(rooms(packs)) >= 0
    assert packs.counts["longer than a pack, cut"] == sum(n > capacity for n in lengths)


def test_log_normal_lengths_fill_packs_to_99_percent() -> None:
    lengths = log_normal(50_000, 2048)
    packs = plan_packs(lengths, 2048)
    assert packs.fill > 0.99
    assert packs.fill == lengths.sum() / (len(packs) * 2048)


def test_the_same_lengths_give_the_same_plan_and_equal_ones_go_by_index() -> None:
    lengths = [5, 3, 5, 3, 5]
    first, again = plan_packs(lengths, 8), plan_packs(np.array(lengths), 8)
    assert [[p.sample for p in pack] for pack in first] == [[0, 1], [2, 3], [4]]
    assert list(first) == list(again)
    assert first[-1] == first[2]
    with pytest.raises(IndexError, match="3 packs"):
        first[3]


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 of 3 samples .* 4 tokens, .* sample 1 with 9: .*cut"):
        plan_packs([4, 9, 5], 4)
    with pytest.raises(DataError, match="sample 1 has no tokens"):
        plan_packs([4, 0], 4)
    with pytest.raises(DataError, match="at least one whole number"):
        plan_packs([], 4)
    with pytest.raises(ConfigError, match="cannot hold 0"):
        plan_packs([1], 0)
    with pytest.raises(DataError, match="planned for other samples"):
        PackedDataset(samples(3), plan_packs([4, 5, 6, 7], 8))


# A stream of documents


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
    st.integers(1, 25),
    st.sampled_from(["keep", "drop"]),
)
def test_chopped_packs_hold_the_stream_of_all_documents(
    lengths: list[int], capacity: int, tail: Any
) -> None:
    documents = [sample(i, length) for i, length in enumerate(lengths)]
    stream = np.concatenate([each.ids for each in documents])
    kept = len(stream) if tail == "keep" else len(stream) // capacity * capacity
    if not kept:
        with pytest.raises(DataError, match=f"{len(stream)} tokens, less than one pack"):
            chop(documents, capacity, tail=tail)
        return
    packs = chop(documents, capacity, tail=tail)
    dataset = PackedDataset(documents, packs)
    rows = [dataset[i]["input_ids"] for i in range(len(packs))]
    assert torch.cat(rows).tolist() == stream[:kept].tolist()
    assert all(len(row) == capacity for row in rows[:-1])
    assert len(rows[-1]) in (capacity, kept % capacity)
    ends = np.cumsum(lengths).tolist()
    edges = set(range(capacity, kept + (tail == "drop"), capacity))
    inside = [{*range(end - n + 1, end)} for end, n in zip(ends, lengths, strict=True)]
    what = "dropped" if tail == "drop" else "kept in a short pack"
    assert packs.counts["cut at the edge of a pack"] == sum(bool(edges & each) for each in inside)
    assert packs.counts[f"tokens of the tail, {what}"] == len(stream) % capacity


def test_a_misspelt_tail_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cut'.*keep"):
        chop(samples(), 8, tail="cut")  # type: ignore[arg-type]


# Rows and batches


def test_a_row_has_its_documents_one_after_the_other() -> None:
    documents = [sample(0, 3), sample(1, 5), sample(2, 4)]
    rows = PackedDataset(documents, plan_packs(lengths_of(documents), 8))
    row = rows[0]
    assert row["documents"] == [3, 5]
    assert row["input_ids"].tolist() == [*documents[0].ids, *documents[1].ids]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row["labels"].tolist() == [
        -100,
        *documents[0].labels[1:],
        -100,
        *documents[1].labels[1:],
    ]
    assert documents[1].labels[1] != IGNORED  # the store's own are as they were


def test_the_first_label_of_a_piece_is_ignored() -> None:
    """Also where nothing of the sample is a question: nothing before it predicts it."""
    ids = np.arange(7, dtype=np.int32)
    rows = PackedDataset([Sample(ids, ids)], plan_packs([7], 4, cut=True))
    assert [rows[i]["labels"].tolist() for i in range(2)] == [[-100, 1, 2, 3], [-100, 5, 6]]
    assert ids[0] == 0


def batch_of(rows: Any, numbers: list[int], **options: Any) -> dict[str, Any]:
    return Collate(**options)([rows[i] for i in numbers])


def test_a_batch_is_padded_by_documents_without_labels() -> None:
    documents = [sample(0, 3), sample(1, 5), sample(2, 4)]
    rows = PackedDataset(documents, plan_packs(lengths_of(documents), 8))
    batch = batch_of(rows, [0, 1], length=8, pad_id=9)
    assert batch["documents"] == [[3, 5], [4, 4]]
    assert batch["input_ids"][1].tolist() == [*documents[2].ids, 9, 9, 9, 9]
    assert batch["labels"][1, 4:].tolist() == [-100] * 4
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels", "position_ids"))
    trained = sum(len(each.ids) - max(1, len(each.ids) // 3) for each in documents)
    assert count_trained(batch) == trained


@pytest.mark.parametrize(("options", "length"), [({}, 5), ({"pad_to_multiple": 4}, 8)])
def test_padded_rows_are_as_long_as_the_longest(options: dict[str, int], length: int) -> None:
    documents = [sample(0, 3), sample(1, 5)]
    batch = batch_of(PaddedDataset(documents), [0, 1], **options)
    assert batch["input_ids"].shape == (2, length)
    assert [sum(row) for row in batch["documents"]] == [length, length]
    assert batch["documents"][0] == [3, length - 3]
    assert batch["input_ids"][1, :5].tolist() == documents[1].ids.tolist()


def test_collate_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match=r"a row has 5 tokens, more than Collate\(length=4\)"):
        batch_of(PaddedDataset([sample(0, 5)]), [0], length=4)
    with pytest.raises(ConfigError, match="1 or more"):
        Collate(length=0)
    with pytest.raises(ConfigError, match="no multiple"):
        Collate(length=10, pad_to_multiple=4)


def test_documents_stay_numbers_wherever_a_batch_goes() -> None:
    """Moved, pinned, pickled, counted and described, as the Trainer does."""
    rows = PackedDataset(samples(), plan_packs(lengths_of(samples()), 20))
    batch = batch_of(rows, [0, 1], length=20)
    copied = pickle.loads(pickle.dumps(batch["documents"]))  # noqa: S301 - as workers send it
    moved = to_device(batch, torch.device("meta"))
    assert moved["input_ids"].is_meta
    assert moved["documents"] == batch["documents"] == copied
    assert count_first_dimension(batch) == samples_in(batch) == 2
    assert describe(batch).startswith("{input_ids: (2, 20) int64")


# With the Trainer


class Next(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.out = nn.Linear(8, VOCABULARY)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.embed(ids)))


class Causal(Trainer):
    """A plain Trainer over packs, which notes the samples that begin in its batches."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[int] = []

    def count_items(self, batch: Any) -> Any:
        return count_trained(batch)

    def loss(self, batch: Any) -> torch.Tensor:
        if not self.muted:
            for ids, lengths in zip(batch["input_ids"], batch["documents"], strict=True):
                firsts = [each[0].item() for each in ids.split(lengths)]
                padded = sum(lengths) - lengths[-1] if ids[-1] == VOCABULARY - 1 else None
                self.seen += firsts if padded is None else firsts[:-1]
        logits = self.model(batch["input_ids"])[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / count_trained(batch).clamp(min=1)


def trainer(
    folder: Path | None, *, dropout: float = 0.3, workers: int = 0, **changes: Any
) -> Causal:
    """13 or so packs, two rows a micro-batch."""
    model = Next(dropout)
    store = samples(40)
    packs = plan_packs(lengths_of(store), changes.pop("capacity", 32))
    return Causal(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train_dataloader=DataLoader(
            PackedDataset(store, packs),
            batch_size=2,
            shuffle=True,
            num_workers=workers,
            collate_fn=Collate(length=packs.capacity, pad_id=VOCABULARY - 1),
        ),
        **{
            "epochs": 2,
            "progress": False,
            "checkpoint": CheckpointPolicy(every_steps=3),
            "run_dir": folder,
            "log_every": 2,
            **changes,
        },
    )


def interrupted(folder: Path) -> Causal:
    return trainer(folder, workers=1, epochs=1, gradient_accumulation_steps=2)


def test_packs_resume_exactly(tmp_path: Path) -> None:
    """In new processes, on two ranks, in mid-epoch, with dropout and loader workers."""
    assert_resumes_exactly(interrupted, tmp_path, stop_at=2, ranks=2)


def trained_on(folder: Path) -> tuple[list[int], torch.Tensor]:
    one = trainer(None, dropout=0.0, epochs=1, global_batch_size=4)
    one.fit(seed=1)
    return one.seen, one.model.out.weight.detach().clone()


def test_each_sample_is_trained_once_at_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """And a mean over trained tokens, uneven over ranks, gives the weights of one process."""
    ((alone, weight),) = ranks(trained_on, 1, tmp_path)
    both = ranks(trained_on, 2, tmp_path)
    assert sorted(alone) == list(range(40))
    assert sorted(both[0][0] + both[1][0]) == list(range(40))
    for _, weight_of_rank in both:
        torch.testing.assert_close(weight_of_rank, weight, rtol=0, atol=1e-6)


def test_a_run_does_not_go_on_with_other_packs(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).fit(seed=1)
    with pytest.raises(ResumeError) as caught:
        trainer(tmp_path, max_steps=4, capacity=40).fit(seed=1)
    assert "data.dataset.capacity" in str(caught.value)


class Kept(list[Sample]):
    def run_identity(self) -> dict[str, Any]:
        return {"key": "abc"}


def test_a_dataset_says_what_its_samples_say() -> None:
    rows = PackedDataset(Kept(samples()), plan_packs(lengths_of(samples()), 16))
    said = rows.run_identity()
    assert said["samples.key"] == "abc"
    assert said["capacity"] == 16
    other = plan_packs(lengths_of(samples())[::-1], 16)
    assert said["packs"] != other.run_identity()["packs"]
