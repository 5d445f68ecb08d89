"""Doctor: what the machine offers, and the promises tested on it."""

from __future__ import annotations

import json
import resource
from importlib import metadata
from pathlib import Path

import pytest
import torch

from paceline.checkup import Check, Report, doctor, selftest
from paceline.checkup.doctor import _shared_memory
from paceline.errors import ConfigError


def found(report: Report, name: str) -> Check:
    (check,) = [check for check in report.checks if check.name == name]
    return check


def test_this_machine_is_described(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = doctor(self_test=False)
    assert report.passed
    assert torch.__version__ in found(report, "torch").detail
    assert str(tmp_path) in found(report, "disk").detail
    assert "gloo" in found(report, "distributed").detail
    assert "1 MB written and synced" in found(report, "fsync").detail
    assert not list(tmp_path.iterdir())
    assert json.loads(json.dumps(report.as_json())) == {
        "checks": [vars(check) for check in report.checks],
        "passed": True,
    }


def test_a_missing_extra_comes_with_the_command_that_brings_it(monkeypatch):
    """Given torchdata is not installed and scikit-learn is too old, when the extras are listed,
    then both say so; which extras there are is the package's own metadata."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "torchdata":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "scikit-learn" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    report = doctor(self_test=False)
    data, recipes = found(report, "extra data"), found(report, "extra recipes")
    assert (data.status, recipes.status) == ("SKIP", "SKIP")
    assert "torchdata>=0.11" in data.detail
    assert "pip install 'paceline[data]'" in data.detail
    assert "scikit-learn>=1.4" in recipes.detail
    assert report.passed  # what is optional fails nothing


def test_a_disk_that_cannot_sync_and_few_open_files_are_warnings(monkeypatch):
    def fsync(handle: int) -> None:
        raise OSError("not here")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("os.fsync", fsync)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        report = doctor(self_test=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found(report, "fsync").status == "WARN"
    assert "ulimit -n" in found(report, "open files").detail


def test_a_system_without_dev_shm_is_not_asked_about_it(tmp_path: Path):
    (check,) = _shared_memory(tmp_path / "nowhere")
    assert check.status == "SKIP"


def test_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        doctor()
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://node1:29510")
    with pytest.raises(ConfigError, match="not exist for replica groups"):
        doctor()


@pytest.mark.parametrize("name", ["P1 exact resume", "P5 a flipped bit", "P12 any place at once"])
def test_the_promises_hold_here(name, tmp_path: Path):
    check = selftest._tested(name, selftest.TESTS[name], tmp_path / "run")
    assert check.status == "PASS", check.detail


@pytest.mark.parametrize(
    ("name", "place", "defect", "said"),
    [
        ("P1 exact resume", "paceline.trainer.state_tree.load_optimizer_state",
         lambda *args, **kwargs: None, "state/optimizers/optimizer"),
        ("P5 a flipped bit", "paceline.checkpoint.publication.verify",
         lambda path: None, "was not set aside"),
        ("P12 any place at once", "paceline.data.indexed.IndexedSource.load_state_dict",
         lambda self, state: [next(self._reader.read(0, 0)) for _ in range(9)],
         "read 40 samples"),
        ("P4 every sample once", "paceline.checkup.selftest._run_ranks",
         lambda folder: [(folder / f"{rank}.json").write_text("[0, 1, 2]") for rank in (0, 1)]
         and ([0, 0], []), "[[0, 1, 2], [0, 1, 2]]"),
        ("P4 every sample once", "paceline.checkup.selftest._run_ranks",
         lambda folder: ([0, 1], ["", "Traceback\nValueError: mine"]), "ValueError: mine"),
    ],
)  # fmt: skip
def test_a_broken_promise_is_found(monkeypatch, tmp_path: Path, name, place, defect, said):
    monkeypatch.setattr(place, defect)
    check = selftest._tested(name, selftest.TESTS[name], tmp_path / "run")
    assert check.status == "FAIL"
    assert said in check.detail


def test_where_no_process_starts_the_test_is_skipped_with_the_reason(monkeypatch, tmp_path: Path):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("no forks today")

    monkeypatch.setattr("subprocess.Popen", refuse)
    name = "P4 every sample once"
    check = selftest._tested(name, selftest.TESTS[name], tmp_path / "run")
    assert check.status == "SKIP"
    assert "no forks today" in check.detail


def test_processes_that_take_too_long_are_ended(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(selftest, "_PATIENCE", 0.1)
    with pytest.raises(selftest.PromiseBrokenError, match="did not finish"):
        selftest.every_sample_once(tmp_path)
