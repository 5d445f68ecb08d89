"""`paceline.runs`: runs are found, chosen, sorted and compared by what they say of themselves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.log.lock import FolderLock
from paceline.runs import differences, find_runs, select
from paceline.runs.listing import flat, read
from paceline.runs.select import Filter
from paceline.runs.text import cell, printable


def make(folder: Path, recipe: str = "", **record: Any) -> Path:
    """A run folder that says what it is told to say."""
    folder.mkdir(parents=True)
    record = {"status": "complete", "started": "2026-01-01T10:00:00+00:00", **record}
    (folder / "run.json").write_text(json.dumps(record))
    if recipe:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Runs a, b and c: accuracies 0.8, 0.9 and none; learning rates 0.1, 0.01 and 0.01."""
    make(
        tmp_path / "p/a", "optimizer: {lr: 0.1}\nmodel: {depth: 4, deep: true}\n",
        step=10, best=0.8, metrics={"val/accuracy": 0.8}, started="2026-01-03T10:00:00+00:00",
    )  # fmt: skip
    make(
        tmp_path / "p/b/seed_1", "optimizer: {lr: 0.01}\nmodel: {depth: 2, deep: false}\n",
        step=20, best=0.9, metrics={"val/accuracy": 0.9}, started="2026-01-02T10:00:00+00:00",
    )  # fmt: skip
    make(tmp_path / "p/c", "optimizer: {lr: 0.01}\n", status="failed")
    return tmp_path


def names(runs: list[Any]) -> list[str]:
    return [run.name for run in runs]


def test_every_run_below_a_folder_is_found_the_newest_first(three: Path) -> None:
    make(three / "p/a/checkpoints/inside")
    make(three / ".hidden/run")
    assert names(find_runs(three)) == ["p/a", "p/b/seed_1", "p/c"]
    assert names(find_runs(three / "p/a")) == ["p/a"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("val/accuracy>0.85", ["p/b/seed_1"]),
        ("val/accuracy>=0.8", ["p/a", "p/b/seed_1"]),
        ("val/accuracy < 0.85", ["p/a"]),
        ("val/accuracy<=0.8", ["p/a"]),
        ("optimizer.lr=1e-2", ["p/b/seed_1", "p/c"]),
        ("optimizer.lr!=0.01", ["p/a"]),
        ("model.depth!=4", ["p/b/seed_1"]),  # c has no depth
        ("model.deep=true", ["p/a"]),
        ("status=failed", ["p/c"]),
        ("name~B/SEED", ["p/b/seed_1"]),
        ("started>2026-01-02", ["p/a", "p/b/seed_1"]),
        ("status>3", ["p/a", "p/b/seed_1", "p/c"]),  # as text
    ],
)
def test_a_filter_chooses(three: Path, condition: str, expected: list[str]) -> None:
    assert names(select(find_runs(three), [condition])) == expected


def test_filters_hold_together_and_a_limit_takes_the_first(three: Path) -> None:
    runs = find_runs(three)
    assert names(select(runs, ["optimizer.lr=0.01", "status=complete"])) == ["p/b/seed_1"]
    assert names(select(runs, limit=2)) == ["p/a", "p/b/seed_1"]
    assert names(select(runs, reverse=True)) == ["p/c", "p/b/seed_1", "p/a"]


def test_runs_without_the_key_come_last_either_way(three: Path) -> None:
    make(three / "p/d", metrics={"val/accuracy": float("nan")})
    runs = find_runs(three)
    assert names(select(runs, sort="val/accuracy"))[:2] == ["p/a", "p/b/seed_1"]
    assert names(select(runs, sort="val/accuracy", reverse=True))[:2] == ["p/b/seed_1", "p/a"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [("val/acuracy", "val/accuracy"), ("lr", "optimizer.lr"), ("model.dept", "model.depth")],
)
def test_an_unknown_key_gets_the_nearest_names(three: Path, key: str, hint: str) -> None:
    for options in ({"filters": [f"{key}=1"]}, {"sort": key}):
        with pytest.raises(ConfigError, match=f"did you mean.* ?{hint}"):
            select(find_runs(three), **options)


@pytest.mark.parametrize("text", ["", "accuracy", "=3", "a==3", ">", "a=>3"])
def test_a_filter_that_is_none_is_one_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a filter"):
        Filter.parse(text)


