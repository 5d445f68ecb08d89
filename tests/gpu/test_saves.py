"""Asynchronous saves: copied to pinned host memory, written during the next steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import WIDTH, Fit, Net, device, digests, fitted
from torch import nn

from paceline import CheckpointPolicy
from paceline.checkpoint import load_tree
from paceline.checkpoint.staging import Staging
from paceline.testing import StopAt

pytestmark = pytest.mark.gpu
STEPS = 6
EACH_STEP = CheckpointPolicy(every_epochs=None, every_steps=1, keep_last=None)


class Wide(Net):
    """So many weights that the next step begins while they are written."""

    def __init__(self) -> None:
        super().__init__()
        width = 2048 if device().type != "cpu" else 512
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.wide = nn.Sequential(nn.Linear(WIDTH, width), nn.Linear(width, width))
            self.back = nn.Linear(width, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.back(self.wide(x)))


def fit(**settings: Any) -> Fit:
    return fitted(model=Wide(), max_steps=STEPS, **settings)


def test_saving_each_step_changes_no_bit_and_each_copy_is_that_of_its_step(tmp_path: Path) -> None:
    plain = fit(checkpoint=None, kept=tuple(range(1, STEPS + 1)))
    saved = fit(checkpoint=EACH_STEP, run_dir=tmp_path)
    assert saved.ended == plain.ended
    for step, (weights, _) in plain.after.items():
        tree = load_tree(tmp_path / "checkpoints" / f"step_{step:08d}", parts=["models"])
        assert digests(tree["models"]["model"]) == weights, step


def test_a_run_resumed_from_such_a_save_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = fit(checkpoint=None)
    fit(checkpoint=EACH_STEP, run_dir=tmp_path, callbacks=[StopAt(4)])
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.rename(tmp_path / "the last one, which was saved synchronously")
    assert fit(checkpoint=EACH_STEP, run_dir=tmp_path).ended == whole.ended


@pytest.mark.gpu(kind="cuda")
def test_the_host_memory_is_pinned() -> None:
    """Otherwise each copy would block the host."""
    tensors = {
        "weight": torch.randn(64, 64, device=device()),
        "step": torch.ones((), device=device()),
    }
    staged = Staging().copy(tensors)
    assert all(copy.is_pinned() for copy in staged.values())
    assert digests(staged) == digests(tensors)
