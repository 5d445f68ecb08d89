"""P1 on the device: stopped and resumed, a deterministic run ends as if it had never stopped.

The run is that of P1: dropout, shuffling, random augmentation, accumulation, clipping, averaged
weights, schedules, validations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_p01_exact_resume import STEPS, Unbroken, check_resumed, run

from paceline.checkpoint import load_tree
from paceline.testing import StopAt, bits

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    whole = run(folder, deterministic=True)
    assert whole.ending.result.global_step == STEPS
    return Unbroken(whole, (folder / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (6, 2), (11, 0), (12, 2), (24, 0)])
def test_stopped_at_a_step_it_ends_the_same(
    step: int, workers: int, tmp_path: Path, unbroken: Unbroken
) -> None:
    """With loader workers and without, within an epoch and at its end."""
    first = run(tmp_path, StopAt(step), workers=workers, deterministic=True)
    second = run(tmp_path, workers=workers, deterministic=True)
    check_resumed(tmp_path, [first, second], unbroken)


def test_PT_10_on_the_device_resumed_in_a_new_process_it_ends_the_same(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    run(tmp_path, StopAt(10), deterministic=True)
    program = "import sys, pathlib, test_p01_exact_resume as p1; "
    program += "p1.run(pathlib.Path(sys.argv[1]), deterministic=True)"
    subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=80,
    )
    expected = unbroken.run.ending.state
    assert expected is not None
    newest = load_tree(tmp_path / "checkpoints" / f"step_{STEPS:08d}")
    for part in ("models", "optimizers", "schedulers", "callbacks"):
        assert bits(newest[part]) == bits(expected[part]), part
    assert (tmp_path / "metrics.jsonl").read_bytes() == unbroken.rows
