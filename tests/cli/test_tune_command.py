"""`paceline tune` as a command: its words, its exit codes, and what it leaves after a kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from command import Paceline
from paceline.testing import Ranks

sys.path.append(str(Path(__file__).parent.parent / "tune"))
from tuned_recipes import TUNE, write


@pytest.fixture
def tune(tmp_path: Path, ranks: Ranks):
    write(tmp_path)
    runner = Paceline(tmp_path, ranks)
    yield runner
    runner.close()


def states(folder: Path) -> list[str]:
    found = {}
    for text in (folder / "trials.jsonl").read_text().splitlines():
        record = json.loads(text)
        found[record["number"]] = record["state"]
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


def test_a_study_is_run_continued_and_listed(tune: Paceline, tmp_path: Path) -> None:
    code, out, err = tune("tune", "toy.yaml", "tune.trials=5", "--dry-run")
    assert (code, err) == (0, "")
    assert "optimizer.lr: float from 0.001 to 0.5, log" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = tune("tune", "toy.yaml", "tune.trials=5")
    assert code == 0, err
    assert "paceline: trial 4: pruned (best: trial" in err
    assert "5 trials in runs/p/s: 2 complete, 3 pruned" in out
    assert "its recipe: runs/p/s/best.yaml" in out
    assert tune("tune", "runs/p/s", "--add", "1")[0] == 0
    assert len(states(tmp_path / "runs/p/s")) == 6
    chosen = str(states(tmp_path / "runs/p/s").index("PRUNED"))
    code, _, err = tune("tune", "runs/p/s", "--revive", chosen)
    assert code == 0, err
    assert f"paceline: trial {chosen} goes on as trial 6." in err
    assert states(tmp_path / "runs/p/s")[6] == "COMPLETE"
    code, _, err = tune("tune", "runs/p/s", "--revive", "one")
    assert code == 2
    assert "expected numbers of trials, such as --revive 3,7" in err
    code, out, _ = tune("runs", "runs", "status=pruned", "--json")
    assert len(json.loads(out)) == states(tmp_path / "runs/p/s").count("PRUNED") - 1 > 1


def test_mistakes_are_2_and_failures_1(tune: Paceline, tmp_path: Path) -> None:
    code, _, err = tune("tune", "toy.yaml", "tune.smapler=tpe")
    assert code == 2
    assert "did you mean 'sampler'?" in err
    code, _, err = tune("train", "toy.yaml", "tune.smapler=tpe")
    assert code == 2
    assert "did you mean 'sampler'?" in err
    write(tmp_path, TUNE.replace("first:", "max_failures: 2\n  first:").replace("0.5]", "9.e+9]"))
    first = "tune.first=[{optimizer.lr: 1.e+9}, {optimizer.lr: 2.e+9}]"
    code, _, err = tune("tune", "toy.yaml", first)
    assert code == 1
    assert "2 trials in a row have failed" in err
    assert "NonFiniteError" in err
    assert states(tmp_path / "runs/p/s") == ["FAIL", "FAIL"]
