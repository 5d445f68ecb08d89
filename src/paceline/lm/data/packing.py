"""Packing: several documents in each row of a batch, so that little of it is padding.

A plan says which samples, or pieces of them, share a row. It is made from lengths alone, so no
sample is read for it, and it is a map-style set: order, exact resume and O(1) resume are the
Trainer's own.

    packs = plan_packs(lengths_of(samples), capacity=2048)
    rows = PackedDataset(samples, packs)
    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=Collate(length=2048))

Position ids restart with each document, and its first label is ignored: nothing predicts it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from paceline.errors import ConfigError, DataError
from paceline.lm.data.sample import IGNORED, Sample

CUT = "longer than a pack, cut"
CUT_AT_EDGE = "cut at the edge of a pack"
TAIL_DROPPED = "tokens of the tail, dropped"
TAIL_KEPT = "tokens of the tail, kept in a short pack"


class Piece(NamedTuple):
    """What a pack takes of a sample: its tokens from `start` to `stop`, most often all."""

    sample: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Packs(Sequence[list[Piece]]):
    """Which pieces of samples share a row: a map-style set of packs.

    Attributes:
        capacity: tokens that a pack holds at most.
        samples: index of each piece's sample, [pieces] int64, one pack after the other.
        starts, stops: the part of the sample that a piece is, in tokens, [pieces] int64.
        bounds: the pieces of pack i are bounds[i] to bounds[i + 1], [packs + 1] int64.
        counts: what was cut or dropped, by reason.
    """

    capacity: int
    samples: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    bounds: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> list[Piece]:  # pyright: ignore - no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} packs, and no number {index}")
        index %= len(self)
        pieces = slice(self.bounds[index], self.bounds[index + 1])
        columns = (each[pieces].tolist() for each in (self.samples, self.starts, self.stops))
        return [Piece(*piece) for piece in zip(*columns, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens in all packs."""
        return int((self.stops - self.starts).sum())

    @property
    def fill(self) -> float:
        """The part of all packs' room that tokens take, 0 to 1."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 0.0

    def run_identity(self) -> Mapping[str, Any]:
        """The capacity, and a digest of what is in each pack."""
        found = hashlib.sha256()
        for each in (self.samples, self.starts, self.stops, self.bounds):
            found.update(np.ascontiguousarray(each, dtype="<i8").data)
        return {"capacity": self.capacity, "packs": found.hexdigest()[:16]}


def lengths_of(samples: Sequence[Sample]) -> np.ndarray:
    """The tokens of each sample, [samples] int64: a store's own `lengths` if it has them."""
    known = getattr(samples, "lengths", None)
    if known is None:
        known = np.fromiter((len(sample.ids) for sample in samples), np.int64, len(samples))
    return np.asarray(known, np.int64)


