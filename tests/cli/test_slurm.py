"""`--slurm`, with a stand-in for submitit that notes what it is asked, and one for scontrol."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest

from paceline.testing import Ranks

SUBMITIT = """\
import json, pickle

class AutoExecutor:
    def __init__(self, folder, cluster):
        self.asked = {"folder": str(folder), "cluster": cluster}

    def update_parameters(self, **parameters):
        if "slurm_partitoin" in parameters:
            raise NameError("Unknown argument 'partitoin' for executor 'slurm'")
        self.asked |= parameters

    def submit(self, function):
        open("asked.json", "w").write(json.dumps(self.asked))
        open("job.pickle", "wb").write(pickle.dumps(function))
        return type("Job", (), {"job_id": "77"})
"""
SETTINGS = ("--slurm", "slurm_partition=gpu", "--slurm=tasks_per_node=1", "--slurm", "nodes=1")


@pytest.fixture
def submitit(tmp_path: Path) -> None:
    (tmp_path / "submitit.py").write_text(SUBMITIT)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)


def be_task(folder: Path, restarts: int) -> None:
    """Makes this forked process the job's one task, which Slurm starts for the `restarts`-th time
    after the first."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ |= {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": str(restarts)}
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    pickle.loads(Path("job.pickle").read_bytes())()  # noqa: S301  our own


def test_a_job_is_submitted_with_the_settings_and_the_same_command(paceline, submitit, tmp_path):
    code, out, err = paceline("train", "toy.yaml", *SETTINGS, "trainer.epochs=1")
    assert code == 0, err
    assert "submitted as job 77; its output is in runs/p/n.slurm/77" in out
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked == {
        "folder": "runs/p/n.slurm/%j",
        "cluster": "slurm",
        "name": "n",
        "slurm_partition": "gpu",
        "tasks_per_node": 1,
        "nodes": 1,
    }
    assert b"--slurm" not in (tmp_path / "job.pickle").read_bytes()
    assert not (tmp_path / "runs/p/n").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--slurm", "gpu"), "it has to be KEY=VALUE"),
        (("--slurm", "slurm_partitoin=gpu"), "Unknown argument 'partitoin'"),
        (("--slurm", "nodes=2", "--nproc=2"), "leave out other launchers' options"),
        (("--slurm", "nodes=2", "trainer.epoch=1"), "did you mean 'epochs'"),
    ],
)
def test_what_cannot_be_submitted_is_a_mistake(paceline, submitit, tmp_path, words, said):
    code, _, err = paceline("train", "toy.yaml", *words)
    assert (code, "Traceback" in err) == (2, False)
    assert said in err
    assert not (tmp_path / "asked.json").exists()


def test_without_submitit_the_extra_is_named(paceline):
    code, _, err = paceline("train", "toy.yaml", "--slurm", "nodes=1")
    assert code == 1
    assert 'pip install "paceline[slurm]"' in err


def test_a_job_that_is_to_lose_its_place_goes_back_into_the_queue_and_on(
    paceline, submitit, ranks: Ranks, wait_for, tmp_path: Path
):
    """Given a job that begins afresh, when Slurm warns it, then it saves and is put back; started
    again by Slurm, it goes on from there; cancelled, it is not put back."""
    slow = ("trainer.epochs=1000", "trainer.pause=0.05")
    assert paceline("train", "toy.yaml", "--slurm", "nodes=1", "--fresh", *slow)[0] == 0
    for restarts, number, code in ((0, signal.SIGUSR2, 0), (1, signal.SIGTERM, 75)):
        (tmp_path / "three0").unlink(missing_ok=True)
        (tmp_path / "stepped0").unlink(missing_ok=True)
        task = ranks.start(be_task, 1, tmp_path, restarts)
        wait_for("stepped0" if restarts else "three0")
        task.signal(number)
        [ended] = task.wait(60)
        assert ended.code == code, ended.output
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert [start["stopped_by"] for start in record["starts"]] == ["signal SIGUSR1"]
    assert record["step"] > record["starts"][0]["step"] >= 3
    assert not (tmp_path / "runs/p/n.1").exists()
