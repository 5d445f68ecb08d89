"""MemorySnapshot writes what torch recorded of memory in the steps asked for, and in no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_trainer import FakeTrainer
from real_runs import build

from paceline.callbacks import MemorySnapshot
from paceline.errors import ConfigError


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that switch torch's record on and off; a snapshot is a block for each call."""
    calls: list[Any] = []
    memory = torch.cuda.memory

    def snapshot() -> dict[str, Any]:
        block = {"size": 512, "state": "active_allocated"}
        return {"segments": [{"blocks": [block]}], "device_traces": [[*calls]], "more": object()}

    monkeypatch.setattr(memory, "_record_memory_history", lambda **how: calls.append(how))
    monkeypatch.setattr(memory, "_snapshot", snapshot)
    return calls


def on_gpu(folder: Path, *callbacks: MemorySnapshot) -> FakeTrainer:
    trainer: Any = FakeTrainer(*callbacks)
    trainer.run_dir, trainer.device = folder, torch.device("cuda")
    trainer.world.rank = 1
    return trainer


def test_the_steps_asked_for_are_recorded(tmp_path: Path, recorded: list[Any]) -> None:
    trainer = on_gpu(tmp_path, MemorySnapshot(3, 2, max_entries=9)).start()
    trainer.step(2)
    assert recorded == [{"max_entries": 9, "stacks": "python"}]
    trainer.step(4)
    assert recorded[1:] == [{"enabled": None}]
    [path] = (tmp_path / "memory").iterdir()
    assert path.name == "steps_3-4_rank_1.json"
    written = json.loads(path.read_text())
    assert written["segments"][0]["blocks"] == [{"size": 512, "state": "active_allocated"}]
    assert written["device_traces"] == [recorded[:1]]


def test_a_step_that_runs_out_of_memory_is_written(tmp_path: Path, recorded: list[Any]) -> None:
    trainer = on_gpu(tmp_path, MemorySnapshot(3, 5)).start()
    trainer.step(3)
    trainer.fire("on_exception", torch.OutOfMemoryError("no memory"))
    trainer.fire("on_teardown")
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["steps_3-4_rank_1.json"]
    assert len(recorded) == 2


def test_without_a_gpu_it_says_that_it_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MemorySnapshot needs a GPU: .* memory of a cpu"):
        build(tmp_path, MemorySnapshot()).train(seed=5)
    with pytest.raises(ConfigError, match=r"max_entries=0\): expected at least 1 each"):
        MemorySnapshot(max_entries=0)
