"""The recipes that ship run as they are and do what their first lines say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
pytestmark = pytest.mark.slow


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


def test_the_digits_train_on_two_processes(paceline, tmp_path: Path):
    words = ("--nproc", "2", "trainer.epochs=2", "model.width=8")
    code, _, err = paceline("train", str(RECIPES / "digits.yaml"), *words)
    assert code == 0, err
    assert os.path.exists(tmp_path / "runs/digits/baseline/checkpoints")
