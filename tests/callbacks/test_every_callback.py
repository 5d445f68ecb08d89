"""What every callback that ships promises: exact resume, nothing disturbed, its name in recipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import STEPS, LeaveValidation, build, check_resumed, check_undisturbed, schedule_free

from paceline import Callback
from paceline.recipe import build_trainer, load_recipe
from paceline.registry import lookup, names
from paceline.testing import Ranks, StopAt, bits

# Registered name -> the arguments it gets here.
EVERY: dict[str, dict[str, Any]] = {
    "averaged_weights": {"decay": 0.9, "every": 2},
    "early_stopping": {"patience": 9, "min_delta": 0.01, "relative": True},
    "exit_step": {"step": STEPS},
    "freeze": {"names": "*bias", "until_step": 5},
    "gradient_explosion": {"factor": 1.01, "window": 5, "warmup": 2},
    "gradient_monitor": {"per_layer": True},
    "learning_rate": {},
    "loss_prediction": {"min_points": 6, "max_points": 12},
    "overfit_detection": {"window": 3, "warmup": 0},
    "profiler": {"first": 5, "steps": 3},
    "progress": {"line_seconds": 0.0},
    "schedule_free": {},
    "swa": {"start": 4, "every": 3},
    "throughput": {},
    "time_limit": {"hours": 1},
    "update_ratio": {"every": 4},
}

NEED_A_GPU = ("memory_snapshot",)
CHANGE_WEIGHTS = ("freeze", "schedule_free")

# What a run with one of them needs besides.
NEEDS: dict[str, dict[str, Any]] = {
    "loss_prediction": {"log_every": 1},
    "schedule_free": {"optimizer": schedule_free},
}
RECIPE_NEEDS = {
    "schedule_free": {"optimizer": {"_target_": "schedulefree.SGDScheduleFree", "lr": 0.1}}
}


def make(name: str) -> list[Callback]:
    return [lookup("callback", name)(**EVERY[name])]


def test_none_is_left_out() -> None:
    shipped = [n for n in names("callback") if lookup("callback", n).__module__.startswith("pacel")]
    assert sorted([*EVERY, *NEED_A_GPU]) == shipped


@pytest.mark.parametrize("name", EVERY)
def test_stopped_again_and_again_and_in_a_validation_it_ends_the_same(
    name: str, tmp_path: Path
) -> None:
    """Before the first step, in an epoch, where a validation is due (3, 9), and in one (6), which
    is left and made again."""
    stops = [StopAt(0), StopAt(2), StopAt(3), LeaveValidation(6), StopAt(9), StopAt(10)]
    check_resumed(tmp_path, lambda: make(name), *stops, **NEEDS.get(name, {}))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in CHANGE_WEIGHTS])
def test_the_trained_weights_are_those_without_it(name: str, tmp_path: Path) -> None:
    check_undisturbed(tmp_path, lambda: make(name), **NEEDS.get(name, {}))


@pytest.mark.parametrize("name", EVERY)
def test_the_same_object_may_be_in_a_second_run(name: str, tmp_path: Path) -> None:
    """Nothing of the first run is left in it: the second ends as the first."""
    callbacks = make(name)
    states = []
    for folder in ("first", "second"):
        trainer = build(tmp_path / folder, *callbacks, **NEEDS.get(name, {}))
        trainer.train(seed=5)
        written = (tmp_path / folder / "metrics.jsonl").read_bytes()
        states.append((written, bits(callbacks[0].state_dict())))
    assert states[0] == states[1]


def play(folder: Path) -> Any:
    callbacks = [callback for name in EVERY if name not in NEEDS for callback in make(name)]
    trainer = build(folder, *callbacks)
    trainer.train(seed=5)
    states = [bits(callback.state_dict()) for callback in callbacks]
    return trainer.global_step, bits(trainer.model.state_dict()), states


def test_on_two_ranks_their_states_are_the_same(ranks: Ranks, tmp_path: Path) -> None:
    """So that whatever follows from a state is decided alike."""
    first, second = ranks(play, 2, tmp_path)
    assert first == second
    assert first[0] == STEPS


def play_schedule_free() -> Any:
    trainer = build(None, *make("schedule_free"), **NEEDS["schedule_free"])
    trainer.train(seed=5)
    return bits(trainer.model.state_dict()), bits(trainer.callbacks[0].state_dict())


def test_on_two_ranks_schedule_free_weights_are_the_same(ranks: Ranks) -> None:
    first, second = ranks(play_schedule_free, 2)
    assert first == second


RECIPE = """
trainer: {max_steps: 6, progress: false, log_every: 2, validate_every: 2}
model: {_target_: torch.nn.Linear, in_features: 64, out_features: 10}
loss_fn: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
code: callback_data.py
train_dataloader: &data
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: callback_data.Data}
  batch_size: 8
val_dataloader: *data
"""
CODE = """
import torch
from torch.utils.data import TensorDataset

class Data(TensorDataset):
    def __init__(self) -> None:
        super().__init__(torch.eye(64)[:24], torch.arange(24) % 10)
"""


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe's code neither stays imported nor on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    del sys.modules["callback_data"]


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_names_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE) | {"callbacks": {"it": {"type": name, **EVERY[name]}}}
    recipe |= RECIPE_NEEDS.get(name, {})
    Path("run.yaml").write_text(yaml.safe_dump(recipe))
    Path("callback_data.py").write_text(CODE)
    trainer = build_trainer(load_recipe("run.yaml", trust=["schedulefree"]))
    assert type(trainer.callbacks[0]) is lookup("callback", name)
    assert trainer.train(seed=1).global_step == 6