def test_a_run_that_says_running_is_killed_unless_somebody_trains_there(tmp_path: Path) -> None:
    """Given a record of this machine, when its lock is held by another process, then it runs."""
    here = {"status": "running", "hostname": socket.gethostname(), "pid": 1}
    folder = make(tmp_path / "run", **here)
    assert read(folder).status == "killed"
    assert read(make(tmp_path / "far", **{**here, "hostname": "elsewhere"})).status == "running"
    code = (
        "import sys, pathlib; from paceline.log.lock import FolderLock\n"
        "lock = FolderLock(); lock.take(pathlib.Path(sys.argv[1]), print)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert read(folder).status == "running"
        assert other.stdin is not None
        other.stdin.close()
    assert read(folder).status == "killed"


def test_looking_at_a_run_of_this_process_does_not_give_its_lock_away(tmp_path: Path) -> None:
    record = {"status": "running", "hostname": socket.gethostname(), "pid": os.getpid()}
    folder = make(tmp_path / "run", **record)
    lock = FolderLock()
    lock.take(folder, print)
    assert read(folder).status == "running"
    code = "import sys, pathlib; from paceline.log.lock import is_free\n"
    code += "print(is_free(pathlib.Path(sys.argv[1])))"
    asked = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True)
    lock.release()
    assert asked.stdout == b"False\n"


def test_a_run_under_way_shows_its_newest_rows(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", status="running", hostname="elsewhere")
    old = "".join(f'{{"step": {i}, "val/loss": 9.0}}\n' for i in range(5000))
    new = '{"step": 7000, "epoch": 2, "val/loss": 0.5}\n{"step": 7001, "lr": "nan"}\n{"step": 8'
    (folder / "metrics.jsonl").write_text(old + new)
    values = read(folder).values
    assert (values["step"], values["epoch"], values["val/loss"]) == (7001, 2, 0.5)
    assert str(values["lr"]) == "nan"


def test_a_duration_is_that_of_all_starts_together(tmp_path: Path) -> None:
    start = {"started": "2026-01-01T08:00:00+00:00", "ended": "2026-01-01T08:30:00+00:00"}
    killed = {"started": "2026-01-01T09:00:00+00:00", "ended": None}
    run = read(make(tmp_path / "r", starts=[start, killed], ended="2026-01-01T11:01:00+00:00"))
    assert run.values["duration"] == 91 * 60
    assert cell("duration", run.values["duration"]) == "1h 31m"


BROKEN = {
    "empty": "",
    "torn": '{"status": "comp',
    "a list": "[]",
    "no status": '{"step": 3}',
    "a number for a status": '{"status": 3}',
    "nested": "[" * 100_000,
    "a number of 5000 digits": '{"status": "x", "step": 1' + "0" * 5000 + "}",
    "wide": json.dumps({"status": "x", "a": [0] * 100_000}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_damaged_record_is_a_damaged_run(tmp_path: Path, text: str) -> None:
    (make(tmp_path / "run") / "run.json").write_text(text)
    [run] = find_runs(tmp_path)
    assert (run.status, run.values["name"]) == ("damaged", "run")
    assert run.problem


def test_two_runs_differ_in_their_settings_and_show_their_results(three: Path) -> None:
    for name, torch, commit in (("p/a", "2.9", "abc"), ("p/b/seed_1", "2.13", "abc")):
        path = three / name / "run.json"
        facts = {"versions": {"torch": torch}, "git": {"commit": commit}}
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    found = differences(read(three / "p/a"), read(three / "p/b/seed_1"))
    lines = {(d.part, d.key): (d.left, d.right) for d in found}
    assert lines["recipe", "optimizer.lr"] == (0.1, 0.01)
    assert lines["run", "versions.torch"] == ("2.9", "2.13")
    assert ("run", "git.commit") not in lines
    assert lines["result", "val/accuracy"] == (0.8, 0.9)
    assert lines["result", "status"] == ("complete", "complete")


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(trees)
def test_any_tree_becomes_plain_values_that_print_safely(tree: Any) -> None:
    for key, value in flat(tree).items():
        assert value is None or isinstance(value, str | bool | int | float)
        assert printable(key).isprintable()
        assert cell(key, value).isprintable()
