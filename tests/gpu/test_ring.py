"""Sequences in parts on two devices, which attend to each other by torch's ring."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from device_runs import apart
from ring_run import Looking
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("ring_run.py")


def ended(file: Path, *launcher: str) -> Looking:
    """The model that the program ends with."""
    subprocess.run(
        [sys.executable, *launcher, PROGRAM, file],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=80,
    )
    model = Looking()
    model.load_state_dict(load_file(file))
    return model


@pytest.mark.gpu(devices=2)
def test_a_ring_of_two_devices_trains_as_one_does(tmp_path: Path) -> None:
    alone = ended(tmp_path / "one")
    ring = ended(
        tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    )
    assert 0 < apart(alone, ring, start=Looking()) < 0.05
