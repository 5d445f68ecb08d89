"""Batches read in this process are pinned as those of workers are, if the loader says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline import World
from paceline.data import indexed
from paceline.data.loader import WindowSize, open_training
from small import batches


@pytest.mark.parametrize(("asked", "there"), [(True, True), (True, False), (False, True)])
def test_a_loader_that_pins_gives_pinned_batches(
    asked: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is an accelerator, as a DataLoader does it."""
    loader, world = batches(pin_memory=asked), World()
    pinned: list[Any] = []
    monkeypatch.setattr(indexed, "pin_memory", lambda batch: pinned.append(batch) or batch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    source = open_training(loader, WindowSize(1, None, None), 0, world)
    source.start_epoch(0)
    draw = source.draw()
    assert draw is not None
    batch = draw.batch(0)
    assert [each is batch for each in pinned] == [True] * (asked and there)
