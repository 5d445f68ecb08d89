"""Averages and gradient norms of weights sharded over two ranks are those of whole ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sharded_weights_are_averaged_and_measured_like_whole_ones() -> None:
    """The second validation and the steps between tell whether gathered weights were dropped."""
    program = Path(__file__).with_name("sharded_program.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(program)], cwd=program.parent, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
