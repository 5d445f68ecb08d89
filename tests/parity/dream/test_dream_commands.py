"""Dream Trainer's command line at home: modifiers are overrides, in any place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from builders import code_forgotten
from command import Paceline
from paceline.cli.app import app
from paceline.errors import ConfigError
from paceline.testing import Ranks, free_port

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


def by_torchrun(rank: int) -> dict[str, str]:
    """What torchrun without --rdzv-id tells one of two processes."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return {**own, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}


def by_srun(rank: int) -> dict[str, str]:
    """What srun tells one of two tasks."""
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost"}
    return {**own, **step, "MASTER_ADDR": "127.0.0.1"}


def test_DT_37_whoever_launches_it_a_run_goes_where_it_was_told(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Both ranks write to the run that the recipe names, "none" names none, and another run never
    goes on with its weights: under one name it is refused."""
    commands = Paceline(tmp_path, ranks)

    def launched(by: Any, *words: str) -> list[int]:
        port = {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        both = [["train", "my fit.yaml", *words]] * 2
        ended = commands.together(both, [by(rank) | port for rank in range(2)])
        told.append("".join(err for *_, err in ended))
        return [code for code, *_ in ended]

    told: list[str] = []
    assert launched(by_torchrun, "run.name=one") == [0, 0]
    assert launched(by_srun, "run.name=two", "optimizer.lr=0.5") == [0, 0]
    assert sorted(path.name for path in Path("runs/dream").iterdir()) == ["one", "two"]
    kept = [json.loads(Path("runs/dream", n, "run.json").read_text()) for n in ("one", "two")]
    assert [(run["world_size"], run["step"]) for run in kept] == [(2, 2)] * 2
    assert kept[0]["id"] != kept[1]["id"]
    assert launched(by_torchrun, "run.name=one", "optimizer.lr=0.5") == [2, 2]
    assert "optimizer.lr: 0.1 then, 0.5 now" in told[-1]
    commands.close()
