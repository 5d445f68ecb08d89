"""`paceline runs`: what it prints, its exit codes, and that it stays quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


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
