"""MemorySnapshot on a GPU: blocks, and who allocated them, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from device_runs import fitted

from paceline.callbacks import MemorySnapshot

pytestmark = pytest.mark.gpu(kind="cuda")


def test_the_allocations_of_a_step_are_written_with_their_frames(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, max_steps=4, callbacks=[MemorySnapshot(2, 2)])
    [path] = (tmp_path / "memory").iterdir()
    assert path.name == "steps_2-3_rank_0.json"
    found = json.loads(path.read_text())
    assert any(block["size"] > 0 for one in found["segments"] for block in one["blocks"])
    allocations = [e for trace in found["device_traces"] for e in trace if e["action"] == "alloc"]
    assert any("loss" in str(frame["name"]) for e in allocations for frame in e["frames"])
