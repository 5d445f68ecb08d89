"""`paceline preflight`: exit codes, and what goes to stdout."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_sound_recipe_is_code_0_and_leaves_nothing(paceline, tmp_path: Path):
    code, out, err = paceline("preflight", "toy.yaml")
    assert code == 0, err
    assert "PASS  checkpoint" in out
    assert "passed: 0 fail" in out
    assert "hello from rank 0" in err  # the recipe's own print
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob(".preflight*"))


def test_json_is_alone_on_stdout_at_any_width(paceline):
    code, out, _ = paceline("preflight", "toy.yaml", "--json", COLUMNS="20")
    assert code == 0
    report = json.loads(out)
    assert report["passed"] is True
    assert any(len(check["detail"]) > 60 for check in report["checks"])
    assert report["seconds_for_the_run"] > 0


def test_a_failed_check_is_code_1_with_the_users_stack(paceline, tmp_path: Path):
    text = (tmp_path / "toy.py").read_text()
    (tmp_path / "toy.py").write_text(text.replace("return self.x[i]", "return self.z[i]"))
    code, out, err = paceline("preflight", "toy.yaml", "--json")
    assert code == 1
    failed = [check for check in json.loads(out)["checks"] if check["status"] == "FAIL"]
    assert [check["name"] for check in failed] == ["training data"]
    assert "AttributeError: 'Points' object has no attribute 'z'" in failed[0]["detail"]
    assert "Traceback" in err
    assert "return self.z[i]" in err


def test_mistakes_in_a_recipe_are_code_2_and_all_of_them_told(paceline):
    words = ("trainer.epoch=3", "optimizer.rate=1")
    code, out, err = paceline("preflight", "toy.yaml", *words, "--json")
    assert code == 2
    (check,) = json.loads(out)["checks"]
    for told in ("did you mean 'epochs'", "optimizer.rate"):
        assert told in err
        assert told in check["detail"]
    assert "Traceback" not in err


def test_a_package_has_to_be_trusted(paceline):
    words = ("preflight", "toy.yaml", "loss_fn._target_=statistics.fmean")
    assert paceline(*words)[0] == 2
    assert "--trust statistics" in paceline(*words)[2]
    assert paceline(*words, "--trust", "statistics")[0] == 1  # it is no loss


def test_a_signal_ends_it_and_leaves_nothing(paceline, wait_for, tmp_path: Path):
    words = ("trainer.pause=0.5", "trainer.epochs=100")
    process = paceline.start("preflight", "toy.yaml", *words)
    wait_for("three0")
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 1
    assert "SIGTERM" in err
    assert not list(tmp_path.glob(".preflight*"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("digits", ["model.width=8"]), ("gpt", ["trainer.max_steps=300"]), ("gan", [])],
)
def test_the_shipped_recipes_pass(paceline, tmp_path: Path, name, words):
    code, out, err = paceline("preflight", str(RECIPES / f"{name}.yaml"), *words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [c for c in report["checks"] if c["status"] in ("WARN", "FAIL")] == []
    assert not (tmp_path / "runs").exists()


def test_on_paper_it_says_what_each_rank_needs_and_whether_it_fits(paceline, tmp_path: Path):
    code, out, err = paceline("preflight", "toy.yaml", "--on", "64xH100-80GB")
    assert code == 0, out + err
    assert "on each rank" in out
    assert "total, in the" in out
    assert "PASS  memory" in out
    assert not (tmp_path / "runs").exists()
    code, out, _ = paceline("preflight", "toy.yaml", "--on", "1xcpu-0.00001MB", "--json")
    assert code == 1
    assert json.loads(out)["checks"][-1]["status"] == "FAIL"


def test_devices_that_cannot_be_read_are_wrong_usage(paceline):
    code, _, err = paceline("preflight", "toy.yaml", "--on", "64H100")
    assert code == 2
    assert "expected NUMBERxNAME-MEMORY" in err
    assert "Traceback" not in err
