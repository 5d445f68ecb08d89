"""`run_ranks`: what ranks return, that a failure is shown, and that a hang ends in time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from paceline import Trainer, World
from paceline.testing import Ranks, RanksFailed, run_ranks


def sum_of_ranks(factor: torch.Tensor) -> torch.Tensor:
    world = World()
    world.open()
    try:
        return world.all_reduce(torch.tensor(float(world.rank + 1))) * factor
    finally:
        world.close()


def test_ranks_meet_and_return_tensors() -> None:
    values = run_ranks(sum_of_ranks, 3, torch.tensor([1.0, 2.0]))
    assert [value.tolist() for value in values] == [[6.0, 12.0]] * 3


def hang_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        threading.Event().wait()


def test_a_hang_ends_in_time_and_says_where() -> None:
    begun = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run_ranks(hang_on_rank_1, 2, limit=0.5)
    assert time.monotonic() - begun < 30
    said = str(caught.value)
    assert "rank 1 of 2 hung and was killed" in said
    assert "in hang_on_rank_1" in said
    assert "rank 0" not in said


class Hanging(Trainer):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        threading.Event().wait()
        return self.model(batch).mean()


def hang_in_training() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = DataLoader(torch.ones(2, 1))  # pyright: ignore[reportArgumentType]
    trainer = Hanging(model, optimizer, train_dataloader=rows, epochs=1, progress=False)
    trainer.train()


def test_a_hang_in_training_says_where_too() -> None:
    """The trainer handles the signals that ask a process for something."""
    with pytest.raises(RanksFailed, match=r"line \d+ in training_step"):
        run_ranks(hang_in_training, 1, limit=2)


def fail_on_rank_1() -> None:
    print("at work")
    if os.environ["RANK"] == "1":
        raise ValueError("broken on purpose")


def test_the_error_of_a_rank_is_shown(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2 exited with code 1.*broken on purpose"):
        ranks(fail_on_rank_1, 2)
    assert [one.code for one in ranks.outcomes(fail_on_rank_1, 2)] == [0, 1]
    assert ranks.outcomes(fail_on_rank_1, 1)[0].output == "at work\n"


def leave(code: int) -> None:
    sys.exit(code)


def wait_for_a_signal() -> None:
    signal.pause()


def test_how_ranks_leave_is_told(ranks: Ranks) -> None:
    assert [one.code for one in ranks.outcomes(leave, 2, 75)] == [75, 75]
    waiting = ranks.start(wait_for_a_signal, 2)
    assert not waiting.ended
    waiting.signal(signal.SIGTERM)
    assert [one.code for one in waiting.wait(20)] == [-signal.SIGTERM] * 2
    assert waiting.ended


def start_of_the_group() -> bool:
    return dist.is_initialized()


def test_ranks_are_new_each_time(ranks: Ranks) -> None:
    """The one before had joined a group; its helper has not."""
    run_ranks(sum_of_ranks, 2, torch.ones(1))
    assert run_ranks(start_of_the_group, 2) == [False, False]


def test_what_cannot_be_imported_is_refused(ranks: Ranks, tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_module.py").write_text("def run(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import broken_module  # pyright: ignore[reportMissingImports]

    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    with pytest.raises(RanksFailed, match=r"(?s)cannot import broken_module:.*ZeroDivisionError"):
        ranks(broken_module.run, 1)
    assert ranks.outcomes(leave, 1, 3)[0].code == 3  # and the helper goes on
    with pytest.raises(TypeError, match="top level"):
        ranks(lambda: None, 1)
