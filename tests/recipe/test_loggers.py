"""Loggers of a recipe: what they learn of it, and what turns rows off."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.seeds import train_recipe, train_seeds
from paceline.testing import rows
from paceline.trainer.settings import Resume

Write = Callable[..., Path]
TRACKER = """

from paceline.log.sinks import Sink


class Tracker(Sink):
    def __init__(self, token: str, url: str, password: str) -> None:
        self.token = token

    def open(self, run) -> None:
        opened.append(run)


opened = []
"""
MINE = {
    "_target_": "toy.Tracker",
    "token": "${oc.env:TOKEN}",
    "url": "https://me:secret@host/x",
    "password": "hunter2",
}


def opened() -> list[Any]:
    return sys.modules["toy"].opened


@pytest.fixture
def tracked(recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A recipe whose own code has a tracker."""
    monkeypatch.setenv("TOKEN", "very secret")

    def write(**changes: Any) -> Path:
        path = recipe(**changes)
        with open(tmp_path / "toy.py", "a") as code:
            code.write(TRACKER)
        return path

    return write


def test_a_tracker_gets_the_recipe_and_no_secret(tracked: Write) -> None:
    """Given look-ups in the environment and credentials, when the run's recipe is handed to a
    tracker, then look-ups stand as they were written and credentials are masked."""
    loaded = load_recipe(tracked(loggers={"mine": MINE}), ["model.width=5"])
    trainer = build_trainer(loaded)
    assert trainer.loggers[0].token == "very secret"
    trainer.train(seed=loaded.seed)
    [run] = opened()
    assert run.recipe["model"]["width"] == 5
    assert run.recipe["loggers"]["mine"] == {
        "_target_": "toy.Tracker",
        "token": "${oc.env:TOKEN}",
        "url": "https://***@host/x",
        "password": "***",
    }
    assert "very secret" not in json.dumps(run.recipe)
    assert rows(run.folder), "beside the run folder's own rows"


def test_each_seed_is_a_run_with_an_id_of_its_own(tracked: Write) -> None:
    loaded = load_recipe(tracked(loggers=[MINE]), ["seeds=[1,2]"])
    train_seeds(loaded, Resume())
    first, second = opened()
    assert first.id != second.id
    assert (first.recipe["seed"], second.recipe["seed"]) == (1, 2)
    for run in (first, second):
        assert json.loads((run.folder / "run.json").read_text())["id"] == run.id


@pytest.mark.parametrize(
    ("loggers", "override", "written"),
    [(None, "seed=0", True), ([], "seed=0", False), ({"mine": MINE}, "loggers.mine=null", True)],
)
def test_only_an_empty_list_turns_rows_off(
    loggers: Any, override: str, written: bool, tracked: Write
) -> None:
    """A logger that an override takes out leaves the run folder's own rows."""
    loaded = load_recipe(tracked(loggers=loggers), [override])
    train_recipe(loaded, Resume())
    assert (loaded.run_dir / "metrics.jsonl").exists() == written
