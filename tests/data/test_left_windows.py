"""A window that is left unread, or read in part, moves no later window's samples."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

from paceline.data.loader import open_training
from paceline.data.source import WindowSize
from paceline.world.world import World


def windows(read: dict[int, int], workers: int = 0) -> list[list[list[int]]]:
    """The ids of each micro-batch of each window; of window i only `read[i]` are asked for."""
    data = DataLoader(TensorDataset(torch.arange(30)), 3, shuffle=True, num_workers=workers)
    source = open_training(data, WindowSize(gradient_accumulation_steps=2), 0, World())
    source.start_epoch(0)
    seen = []
    while (draw := source.draw()) is not None:
        asked = read.get(len(seen), len(draw.sizes))
        batches = [draw.batch(j)[0].tolist() for j in range(asked)]
        assert batches == [draw.ids(j) for j in range(asked)]
        seen.append(batches)
    source.close()
    return seen


def test_a_window_passed_over_shifts_nothing():
    whole = windows({})
    assert windows({1: 0, 3: 0}) == [whole[0], [], whole[2], [], whole[4]]


def test_a_window_left_half_way_shifts_nothing():
    whole = windows({})
    assert windows({2: 1}, workers=2) == [*whole[:2], whole[2][:1], *whole[3:]]
