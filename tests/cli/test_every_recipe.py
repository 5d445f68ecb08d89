"""Every recipe that ships trains: shortened, on one process and on two.

What the recipes promise to reach stands in `test_shipped_recipes.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks import GPT
from language_models import bpe_tokenizer, write_tiny
from paceline.recipe.compose import compose

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SHORT = ("trainer.epochs=1", "trainer.max_steps=3")
ALSO = {"gpt": ("lr_scheduler.warmup=1", *GPT)}


def outcome(folder: Path) -> tuple[int, str]:
    """The one run below `folder`: its steps, and why it stopped."""
    (record,) = folder.rglob("run.json")
    run = json.loads(record.read_text())
    return run["step"], run["stopped_by"]


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_trains(name: str, paceline: Any, tmp_path: Path) -> None:
    also = ALSO.get(name, ())
    if name == "sft":
        tiny = write_tiny(tmp_path, bpe_tokenizer()) / "model"
        also = (f"model.name_or_path={tiny}", "data.max_length=256", "data.cache_dir=cache")
    code, _, err = paceline("train", str(RECIPES / f"{name}.yaml"), *SHORT, *also)
    assert code == 0, err
    assert outcome(tmp_path / "runs") == (3, "max_steps")


def test_two_models_train_on_two_processes(paceline: Any, tmp_path: Path) -> None:
    """`test_shipped_recipes.py` does so with the digits and the GPT."""
    code, _, err = paceline("train", str(RECIPES / "gan.yaml"), "--nproc", "2", *SHORT)
    assert code == 0, err
    assert outcome(tmp_path / "runs") == (3, "max_steps")


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    first, command = text.splitlines()[:2]
    does = "tune" if "\ntune:" in text else "train"
    assert first.startswith("# ")
    assert command == f"#   paceline {does} recipes/{name}.yaml"


def test_no_two_recipes_write_to_one_folder() -> None:
    runs = [compose(RECIPES / f"{name}.yaml").config.run for name in NAMES]
    folders = [(run.project, run.name) for run in runs]
    assert len(set(folders)) == len(NAMES)


ABLATIONS = [name for name in NAMES if name.startswith("digits_") and name != "digits_tune"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_few_lines(name: str) -> None:
    """It stands on digits.yaml and says only what differs."""
    changes = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert changes.pop("defaults") == ["digits", "_self_"]
    assert changes["run"] == {"name": name.removeprefix("digits_")}
    assert len(changes) == 2
