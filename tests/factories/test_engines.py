"""Engines that save the model beside the checkpoints: when, and only whole folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.recipe import build_trainer, load_recipe

Write = Callable[..., Path]
DATA = {
    "micro_batch_size": 4,
    "sources": [{"type": "rows", "rows": 16}],
    "eval_sources": {"near": {"type": "rows", "rows": 8}},
}
MONITOR = "+trainer.metric_monitor={metric_name: val/near/loss, mode: max}"


def saved(folder: str = "run/exports/sums") -> list[int]:
    """The steps whose folder is there, hidden ones too."""
    return sorted(int(p.name.removeprefix("step_")) for p in Path(folder).glob("*"))


def train(path: Path, *changes: str) -> Any:
    trainer = build_trainer(load_recipe(path, changes))
    trainer.train()
    return trainer


def test_each_trigger_saves_once_a_step_a_whole_folder(recipe: Write) -> None:
    """4 steps an epoch, 3 epochs. The loss falls, so that `mode: max` has its best at once."""
    engines = [
        {"type": "sums", "every_steps": 5, "at_end": True},
        {"type": "sums", "every_epochs": 2, "at_end": True, "dir": "epochs"},
        {"type": "sums", "on_best": True, "dir": "best"},
        {"type": "sums", "every_steps": 1, "every_epochs": 1, "at_end": True, "dir": "all"},
    ]
    path = recipe(data=DATA, checkpoint=engines)
    trainer = train(path, MONITOR)
    assert saved() == [5, 10, 12]
    assert saved("epochs") == [8, 12]
    assert saved("best") == [4]
    assert saved("all") == list(range(1, 13))
    assert len(sys.modules["mine"].Sums.saves) == 3 + 2 + 1 + 12  # no step twice
    total = sum(float(p.detach().sum()) for p in trainer.model.parameters())
    assert Path("epochs/step_00000012/sum").read_text() == repr(total)
    assert not Path("run/checkpoints").exists()  # the list names no engine that resumes
    best = Path("best/step_00000004/sum").read_text()
    assert best == Path("all/step_00000004/sum").read_text()  # before the next step


def test_a_run_of_no_steps_saves_nothing(recipe: Write) -> None:
    engines = [{"type": "paceline"}, {"type": "sums", "at_end": True}]
    path = recipe(checkpoint=engines)
    train(path)
    assert saved() == [12]
    Path("run/exports/sums/step_00000012/sum").write_text("untouched")
    train(path)  # finds that it is complete
    assert Path("run/exports/sums/step_00000012/sum").read_text() == "untouched"


def test_a_run_that_is_killed_in_a_save_leaves_nothing_half(recipe: Write, paceline: Any) -> None:
    engines = [{"type": "paceline", "every_steps": 2}, {"type": "sums", "every_steps": 1}]
    recipe(checkpoint=engines)
    code, _, _ = paceline("train", "r.yaml", DIES_IN_SAVE=".step_00000005.new")
    assert code == 9
    # As if it had been killed once more, while it replaced an older save of the step.
    Path("run/exports/sums/.step_00000005.old").mkdir()
    published = [p.name for p in Path("run/exports/sums").glob("step_*")]
    assert sorted(published) == [f"step_{n:08d}" for n in range(1, 5)]
    code, out, err = paceline("train", "r.yaml")
    assert code == 0, out + err
    assert sorted(os.listdir("run/exports/sums")) == [f"step_{n:08d}" for n in range(1, 13)]
    assert all(p.read_text() for p in Path("run/exports/sums").glob("*/sum"))


def test_what_an_engine_lacks_is_said_before_the_first_step(recipe: Write) -> None:
    path = recipe(checkpoint=[{"type": "sums", "on_best": True}])
    with pytest.raises(ConfigError, match="'sums' saves on_best, and nothing says what is best"):
        train(path)
    path = recipe(checkpoint=[{"type": "sums", "at_end": True}])
    trainer = build_trainer(load_recipe(path))
    trainer.run_dir = None
    with pytest.raises(ConfigError, match="'sums' has no folder: give the trainer a run_dir"):
        trainer.train()
