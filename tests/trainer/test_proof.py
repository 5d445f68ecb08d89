"""A run proves that its state can be loaded again, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Callback, Trainer
from paceline.errors import StateError
from small import checkpoints, fitted, line, same, settings, weights


class Forgets(Callback):
    """Does not take back what it gives."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [1, 2], "inner": {"count": 3}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("seen")


class Grows(Callback):
    """Gives another value after it is loaded."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"inner": {"count": self.count}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["inner"]["count"] + 1


class Ignores(nn.Module):
    """Its second line is saved and not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = line(), line()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)

    def load_state_dict(self, state_dict: Any) -> None:  # type: ignore[override]
        self.a.load_state_dict({"weight": state_dict["a.weight"], "bias": state_dict["a.bias"]})


class Makes(nn.Module):
    """Makes a layer in its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.a = line()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "b"):
            self.b = line()
        return self.a(x) + self.b(x)


class Forgetful(torch.optim.SGD):
    """Saves its moments and begins anew with every load."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class Rounds(torch.optim.SGD):
    """Loads its moments in half precision."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].half().float()


class Noted(Callback):
    """Keeps what cannot be stored, from its first step on."""

    kept: Any = None

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.kept = {"a set": {1}}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]


def with_optimizer(kind: Any) -> dict[str, Any]:
    model = line()
    return {"model": model, "optimizer": kind(model.parameters(), lr=0.05, momentum=0.9)}


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"callbacks": [Forgets()]}, 0, "callbacks.Forgets.*not loaded back: KeyError"),
        ({"callbacks": [Grows()]}, 0, "callbacks.Grows.inner.count: is saved, and is another"),
        ({"model": Ignores()}, 0, r"models.model.b.weight: is saved, and is another value"),
        ({"model": Makes()}, 1, r"models.model.b.weight.*made or replaced it"),
        (with_optimizer(Forgetful), 1, r"optimizers.optimizer.state.model.*: is saved, and is an"),
        (with_optimizer(Rounds), 1, r"optimizers.optimizer.state.model.*: is saved, and is anoth"),
        ({"callbacks": [Noted()]}, 1, "callbacks.Noted.kept.a set: a set cannot be stored"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(
    changes: dict[str, Any], step: int, message: str, tmp_path: Path
) -> None:
    """Given state that is there before training (0) or after a step (1), when the run starts."""
    trainer = Trainer(**settings(run_dir=tmp_path, **changes))

    with pytest.raises(StateError, match=message):
        trainer.fit()

    assert trainer.global_step == step
    assert checkpoints(tmp_path) == []


def test_a_moment_that_comes_late_is_proven_at_its_first_save(tmp_path: Path) -> None:
    """Given an optimizer that first steps in the third window, which its checkpoint refuses."""

    class Late(Trainer):
        def step(self, window: Any) -> None:
            for batch, _ in window:
                self.backward(self.loss(batch))
            if self.global_step >= 2:
                self.optimizer_step()

    said = ""
    try:
        Late(**settings(run_dir=tmp_path, **with_optimizer(Forgetful))).fit()
    except StateError as error:
        said = str(error)

    assert "optimizers.optimizer.state" in said
    assert checkpoints(tmp_path) == []


class Told(Callback):
    """Knows when it was loaded, and holds on to a parameter group and to moments."""

    loaded = False
    groups: list[Any]

    def on_train_start(self, trainer: Trainer) -> None:
        self.groups = trainer.optimizer.param_groups

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        assert trainer.optimizer.param_groups is self.groups
        self.groups[0]["lr"] *= 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": self.loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["loaded"]
        self.resumed = True


def test_the_proof_changes_nothing(tmp_path: Path) -> None:
    """Given objects that others refer to, when a run is saved, its weights are those of another."""
    told = Told()
    unsaved = fitted(callbacks=[Told()])

    saved = fitted(callbacks=[told], run_dir=tmp_path)

    assert same(weights(saved), weights(unsaved))
    assert not hasattr(told, "resumed")


def test_a_run_that_writes_nothing_needs_no_proof() -> None:
    assert fitted(callbacks=[Forgets()]).result.complete
