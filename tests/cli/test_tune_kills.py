"""kill -9 of a study at drawn instants: what it leaves is what an undisturbed one leaves."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command import Paceline
from endings import ending
from paceline.testing import Ranks

sys.path.append(str(Path(__file__).parent.parent / "tune"))
from tuned_recipes import CODE, RECIPE, write

# Kills its process at the n-th call of a function, before or after the call; of several ranks,
# those that are named.
KILLING = """
import importlib, os, signal
if "KILL" in os.environ and os.environ.get("RANK", "0") in os.environ.get("KILLED", "0"):
    place, count, when = os.environ.pop("KILL").split(" ")
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    inner, left = getattr(owner, last), int(count)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, last, call)
"""
TUNE = """\
tune:
  metric: val/loss
  trials: 6
  sampler: {type: tpe, n_startup_trials: 2}
  pruner: {type: halving, reduction_factor: 2}
  reports: 5
  first: [{optimizer.lr: 0.3}]
  space:
    optimizer.lr: {float: [1.0e-3, 0.5], log: true}
    optimizer.momentum: {float: [0, 0.9]}
    train_dataloader.batch_size: [10, 20]
"""
STORAGE, FOLDER = "optuna.storages:_CachedStorage", "paceline.tune.folder:StudyFolder"
# A place, and the most calls of it that one trial makes.
INSTANTS = [
    (f"{STORAGE}.create_new_trial", 1, "after"),  # asked for, and nobody knows
    (f"{STORAGE}.set_trial_param", 3, "after"),  # some of its values are there
    (f"{FOLDER}.take", 1, "after"),
    (f"{FOLDER}.append", 1, "before"),
    ("torch.optim:SGD.step", 30, "after"),  # in training
    (f"{STORAGE}.set_trial_intermediate_value", 4, "after"),  # reported, and not saved
    ("os:replace", 12, "before"),  # in a save
    ("os:rename", 6, "after"),
    ("optuna.study._tell:_tell_with_warning", 1, "before"),  # trained, and not told
    ("optuna.study._tell:_tell_with_warning", 1, "after"),  # told, and without a line
    ("paceline.tune.study:best_of", 1, "before"),
]


def left(folder: Path) -> dict[int, Any]:
    """All that must not depend on kills: of each trial its newest line, rows and weights."""
    found: dict[int, Any] = {}
    ended: list[int] = []
    for text in (folder / "trials.jsonl").read_text().splitlines():
        record = json.loads(text)
        for name in ("started", "ended", "restarts", "attributes"):
            del record[name]
        found[record["number"]] = record
        ended += [record["number"]] * (record["state"] != "RUNNING")
    assert sorted(ended) == list(range(len(found)))  # each once
    states = {n: ending(folder / record["folder"]) for n, record in found.items()}
    return {number: (found[number], states[number]) for number in sorted(found)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A study that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, TUNE, code=CODE + KILLING)
    code, _, err = Paceline(folder, ranks)("tune", "toy.yaml")
    assert code == 0, err
    return folder / "runs/p/s"


def test_a_study_killed_at_drawn_instants_equals_one_never_killed(
    whole: Path, tmp_path: Path, ranks: Ranks
) -> None:
    write(tmp_path, TUNE, code=CODE + KILLING)
    runner, drawn = Paceline(tmp_path, ranks), random.Random(16)
    instants, kills = drawn.sample(INSTANTS, len(INSTANTS)), 0
    for place, most, when in instants:
        environment = {"KILL": f"{place} {drawn.randint(1, most)} {when}"}
        code, _, err = runner("tune", "toy.yaml", **environment)
        assert code in (0, -9), err
        kills += code == -9
        if place.endswith("append"):
            with open(tmp_path / "runs/p/s/trials.jsonl", "a") as file:
                file.write('{"torn')
    code, out, err = runner("tune", "toy.yaml")
    assert code == 0, err
    assert kills >= 6
    expected, found = left(whole), left(tmp_path / "runs/p/s")
    for number in range(6):
        assert found[number][0] == expected[number][0]
        assert found[number][1] == expected[number][1]
    assert len(found) == 6
    assert "1 failed" not in out
    trials = tmp_path / "runs/p/s/trials"
    assert sorted(path.name for path in trials.iterdir()) == [f"trial_{n:04d}" for n in range(6)]
    records = [json.loads((path / "run.json").read_text()) for path in trials.iterdir()]
    again = [record for record in records if len(record["starts"]) > 0]
    assert any("resumes from" in str(record["plan"]) for record in again)  # none begins again
    best = [(folder / "best.yaml").read_text() for folder in (whole, tmp_path / "runs/p/s")]
    assert best[0] == best[1]
    assert (tmp_path / "runs/p/s/study.db").exists()


def test_sigterm_stops_all_workers_at_a_boundary_and_they_go_on(
    tmp_path: Path, ranks: Ranks
) -> None:
    slow = CODE + "\nimport time\ninner = Points.__getitem__\n"
    slow += "Points.__getitem__ = lambda self, i: (time.sleep(0.004), inner(self, i))[1]\n"
    write(tmp_path, TUNE, code=slow)
    runner, study = Paceline(tmp_path, ranks), tmp_path / "runs/p/s"
    command = ("tune", "toy.yaml", "tune.sampler=random", "tune.pruner=none", "--workers", "2")
    under_way = runner.start(*command)
    deadline = time.monotonic() + 120
    while len(list(study.glob("trials/*/checkpoints/step_*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    under_way.signal(signal.SIGTERM)
    code, _, err = under_way.end()
    assert code == 75, err
    statuses = [json.loads(path.read_text())["status"] for path in study.glob("trials/*/run.json")]
    assert "stopped" in statuses
    assert "running" not in statuses
    code, _, err = runner(*command)
    assert code == 0, err
    assert [state for state, _ in left(study).values()]
    assert sorted(left(study)) == list(range(6))


ON_TWO = ("tune", "toy.yaml", "tune.sampler=random", "--nproc", "2")
FOR_TWO = TUNE.replace("    train_dataloader.batch_size: [10, 20]\n", "")


def write_for_two(folder: Path, tune: str = FOR_TWO, code: str = CODE + KILLING) -> None:
    write(folder, tune, RECIPE.replace("batch_size: 20", "batch_size: 10"), code=code)  # on each


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A study on two ranks that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("on_two")
    write_for_two(folder)
    code, _, err = Paceline(folder, ranks)(*ON_TWO)
    assert code == 0, err
    return folder / "runs/p/s"


def test_the_same_trials_are_pruned_at_the_same_places_on_two_ranks(
    on_two: Path, tmp_path: Path, ranks: Ranks
) -> None:
    write(tmp_path, FOR_TWO)
    assert Paceline(tmp_path, ranks)("tune", "toy.yaml", "tune.sampler=random")[0] == 0
    expected, found = (
        [state for state, _ in left(folder).values()] for folder in (tmp_path / "runs/p/s", on_two)
    )
    assert [line["state"] for line in found] == [line["state"] for line in expected]
    assert "PRUNED" in {line["state"] for line in found}
    for mine, wanted in zip(found, expected, strict=True):
        assert mine["params"] == wanted["params"]
        steps = [[step for step, _ in line["reports"]] for line in (mine, wanted)]
        assert steps[0] == steps[1]
        assert mine["values"] == pytest.approx(wanted["values"], rel=1e-5)


def test_a_study_on_two_ranks_goes_on_bitwise_when_one_or_both_were_killed(
    on_two: Path, tmp_path: Path, ranks: Ranks
) -> None:
    write_for_two(tmp_path)
    runner, study = Paceline(tmp_path, ranks), tmp_path / "runs/p/s"
    for killed, step in (("1", 15), ("0", 9), ("0 1", 5)):
        under_way = runner.start(*ON_TWO, KILL=f"torch.optim:SGD.step {step} after", KILLED=killed)
        codes = [code for code, _, _ in under_way.each()]
        assert [code == -signal.SIGKILL for code in codes] == [n in killed for n in "01"], codes
        assert 0 not in codes
    code, _, err = runner(*ON_TWO)
    assert code == 0, err
    expected, found = left(on_two), left(study)
    assert sorted(found) == list(range(6))
    for number in range(6):
        assert found[number] == expected[number]
    plans = [json.loads(path.read_text())["plan"] for path in study.glob("trials/*/run.json")]
    assert any("resumes from" in str(plan) for plan in plans)  # none begins again


FAILING = """
import os
class Failing(torch.optim.SGD):
    def step(self, closure=None):
        if self.param_groups[0]["lr"] == (0.2, 0.25)[int(os.environ["RANK"])]:
            raise ValueError("on purpose")
        return super().step(closure)
"""


def test_a_trial_that_fails_on_one_of_two_ranks_has_failed_and_the_study_goes_on(
    tmp_path: Path, ranks: Ranks
) -> None:
    tune = """\
tune:
  trials: 3
  sampler: random
  first: [{optimizer.lr: 0.2}, {optimizer.lr: 0.25}]
  space: {optimizer: {_target_: [toy.Failing], lr: {float: [0.1, 0.3]}}}
"""
    write_for_two(tmp_path, tune, CODE + FAILING)
    code, out, err = Paceline(tmp_path, ranks)(*ON_TWO)
    assert code == 0, err
    assert "1 complete, 2 failed" in out
    text = (tmp_path / "runs/p/s/trials.jsonl").read_text()
    newest = {line["number"]: line for line in map(json.loads, text.splitlines())}
    assert [newest[n]["state"] for n in range(3)] == ["FAIL", "FAIL", "COMPLETE"]
    for n in range(2):  # the cause is the error itself, and not what the other rank has seen of it
        assert "ValueError: on purpose" in newest[n]["cause"]
        assert f"trial {n} failed: ValueError: on purpose" in err
