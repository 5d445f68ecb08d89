"""The recipes that ship run as they are and do what their first lines say."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from blocks import GPT, blocks
from command import Paceline
from endings import ending
from paceline.testing import Ranks

RECIPES = Path(__file__).parents[2] / "recipes"


def metrics(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["metrics"]


def test_digits_are_read_right(paceline, tmp_path: Path):
    code, _, err = paceline("train", str(RECIPES / "digits.yaml"))
    assert code == 0, err
    assert metrics(tmp_path / "runs/digits/baseline")["val/accuracy"] >= 0.985


def test_the_gpt_learns_and_writes(paceline, tmp_path: Path):
    words = ("trainer.max_steps=40", "lr_scheduler.warmup=10", "model.layers=1")
    code, out, err = paceline("train", str(RECIPES / "gpt.yaml"), *words)
    assert code == 0, err
    assert metrics(tmp_path / "runs/gpt/manual")["val/loss"] < 3.5  # a guess is ln(103) = 4.6
    assert "\nThe " in out
    said = (tmp_path / "runs/gpt/manual/run.json").read_text()
    assert "saves every epoch and every 100 steps, keeps the newest" in said, (
        "and no best: no metric"
    )


KILLED = ("trainer.epochs=3", "optimizer.lr=3e-4", "model.width=8", "--nproc", "2")


def test_killed_and_started_again_the_digits_end_as_ever(
    paceline, wait_for, tmp_path: Path, ranks: Ranks
):
    """Given a run on two processes that is killed once it has saved, the same command ends it with
    the rows, weights and every other bit of one that nobody killed."""
    words, run = ("train", str(RECIPES / "digits.yaml"), *KILLED), "runs/digits/baseline"
    (tmp_path / "unbroken").mkdir()
    code, _, err = Paceline(tmp_path / "unbroken", ranks)(*words)
    assert code == 0, err
    process = paceline.start(*words)
    wait_for(f"{run}/checkpoints/latest")
    process.signal(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    code, _, err = paceline(*words)
    assert code == 0, err
    record = json.loads((tmp_path / run / "run.json").read_text())
    assert len(record["starts"]) == 1
    assert ending(tmp_path / run) == ending(tmp_path / "unbroken" / run)


def test_a_sharded_gpt_is_killed_and_goes_on_as_one_process(paceline, wait_for, tmp_path: Path):
    """Given a model sharded over two processes that are killed once it has saved, one process goes
    on to the end, and writes."""
    words = ("train", str(RECIPES / "gpt.yaml"), "model.layers=2", "lr_scheduler.warmup=2")
    words += (
        *GPT,
        "trainer.max_steps=20",
        "checkpoint.every_steps=4",
        "+checkpoint.every_epochs=null",
    )
    process = paceline.start(*words, "--nproc", "2", "parallel.dp_shard=2")
    wait_for("runs/gpt/manual/checkpoints/latest")
    process.signal(signal.SIGKILL)
    process.end()
    record = tmp_path / "runs/gpt/manual/run.json"
    assert json.loads(record.read_text())["status"] != "complete"
    code, out, err = paceline(*words)
    assert code == 0, err
    assert json.loads(record.read_text())["step"] == 20
    assert "\nThe " in out


def test_the_generator_covers_the_ring(paceline, tmp_path: Path):
    code, _, err = paceline("train", str(RECIPES / "gan.yaml"), "trainer.progress=false")
    assert code == 0, err
    assert metrics(tmp_path / "runs/gan/ring")["val/covered"] > 0.4  # one Gaussian alone has 0.125


def test_the_readme_s_commands_about_trained_runs_work(paceline, tmp_path: Path):
    readme = blocks(RECIPES.parent / "README.md")
    [commands] = [b.text for b in readme if b.text.startswith("paceline runs")]
    for name in ("digits", "digits_sgd"):
        words = (str(RECIPES / f"{name}.yaml"), "trainer.epochs=1", "model.width=4")
        assert paceline("train", *words)[0] == 0
    printed = []
    for command in commands.splitlines():
        code, out, err = paceline(*shlex.split(command)[1:])
        assert code == 0, err
        printed.append(out)
    assert "digits/baseline" in printed[0]
    assert "digits/sgd" not in printed[0]
    assert "optimizer._target_" in printed[1]
    [weights] = (tmp_path / "runs/digits/baseline/exports").iterdir()
    assert load_file(weights)["0.weight"].dtype == torch.bfloat16