def plan_packs(lengths: Sequence[int] | np.ndarray, capacity: int, *, cut: bool = False) -> Packs:
    """Shares samples out to packs, best fit first: each, from the longest on, goes where it leaves
    least room.

    Equal lengths are placed in order of their index, and of packs with the same room the first is
    taken, so the plan is always the same. Packs are in
    the order of their first samples, and a pack's samples in order, so that a loader that does not
    shuffle keeps roughly the order of the samples.

    Args:
        lengths: tokens of each sample.
        capacity: tokens that a pack holds.
        cut: cut samples that are longer than a pack into pieces, which are counted; else they are
            refused.

    Raises:
        DataError: a sample is empty, or longer than a pack.
    """
    lengths = _checked(lengths, capacity)
    counts: Counter[str] = Counter()
    longer = np.flatnonzero(lengths > capacity)
    if len(longer) and not cut:
        first = longer[0]
        raise DataError(
            f"{len(longer)} of {len(lengths)} samples are longer than a pack of {capacity} tokens, "
            f"the first of them sample {first} with {lengths[first]}: truncate them, raise the "
            "capacity, or cut them into pieces (cut=True)."
        )
    if len(longer):
        counts[CUT] = len(longer)
    pieces_of = -(-lengths // capacity)
    samples = np.repeat(np.arange(len(lengths)), pieces_of)
    first_piece = np.cumsum(pieces_of) - pieces_of
    starts = (np.arange(len(samples)) - first_piece[samples]) * capacity
    stops = np.minimum(starts + capacity, lengths[samples])
    sizes = stops - starts
    order = np.argsort(-sizes, kind="stable")
    pack_of = np.empty(len(sizes), np.int64)
    pack_of[order] = _best_fit(sizes[order], capacity)
    # Number the packs by their first piece, and sort the pieces of each by their order.
    _, first = np.unique(pack_of, return_index=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    pack_of = number[pack_of]
    order = np.argsort(pack_of, kind="stable")
    bounds = np.searchsorted(pack_of[order], np.arange(len(first) + 1))
    return Packs(capacity, samples[order], starts[order], stops[order], bounds, counts)


def chop(
    samples: Sequence[Sample], capacity: int, *, tail: Literal["keep", "drop"] = "keep"
) -> Packs:
    """Packs of exactly `capacity` tokens, cut from all samples one after the other.

    A document that crosses a pack's edge continues in the next pack, as a document of its own.
    What was cut, kept or dropped is counted.

    Args:
        samples: the documents, in the order in which they follow each other.
        capacity: tokens of a pack.
        tail: "keep" what is left at the end as a last, shorter pack; or "drop" it.

    Raises:
        DataError: a document is empty, or all of them together do not fill a pack that is to be
            kept.
    """
    if tail not in ("keep", "drop"):
        raise ConfigError(f'chop(tail={tail!r}): give "keep" or "drop".')
    lengths = _checked(lengths_of(samples), capacity)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    left = total % capacity
    kept = total - left if tail == "drop" else total
    if not kept:
        raise DataError(
            f"all {len(lengths)} documents together have {total} tokens, less than one pack of "
            f'{capacity}, so tail="drop" leaves nothing: lower the capacity or keep the tail.'
        )
    counts: Counter[str] = Counter()
    if left:
        counts[TAIL_KEPT if tail == "keep" else TAIL_DROPPED] = left
    begins = ends - lengths
    if cut := int((((ends - 1) // capacity > begins // capacity) & (begins < kept)).sum()):
        counts[CUT_AT_EDGE] = cut
    edges = np.arange(0, kept, capacity)
    starts = np.union1d(begins[begins < kept], edges)
    stops = np.append(starts[1:], kept)
    of = np.searchsorted(ends, starts, side="right")
    bounds = np.append(np.searchsorted(starts, edges), len(starts))
    return Packs(capacity, of, starts - begins[of], stops - begins[of], bounds, counts)


def _checked(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    found = np.asarray(lengths)
    if capacity < 1:
        raise ConfigError(f"a pack cannot hold {capacity} tokens: give a capacity of 1 or more.")
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise DataError(
            f"lengths are a list of at least one whole number, and not {lengths!r:.60}."
        )
    if (found < 1).any():
        empty = int(np.flatnonzero(found < 1)[0])
        raise DataError(f"sample {empty} has no tokens: leave empty samples out.")
    return found.astype(np.int64)


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each piece, by best-fit decreasing.

    Pieces of one size, and packs with the same room, are dealt with together: as long as the room
    is the smallest that is enough, a pack takes one piece after the other.

    Args:
        sizes: in falling order.
        capacity: of a pack.
    """
    rooms = _Rooms(capacity)
    packs: dict[int, deque[int]] = {}  # by the room that is left
    found: list[int] = []
    opened = 0
    different, at = np.unique(-sizes, return_index=True)
    many = np.diff(np.append(at, len(sizes))).tolist()
    for size, count in zip((-different).tolist(), many, strict=True):
        while count:
            room = rooms.least(size)
            each = (room or capacity) // size  # pieces of this size that fit in
            wanted = -(-count // each)
            if room is None:
                room = capacity
                taken = list(range(opened, opened + wanted))
                opened += wanted
            else:
                waiting = packs[room]
                taken = [waiting.popleft() for _ in range(min(wanted, len(waiting)))]
                if not waiting:
                    del packs[room]
                    rooms.remove(room)
            last = min(count - (len(taken) - 1) * each, each)  # pieces in the last of them
            for pack in taken[:-1]:
                found += [pack] * each
            found += [taken[-1]] * last
            count -= (len(taken) - 1) * each + last
            for left, these in ((room - each * size, taken[:-1]), (room - last * size, taken[-1:])):
                if left and these:
                    packs.setdefault(left, deque()).extend(these)
                    rooms.add(left)
    return np.array(found, np.int64)


class _Rooms:
    """A set of whole numbers up to a limit, which finds its least one from a number on.

    The numbers are bits of a few integers, and a further integer says which of these are not zero,
    so that nothing depends on how many numbers there are.

    Args:
        limit: the largest number.
    """

    def __init__(self, limit: int) -> None:
        self._shift = (limit.bit_length() + 1) // 2
        self._parts = [0] * ((limit >> self._shift) + 1)
        self._filled = 0

    def add(self, number: int) -> None:
        part = number >> self._shift
        self._parts[part] |= 1 << (number - (part << self._shift))
        self._filled |= 1 << part

    def remove(self, number: int) -> None:
        part = number >> self._shift
        self._parts[part] &= ~(1 << (number - (part << self._shift)))
        if not self._parts[part]:
            self._filled &= ~(1 << part)

    def least(self, number: int) -> int | None:
        """The least number in the set that is not below this one; None if there is none."""
        part = number >> self._shift
        within = number - (part << self._shift)
        if bits := self._parts[part] >> within:
            return number + _lowest(bits)
        if not (parts := self._filled >> (part + 1)):
            return None
        part += 1 + _lowest(parts)
        return (part << self._shift) + _lowest(self._parts[part])


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


class PackedDataset(Dataset[dict[str, Any]]):
    """Rows of packed samples, one for each pack.

    A row has `input_ids`, `labels` and `position_ids`, [tokens] int64, and `documents`, the number
    of tokens of each of its documents. `Collate` makes a batch of rows.

    Args:
        samples: a store of samples.
        packs: which of them share a row, planned from their lengths.

    Raises:
        DataError: the packs were planned for other samples.
    """

    def __init__(self, samples: Sequence[Sample], packs: Packs) -> None:
        self.samples = samples
        self.packs = packs
        lengths = lengths_of(samples)
        if (
            packs.samples.max(initial=-1) >= len(lengths)
            or (packs.stops > lengths[packs.samples]).any()
        ):
            raise DataError(
                f"the packs were planned for other samples than these {len(lengths)}: plan them "
                "from lengths_of(samples)."
            )

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels, positions, documents = [], [], [], []
        for number, start, stop in self.packs[index]:
            sample = self.samples[number]
            ids.append(sample.ids[start:stop])
            trained = np.array(sample.labels[start:stop], np.int64)
            trained[0] = IGNORED  # nothing before it predicts it
            labels.append(trained)
            positions.append(np.arange(stop - start))
            documents.append(stop - start)
        return {
            "input_ids": _tensor(ids),
            "labels": _tensor(labels),
            "position_ids": _tensor(positions),
            "documents": documents,
        }

    def run_identity(self) -> Mapping[str, Any]:
        """What is in each pack, and what the samples say of themselves."""
        said = dict(self.packs.run_identity())
        say = getattr(self.samples, "run_identity", None)
        if callable(say):
            of_samples: Any = say()
            said |= {f"samples.{key}": value for key, value in of_samples.items()}
        return said


class PaddedDataset(PackedDataset):
    """Rows of one sample each, in the form of `PackedDataset`, for models that cannot be packed.

    Args:
        samples: a store of samples, none of them empty.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        lengths = _checked(lengths_of(samples), 1)
        each = np.arange(len(lengths) + 1)
        super().__init__(
            samples,
            Packs(int(lengths.max()), each[:-1], np.zeros_like(lengths), lengths, each),
        )


def _tensor(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@dataclass(frozen=True)
class Collate:
    """Makes a batch of rows: a `collate_fn`.

    The batch has `input_ids`, `labels` and `position_ids`, [rows, length] int64, and `documents`,
    the tokens of each row's documents, as numbers that no device has to be asked for. Padding at a
    row's end is a last document of its own, without labels and with position 0 throughout.

    Args:
        length: tokens of each row, such as the packs' capacity, so that all batches have one shape;
            None: those of the longest row in the batch.
        pad_to_multiple: without `length`, rows are padded to a multiple of so many tokens.
        pad_id: the token that fills up rows.
    """

    length: int | None = None
    pad_to_multiple: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.pad_to_multiple < 1 or (self.length is not None and self.length < 1):
            raise ConfigError(
                f"Collate(length={self.length}, pad_to_multiple={self.pad_to_multiple}): give "
                "numbers of tokens, 1 or more."
            )
        if self.length is not None and self.length % self.pad_to_multiple:
            raise ConfigError(
                f"Collate(length={self.length}) is no multiple of pad_to_multiple="
                f"{self.pad_to_multiple}: give one of the two."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch.

        Args:
            rows: of a `PackedDataset` or `PaddedDataset`.

        Raises:
            DataError: a row is longer than `length`.
        """
        sizes = [len(row["input_ids"]) for row in rows]
        longest = max(sizes)
        length = self.length or -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        if longest > length:
            raise DataError(
                f"a row has {longest} tokens, more than Collate(length={length}): give the "
                "capacity with which the packs were planned."
            )
        fillers = {"input_ids": self.pad_id, "labels": IGNORED, "position_ids": 0}
        batch: dict[str, Any] = {}
        for name, filler in fillers.items():
            whole = torch.full((len(rows), length), filler, dtype=torch.int64)
            for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
                whole[i, :size] = row[name]
            batch[name] = whole
        batch["documents"] = [
            [*row["documents"], *([length - size] if size < length else [])]
            for row, size in zip(rows, sizes, strict=True)
        ]
        return batch


def count_trained(batch: Mapping[str, Any]) -> torch.Tensor:
    """The trained tokens of a batch, as a number on its device: a trainer's `count_items`.

    Args:
        batch: with `labels`, [rows, length].
    """
    return (batch["labels"][:, 1:] != IGNORED).sum()
