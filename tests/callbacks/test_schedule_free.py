"""ScheduleFree: what is validated is the average, what is trained comes back bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from real_runs import STEPS, LeaveValidation, build

from builders import Noisy, make_model
from paceline import Callback
from paceline.callbacks import ScheduleFree
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError
from paceline.testing import bits, rows
from small import settings


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return schedulefree.SGDScheduleFree(model.parameters(), lr=0.05)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)


class Buffered(torch.optim.SGD):
    """Keeps an average of its own, and the trained weights in its state while it evaluates."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", p.detach().clone())
            self.state[p]["mean"] = mean.lerp(p.detach(), 0.1)

    @torch.no_grad()
    def eval(self) -> None:
        for p in self.param_groups[0]["params"]:
            if "mean" in self.state[p]:
                self.state[p]["trained"] = p.clone()
                p.copy_(self.state[p]["mean"])

    @torch.no_grad()
    def train(self) -> None:
        for p in self.param_groups[0]["params"]:
            if "trained" in self.state[p]:
                p.copy_(self.state[p].pop("trained"))


def buffered(model: torch.nn.Module) -> torch.optim.Optimizer:
    return Buffered(model.parameters(), lr=0.05)


OPTIMIZERS = [sgd, adamw, buffered]


class Points(Callback):
    """Copies of the weights in training and in validation."""

    priority = 1000

    def __init__(self) -> None:
        self.trained: dict[int, Any] = {}
        self.judged: dict[int, Any] = {}

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.trained[trainer.global_step] = bits(trainer.model.state_dict())

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        self.judged[trainer.global_step] = bits(trainer.model.state_dict())


def run(optimizer: Any, run_dir: Path | None = None, *more: Callback, **changes: Any) -> Any:
    points = Points()
    changes = {"optimizer": optimizer, "lr_scheduler": None, **changes}
    trainer = build(run_dir, ScheduleFree(), points, *more, **changes)
    trainer.train(seed=5)
    return trainer, points


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_validating_disturbs_nothing(optimizer: Any) -> None:
    """However often it is validated, each step's weights are the same bits."""
    often, seldom = run(optimizer, validate_every=1), run(optimizer, validate_every=STEPS)
    assert often[1].trained == seldom[1].trained
    assert len(often[1].judged) == STEPS
    assert often[1].judged[STEPS] == seldom[1].judged[STEPS]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_validations_see_the_point_that_the_optimizer_means(optimizer: Any) -> None:
    """As in a loop by hand that ends with `optimizer.eval()`."""
    trainer, points = run(optimizer)
    assert points.judged[STEPS] != points.trained[STEPS]
    other = build(None, ScheduleFree(), optimizer=optimizer, lr_scheduler=None)
    seen = {}

    def by_hand() -> None:  # the trainer's own hook comes before the callback's
        model, made = copy.deepcopy((other.model, other.optimizer))
        made.eval()
        seen.update(bits(model.state_dict()))

    other.on_train_end = by_hand
    other.train(seed=5)
    assert points.judged[STEPS] == seen
    assert bits(trainer.model.state_dict()) == seen, "the models are left there at the end"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_has_both_points(optimizer: Any, tmp_path: Path) -> None:
    _, points = run(optimizer, tmp_path)
    tree = load_tree(tmp_path / "checkpoints" / f"step_{STEPS:08d}")
    assert bits(tree["models"]["model"]) == points.trained[STEPS]
    average = tree["callbacks"]["ScheduleFree"]["average"]
    assert {f"model.{name}": value for name, value in points.judged[STEPS].items()} == bits(average)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kept", [True, False])
def test_trained_further_it_goes_on_from_the_point_of_training(
    optimizer: Any, kept: bool, tmp_path: Path
) -> None:
    """By the same objects, or by new ones in the same folder."""
    whole, _ = run(optimizer, tmp_path / "whole", max_steps=STEPS)
    first, _ = run(optimizer, tmp_path / "parts", max_steps=7)
    if kept:
        first.max_steps = STEPS
        first.train(seed=5)
    else:
        first, _ = run(optimizer, tmp_path / "parts", max_steps=STEPS)
    assert bits(first.model.state_dict()) == bits(whole.model.state_dict())
    assert bits(first.optimizer.state_dict()) == bits(whole.optimizer.state_dict())


def test_a_second_run_without_a_folder_starts_from_the_point_of_training() -> None:
    trainer, points = run(sgd)
    trainer.max_steps = 1
    trainer.on_train_start = lambda: seen.update(bits(trainer.model.state_dict()))
    seen: dict[str, Any] = {}
    trainer.train(seed=5)
    assert seen == points.trained[STEPS]


def test_weights_that_were_changed_since_are_trained_as_they_are() -> None:
    trainer, _ = run(sgd)
    trainer.model.load_state_dict(make_model(seed=99).state_dict())
    trainer.on_train_start = lambda: seen.update(bits(trainer.model.state_dict()))
    seen: dict[str, Any] = {}
    trainer.train(seed=5)
    assert seen == bits(make_model(seed=99).state_dict())


def test_a_validation_that_is_left_saves_the_trained_weights(tmp_path: Path) -> None:
    trainer, points = run(sgd, tmp_path, LeaveValidation(6))
    tree = load_tree(tmp_path / "checkpoints" / "step_00000006")
    assert bits(tree["models"]["model"]) == points.trained[6] == bits(trainer.model.state_dict())
    assert tree["optimizers"]["optimizer"]["groups"][0]["train_mode"] is True


def test_what_is_measured_is_what_the_exported_weights_give(tmp_path: Path) -> None:
    run(sgd, tmp_path)
    average = load_tree(tmp_path / "checkpoints" / f"step_{STEPS:08d}")["callbacks"]
    model = make_model().eval().requires_grad_(False)
    state = average["ScheduleFree"]["average"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    quiet = Noisy(23, noise=0)
    exact = float(((model(quiet.x) - quiet.y) ** 2).mean())
    assert rows(tmp_path)[-1]["val/loss"] == pytest.approx(exact, rel=0.1)  # its noise is 0.1


class InPlace(torch.optim.SGD):
    """Keeps something in a tensor of its state while it evaluates."""

    def eval(self) -> None:
        for p in self.param_groups[0]["params"]:
            if "momentum_buffer" in self.state[p]:
                self.state[p]["momentum_buffer"].add_(p.detach())

    def train(self) -> None: ...


def test_an_optimizer_that_cannot_be_put_back_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"InPlace.eval\(\) changes its state in place"):
        run(lambda model: InPlace(model.parameters(), lr=0.1, momentum=0.9), validate_every=1)


def test_without_such_an_optimizer_it_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="optimizer is AdamW"):
        build(None, ScheduleFree()).train()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_such_an_optimizer_without_it_is_refused_before_training(optimizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"add the callback ScheduleFree\(\)"):
        build(None, optimizer=optimizer, lr_scheduler=None).train()
    assert settings()  # torch's own optimizers have no modes
