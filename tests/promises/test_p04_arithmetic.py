"""P4 Every sample exactly once: the arithmetic alone, all ranks in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from paceline.data.loader import open_training
from paceline.data.source import Source, WindowSize
from paceline.world.world import World


class Numbers(Dataset):
    """The i-th sample is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def world_of(rank: int, size: int) -> World:
    world = World()
    world.dp_rank, world.dp_size = rank, size
    return world


def sources(loader: Any, size: WindowSize, ranks: int) -> list[Source]:
    return [open_training(loader, size, 7, world_of(rank, ranks)) for rank in range(ranks)]


Window = list[list[list[int]]]  # by rank, then by micro-batch


def windows(ranks: list[Source], epoch: int) -> Iterator[Window]:
    """What is left of an epoch, as each rank draws it; stand-ins have no ids."""
    for source in ranks:
        source.start_epoch(epoch)
    while True:
        draws = [source.draw() for source in ranks]
        if draws[0] is None:
            assert draws == [None] * len(ranks), "every rank's epoch ends at the same window"
            return
        assert len({len(draw.sizes) for draw in draws}) == 1, "ranks take equally many batches"
        window = [
            [draw.ids(j) if size else [] for j, size in enumerate(draw.sizes)] for draw in draws
        ]
        for draw, own in zip(draws, window, strict=True):
            assert draw.sizes == [len(ids) for ids in own]
            assert draw.samples == sum(len(ids) for each in window for ids in each)
        yield window


def ids_of(window: Window) -> list[int]:
    """A window's samples in the order in which one rank would see them."""
    micro_batches = zip(*window, strict=True)
    return [sample for shares in micro_batches for share in shares for sample in share]


layouts = st.fixed_dictionaries(
    {
        "n": st.integers(1, 60),
        "batch": st.integers(1, 12),
        "ranks": st.integers(1, 5),
        "accumulation": st.integers(1, 4),
        "length": st.none() | st.integers(1, 10),
        "shuffle": st.booleans(),
    }
)


def make(n: int, batch: int, ranks: int, accumulation: int, length: int | None, shuffle: bool):
    loader = DataLoader(Numbers(n), batch, shuffle=shuffle)
    return sources(loader, WindowSize(accumulation, None, length), ranks)


@settings(max_examples=150)
@given(layouts)
def test_every_sample_once_a_pass(layout: dict[str, Any]) -> None:
    """Over as many epochs as fill whole passes, each pass holds each sample once; within a
    micro-batch ranks differ by one sample at most."""
    check_passes(layout)


def check_passes(layout: dict[str, Any]) -> None:
    ranks, n, size = make(**layout), layout["n"], layout["ranks"]
    seen: list[int] = []
    for epoch in range(4):
        before = len(seen)
        for window in windows(ranks, epoch):
            seen += ids_of(window)
            for shares in zip(*window, strict=True):
                sizes = [len(share) for share in shares]
                assert max(sizes) - min(sizes) <= 1
        units = (layout["length"] or 0) * layout["batch"] * size or n
        assert len(seen) - before == units
    for start in range(0, len(seen) - n + 1, n):
        assert sorted(seen[start : start + n]) == list(range(n))
    assert len(set(seen[-(len(seen) % n) :])) == len(seen) % n or len(seen) % n == 0


@settings(max_examples=100)
@given(layouts, st.integers(0, 2), st.integers(0, 30))
def test_any_position_is_found_again(layout: dict[str, Any], epoch: int, position: int) -> None:
    """Sources that take over a state draw what the first would have drawn."""
    ranks, others = make(**layout), make(**layout)
    drawing = windows(ranks, epoch)
    for _, _ in zip(range(position), drawing, strict=False):
        pass
    for source, other in zip(ranks, others, strict=True):
        other.load_state_dict(source.state_dict())
    assert list(windows(others, epoch)) == list(drawing)
    assert list(windows(others, epoch + 1)) == list(windows(ranks, epoch + 1))


@settings(max_examples=100)
@given(
    st.integers(1, 90),
    st.integers(1, 3),
    st.booleans(),
    st.permutations([1, 2, 3, 4, 6]),
    st.lists(st.integers(0, 5), min_size=5, max_size=5),
)
def test_another_number_of_ranks_draws_the_same_windows(
    n: int, batch: int, shuffle: bool, sizes: list[int], steps: list[int]
) -> None:
    """With `global_batch_size`, whoever goes on from anywhere: each step has the same samples."""
    check_elastic(n, batch, shuffle, sizes, steps)


def check_elastic(n: int, batch: int, shuffle: bool, sizes: list[int], steps: list[int]) -> None:
    loader = DataLoader(Numbers(n), batch, shuffle=shuffle)
    window = WindowSize(global_batch_size=12 * batch)
    whole = [ids_of(w) for epoch in (0, 1) for w in windows(sources(loader, window, 1), epoch)]
    seen: list[list[int]] = []
    state: dict[str, Any] = {"epoch": 0, "offset": 0}
    for size, count in zip([*sizes, 1], [*steps, len(whole)], strict=True):
        ranks = sources(loader, window, size)
        for source in ranks:
            source.load_state_dict(state)
        for epoch in range(state["epoch"], 2):
            drawn = zip(range(count), windows(ranks, epoch), strict=False)
            taken = [ids_of(w) for _, w in drawn]
            seen, count = seen + taken, count - len(taken)
            if count == 0:
                break
        state = ranks[0].state_dict()
    assert seen == whole
