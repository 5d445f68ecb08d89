"""`paceline runs`: what it prints, its exit codes, and that it stays quick."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.cli.runs import runs


def test_a_trained_run_is_listed_with_what_came_of_it(paceline, tmp_path: Path):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    assert paceline("train", "toy.yaml", "run.name=bad", "trainer.bad=0", "trainer.how=raise")[0]
    code, out, err = paceline("runs")
    assert code == 0, err
    header, newest, oldest = (line.split() for line in out.splitlines())
    assert header[:4] == ["name", "status", "step", "epoch"]
    assert newest[:4] == ["p/bad", "failed", "3", "0"]
    assert oldest[:4] == ["p/n", "complete", "16", "1"]
    code, out, _ = paceline("runs", "optimizer.lr<0.2", "status=complete", "--json")
    [run] = json.loads(out)
    assert (run["name"], run["recipe"]["optimizer.lr"]) == ("p/n", 0.1)
    code, out, _ = paceline("runs", "--diff", "runs/p/n", "runs/p/bad")
    assert [line.split() for line in out.splitlines() if "trainer.how" in line] == [
        ["recipe", "trainer.how", "raise"]
    ]


def test_wrong_usage_is_one_message_and_code_2(paceline, tmp_path: Path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text('{"status": "complete", "best": 1.0}')
    for words, expected in (
        (["nowhere"], "no folder 'nowhere'"),
        (["runs", "runs/a"], "one folder"),
        (["best=="], "not a filter"),
        (["bets>1"], "did you mean best?"),
        (["--columns", "bets"], "did you mean best?"),
        (["--sort", "bets"], "did you mean best?"),
        (["--diff", "runs/a"], "two run folders"),
        (["--diff", "runs/a", "runs/b"], "no run folder 'runs/b'"),
        (["--limit", "0"], "limit"),
    ):
        code, out, err = paceline("runs", *words)
        assert (code, out) == (2, ""), (words, err)
        assert expected in err
        assert "Traceback" not in err


def test_columns_and_limit_are_what_is_shown(paceline, tmp_path: Path):
    for i in range(3):
        (tmp_path / f"runs/r{i}").mkdir(parents=True)
        record = {"status": "complete", "best": i / 8, "started": f"2026-01-0{i + 1}"}
        (tmp_path / f"runs/r{i}/run.json").write_text(json.dumps(record))
    words = ("--columns", "name,best", "--sort", "best", "--reverse", "--limit", "2")
    _, out, _ = paceline("runs", *words)
    assert [line.split() for line in out.splitlines()] == [
        ["name", "best"],
        ["r2", "0.25"],
        ["r1", "0.125"],
    ]


def test_no_match_says_so_and_is_no_error(paceline, tmp_path: Path):
    (tmp_path / "runs/a").mkdir(parents=True)
    code, out, err = paceline("runs")
    assert (code, out) == (0, "")
    assert "no run below runs" in err
    (tmp_path / "runs/a/run.json").write_text('{"status": "complete"}')
    code, out, err = paceline("runs", "status=failed")
    assert (code, out) == (0, "")
    assert "no run of 1" in err


def test_it_is_quick_because_torch_is_not_imported(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"status": "complete"}')
    code = (
        "import sys; from paceline.cli.runs import runs\n"
        f"runs([{str(tmp_path)!r}, 'status=complete'])\n"
        "sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shown(capfd, monkeypatch: pytest.MonkeyPatch, width: int, *words: str, **options) -> list[str]:
    """What `runs` prints in a terminal of a width, without its colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    runs([*words], **{**QUIET, **options})
    return re.sub("\x1b\\[[0-9;]*m", "", capfd.readouterr().out).splitlines()


QUIET = {
    "sort": None, "reverse": False, "limit": None, "columns": None, "as_json": False, "diff": False
}  # fmt: skip


def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    """Given 60 columns, when runs are listed, best stays whole and metrics make room for it."""
    folder = tmp_path / "runs/digits/baseline"
    folder.mkdir(parents=True)
    record = {
        "status": "complete", "step": 123456, "epoch": 12, "monitor": "val/loss",
        "best": 6.5422e-06, "started": "2026-11-30T07:44:00", "ended": "2026-11-30T07:45:00",
        "metrics": {"val/loss": 6.5422e-06, "val/top 1": 0.75},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    for width in (80, 60, 40):
        head, row = shown(capfd, monkeypatch, width)
        assert max(len(head.rstrip()), len(row.rstrip())) <= width
        assert row.split()[:2] == ["digits/baseline", "complete"]
        assert "6.5422e-06" in row.split()
    head, row = shown(capfd, monkeypatch, 30, columns="name,started,best,val/loss")
    assert row.split() == ["digits/baseline", "2026-11-30", "07:44", "6.5422e-06", "6.5422e-06"]
    assert len(shown(capfd, monkeypatch, 200, "val/top 1>0.5")) == 2
    assert shown(capfd, monkeypatch, 200, "val/top 1>0.8") == []
