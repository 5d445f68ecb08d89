"""The script behind `make gpu`, on a machine without an accelerator: what becomes of its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TESTS = {
    "test_a.py": """
import os, time, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
@pytest.mark.skip(reason="needs 2 devices; there is 1")
def test_skipped(): pass
def test_bad(): assert 1 == 2
def test_hangs(): time.sleep(60)
def test_dies(): os.kill(os.getpid(), 9)
def test_good_again(): pass
""",
    "test_broken.py": "import nothing_of_that_name",
    "test_other.py": "def test_that_is_not_marked(): raise AssertionError",
}
PART = """
import time
from common import save
save("x", "## {name}", {{"found": 1}}, {{}})
{then}
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, as a module."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_without_an_accelerator_it_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path / "results"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=hidden)
    assert done.returncode == 2
    assert "no accelerator: torch" in done.stderr
    assert not (tmp_path / "results").exists()


def test_what_is_missing_is_named_before_anything_is_started(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", {"numpy": (99, 0), "nothing_of_that_name": (1, 2)})
    with pytest.raises(SystemExit) as leaving:
        gpu.machine(rehearse=False)
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert "has to be at least 99.0" in said
    assert "nothing_of_that_name is not installed (at least 1.2)" in said


def test_each_part_ends_in_time_and_what_was_found_is_kept(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tests that pass, fail, hang, die and cannot be read; benchmarks that end, hang and fail."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    for name, text in TESTS.items():
        (folder / name).write_text(text)
    for name, then in {
        "gpu_steps": "import sys; time.sleep(60 * ('large' in sys.argv))",
        "checkpoints": "raise SystemExit('the disk is full')",
    }.items():
        (tmp_path / f"{name}.py").write_text(PART.format(name=name, then=then))
    monkeypatch.setattr(gpu, "SCRIPTS", tmp_path)
    monkeypatch.setattr(gpu, "LIMITS", {"eager steps": 30, "compiled steps": 6, "saves": 30})
    monkeypatch.setattr(gpu, "LEAST", 1)
    monkeypatch.setattr(gpu.gpu_tests, "FOLDER", folder)
    out = ["--out", str(tmp_path / "results"), "--per-test", "6"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", *out])
    assert gpu.main() == 1
    kept = json.loads((tmp_path / "results" / "gpu.json").read_text())
    outcomes = {test["name"].split("::")[-1]: test for test in kept["tests"]}
    assert {name.split("/")[-1]: test["outcome"] for name, test in outcomes.items()} == {
        "test_good": "passed",
        "test_skipped": "skipped",
        "test_bad": "failed",
        "test_hangs": "failed",
        "test_dies": "failed",
        "test_good_again": "passed",
        "test_broken.py": "failed",
    }
    assert "1 == 2" in outcomes["test_bad"]["why"]
    assert "took longer than 6 s" in outcomes["test_hangs"]["why"]
    assert "ended by SIGKILL" in outcomes["test_dies"]["why"]
    assert kept["complete"]
    assert set(kept["benchmarks"]) == {"eager steps", "compiled steps", "saves"}
    assert "the disk is full" in kept["failed"]["the benchmark saves"]
    left_out = "the rest of the benchmark compiled steps"
    assert kept["not_run"][left_out] == "it took longer than 6 s"
    text = (tmp_path / "results" / "gpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "needs 2 devices; there is 1" in text


def test_tests_that_there_is_no_time_for_are_named(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = "import time, pytest\npytestmark = pytest.mark.gpu\n"
    hang += "def test_one(): time.sleep(60)\ndef test_two(): pass"
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text(hang)
    monkeypatch.setattr(gpu.gpu_tests, "FOLDER", folder)
    left = iter([60.0, 60.0])  # asked for as it starts, has found the tests, begins with the first
    found = list(gpu.gpu_tests.run(lambda: next(left, 0.0), limit=60))
    assert [(test.outcome, test.why) for test in found] == [("not run", gpu.gpu_tests.NO_TIME)] * 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="Paceline would train on that")
def test_the_loops_of_a_task_end_with_the_same_bits(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_steps

    small = ["--device=cpu", "--rounds=1", "--steps=2", "--tasks", "tiny", "cnn"]
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", *small])
    gpu_steps.main()
    shown = capsys.readouterr().out
    assert shown.count("All end with the same weights, bit by bit.") == 3  # one more each time
