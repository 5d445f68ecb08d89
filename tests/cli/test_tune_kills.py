"""kill -9 of a study, at drawn instants of each part of a trial: what it leaves is as if unkilled."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from command import Paceline
from endings import ending
from paceline.testing import Ranks

sys.path.append(str(Path(__file__).parent.parent / "tune"))
from tuned_recipes import CODE, write

# Kills its process at the n-th call of a function, before or after the call.
KILLING = """
import importlib, os, signal
if "KILL" in os.environ:
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
    ("optuna.study:Study.tell", 1, "before"),  # trained, and not told
    ("optuna.study:Study.tell", 1, "after"),  # told, and without a line
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
    best = [(folder / "best.yaml").read_text() for folder in (whole, tmp_path / "runs/p/s")]
    assert best[0] == best[1]
    assert (tmp_path / "runs/p/s/study.db").exists()
