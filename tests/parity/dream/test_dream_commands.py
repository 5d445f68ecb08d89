"""Dream Trainer's command line at home: modifiers are overrides, in any place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from builders import code_forgotten
from paceline.cli.app import app
from paceline.errors import ConfigError

CODE = """
import torch
from torch.utils.data import TensorDataset

def points():
    x = torch.linspace(-1, 1, 16).view(-1, 1)
    return TensorDataset(x, 2 * x)
"""
RECIPE = """
code: data.py
run: {project: dream, name: first}
trainer: {epochs: 1, progress: false}
model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: data.points}
  batch_size: 4
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "data.py").write_text(CODE)
    (tmp_path / "my fit.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    with code_forgotten():
        yield


def train(*words: str) -> str:
    done = CliRunner().invoke(app, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def steps(name: str) -> int:
    return json.loads(Path("runs/dream", name, "run.json").read_text())["step"]


TWICE = "trainer.gradient_accumulation_steps=2"


@pytest.mark.parametrize(
    "words",
    [
        ("my fit.yaml", TWICE, "run.name=two", "--fresh"),
        ("--fresh", "my fit.yaml", "run.name=two", TWICE),
        ("my fit.yaml", "--fresh", TWICE, "run.name=two"),
    ],
    ids=["before", "after", "between"],
)
def test_DT_36_changes_stand_anywhere_on_the_command_line(words: tuple[str, ...]) -> None:
    """Four batches in windows of two are two steps, of a recipe with a space in its name."""
    train(*words)
    assert steps("two") == 2


def test_DT_36_the_configuration_is_printed_without_training() -> None:
    assert "gradient_accumulation_steps: 2" in train("my fit.yaml", TWICE, "--dry-run")
    assert not Path("runs").exists()


def test_DT_36_going_on_and_starting_from_weights_exclude_each_other() -> None:
    train("my fit.yaml")
    [saved] = Path("runs/dream/first/checkpoints").glob("step_*")
    for resume in (str(saved), "must"):
        words = ("--resume", resume, "--init-from", str(saved))
        with pytest.raises(ConfigError, match="resumes a run, init_from"):
            train("my fit.yaml", *words)
