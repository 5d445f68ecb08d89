"""AccelHydra at home: its acceptance rows on configuration files and the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from paceline.checkpoint import load_tree
from paceline.cli.app import app
from paceline.errors import RecipeError
from paceline.recipe import Launcher, load_recipe
from paceline.testing import bits, rows

CODE = """
import torch
from torch.utils.data import Dataset

class Points(Dataset):
    def __init__(self, n: int = 24):
        self.x = torch.linspace(-1, 1, n).view(-1, 1) + 0.1 * torch.randn(n, 1)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], 2 * self.x[i]
"""
RECIPE = """
defaults: [basic, _self_]
code: points.py
seed: 42
run: {project: parity, name: first}
trainer: {epochs: 1, progress: false, log_every: 1}
model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: points.Points, n: "${oc.decode:${oc.env:POINTS,24}}"}
  batch_size: 8
  shuffle: true
val_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: points.Points, n: "${train_dataloader.dataset.n}"}
  batch_size: "${train_dataloader.batch_size}"
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "points.py").write_text(CODE)
    (tmp_path / "train.yaml").write_text(RECIPE)
    (tmp_path / "basic.yaml").write_text("trainer: {max_grad_norm: 2.0}\n")
    monkeypatch.chdir(tmp_path)


def paceline(*words: str) -> Any:
    return CliRunner().invoke(app, ["train", "train.yaml", *words], catch_exceptions=False)


def newest(name: str = "first") -> dict[str, Any]:
    return load_tree(sorted(Path("runs/parity", name, "checkpoints").glob("step_*"))[-1])


def test_AH_01_overrides_reach_trainer_and_optimizer() -> None:
    assert paceline("trainer.epochs=2", "optimizer.lr=5e-4").exit_code == 0
    tree = newest()
    assert tree["progress"]["epoch"] == 2
    assert tree["optimizers"]["optimizer"]["groups"][0]["lr"] == 5e-4


def test_AH_02_defaults_and_interpolation() -> None:
    """What a defaults list and `${...}` give reaches the objects as plain values."""
    assert paceline().exit_code == 0
    assert newest()["identity"]["max_grad_norm"] == 2.0
    assert newest()["identity"]["data.samples"] == 24


def test_AH_02_len_and_multiply() -> None:
    """`${len:...}` and `${multiply:...}` give plain numbers to the objects."""
    Path("sizes.yaml").write_text(
        "defaults: [train, _self_]\n"
        "words: [a, b, c, d, e]\n"
        "model: {in_features: 1, out_features: '${len:${words}}'}\n"
        "train_dataloader: {dataset: {n: '${multiply:2,${multiply:4,3}}'}}\n"
    )
    values = load_recipe("sizes.yaml")
    assert values.parts["model"].kwargs["out_features"] == 5
    loader = values.parts["train_dataloader"].kwargs
    assert loader["dataset"].kwargs["n"] == 24
    assert type(loader["dataset"].kwargs["n"]) is int


def printed_and_dumped(folder: Path) -> tuple[int, str]:
    os.chdir(folder)
    done = paceline("trainer.epochs=7", "--dry-run")
    dumped = folder / f"dumped_by_{os.environ['RANK']}.yaml"
    assert Launcher("train.yaml", ["trainer.epochs=7"], dump_config=dumped).run() is None
    return done.exit_code, done.stdout


def test_AH_03_the_resolved_recipe_is_written_once_without_training(
    ranks: Any, tmp_path: Path
) -> None:
    """The main rank alone prints it, with code 0, or writes it to a file."""
    (code, text), other = ranks(printed_and_dumped, 2, tmp_path)
    assert (code, *other) == (0, 0, "")
    [file] = tmp_path.glob("dumped_by_*")
    assert file.name == "dumped_by_0.yaml"
    plan = [line for line in text.splitlines() if line.startswith("plan: ")]
    shown = yaml.safe_load("\n".join(line for line in text.splitlines() if line not in plan))
    assert (shown["trainer"]["epochs"], shown["trainer"]["max_grad_norm"]) == (7, 2.0)
    assert yaml.safe_load(file.read_text()) == shown
    assert not Path("runs").exists()


def test_AH_13_the_seed_makes_the_weights_and_the_data_too() -> None:
    """Seed 42 twice: the same initial weights, data and losses, bit by bit; seed 43: others."""
    for name, seed in (("one", 42), ("two", 42), ("three", 43)):
        assert paceline(f"run.name={name}", f"seed={seed}").exit_code == 0
    one, two, three = (bits(newest(name)["models"]) for name in ("one", "two", "three"))
    assert one == two != three
    assert rows(Path("runs/parity/one")) == rows(Path("runs/parity/two"))


def test_AH_17_the_recipe_stands_in_the_run_and_runs_it_again() -> None:
    assert paceline().exit_code == 0
    text = Path("runs/parity/first/recipe.yaml").read_text()
    assert "lr: 0.1" in text
    again = CliRunner().invoke(app, ["train", "runs/parity/first/recipe.yaml", "trainer.epochs=2"])
    assert again.exit_code == 0
    assert newest()["progress"]["epoch"] == 2


def test_a_misspelt_flag_is_not_ignored() -> None:
    assert paceline("--resum", "auto").exit_code == 2


def test_a_misspelt_key_is_not_ignored() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lr'"):
        paceline("optimizer.lrr=0.1")


def test_the_environment_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value looked up in the environment is used, but what is saved is the look-up."""
    monkeypatch.setenv("POINTS", "40")
    assert paceline().exit_code == 0
    assert newest()["identity"]["data.samples"] == 40
    assert "oc.env:POINTS,24" in Path("runs/parity/first/recipe.yaml").read_text()


def test_resolvers_of_others_are_left_alone() -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("parity_double", lambda x: 2 * int(x), replace=True)
    assert paceline("--dry-run").exit_code == 0
    assert OmegaConf.create({"a": "${parity_double:4}"}).a == 8
