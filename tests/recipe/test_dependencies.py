"""What one component needs of another: parameters, groups of them, the length of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.trainer.trainer import Trainer

Write = Callable[..., Path]
ADAM = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5}
NET = {"_target_": "toy.Net", "width": 4}
GAN = {
    "trainer": {"_target_": "toy.Gan", "epochs": 2, "progress": False},
    "model": {"generator": NET, "discriminator": NET | {"width": 2}},
    "optimizer": {"generator": ADAM, "discriminator": ADAM | {"lr": 0.2}},
}
SCHEDULES = "torch.optim.lr_scheduler."


def build(path: Path, *overrides: str) -> Trainer:
    return build_trainer(load_recipe(path, overrides))


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        build(path, *overrides)
    return str(caught.value)


# Parameter groups


def test_vectors_and_names_get_settings_of_their_own(recipe: Write):
    """Given groups for one layer by name and for biases, when the optimizer is built, then each
    parameter is in the first group that takes it, and the rest keeps the optimizer's settings."""
    groups = [{"params": "layers.2.*", "lr": 0.01}, {"params": "vectors", "weight_decay": 0}]
    trainer: Any = build(recipe(optimizer=ADAM | {"groups": groups}))
    layers, found = trainer.model.layers, trainer.optimizer.param_groups
    held = [[id(p) for p in group["params"]] for group in found]
    assert held == [
        [id(layers[0].weight)],
        [id(layers[2].weight), id(layers[2].bias)],
        [id(layers[0].bias)],
    ]
    assert [(g["lr"], g["weight_decay"]) for g in found] == [(0.1, 0.5), (0.01, 0.5), (0.1, 0)]
    assert trainer.train(seed=0).complete


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("vectors", "optimizer.groups: expected a list of groups"),
        ([{"params": "vectors"}], "optimizer.groups.0: expected {params: vectors or patterns"),
        ([{"lr": 1}], "optimizer.groups.0: expected {params"),
        ([{"params": "*", "lrr": 1}], "optimizer.groups.0.lrr: AdamW has no such setting; did"),
        ([{"params": "*", "lr": "a"}], "optimizer.groups.0.lr: expected number"),
        ([{"params": ["x*"], "lr": 1}], "optimizer.groups.0: no parameter is left for x*. There"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(recipe: Write, groups: Any, expected: str):
    assert expected in refusal(recipe(optimizer=ADAM | {"groups": groups}))


# Several by name


def test_a_gan_is_a_recipe(recipe: Write):
    """Given two models, when each optimizer and scheduler names one, then they belong together and
    the trainer trains both."""
    schedules = {"discriminator": {"type": "warmup_cosine"}}
    trainer: Any = build(recipe(**GAN, lr_scheduler=schedules))
    for name, rate in (("generator", 0.1), ("discriminator", 0.2)):
        [group] = trainer.optimizer[name].param_groups
        mine = [id(p) for p in trainer.model[name].parameters()]
        assert ([id(p) for p in group["params"]], group["initial_lr"]
                if name == "discriminator" else group["lr"]) == (mine, rate)  # fmt: skip
    assert trainer.lr_scheduler["discriminator"].optimizer is trainer.optimizer["discriminator"]
    assert trainer.lr_scheduler["discriminator"].total_steps == 6
    before = [p.clone() for model in trainer.model.values() for p in model.parameters()]
    assert trainer.train(seed=0).global_step == 6
    after = [p for model in trainer.named_models().values() for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_optimizer_may_hold_the_parameters_of_all_models(recipe: Write):
    groups = [{"params": "generator.*", "lr": 0.3}]
    trainer: Any = build(recipe(**GAN | {"optimizer": ADAM | {"groups": groups}}))
    sizes = [len(group["params"]) for group in trainer.optimizer.param_groups]
    assert sizes == [4, 4]
    assert trainer.optimizer.param_groups[1]["lr"] == 0.3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": {"generater": ADAM}}, "no model of this name; did you mean 'generator'"),
        ({"lr_scheduler": {"type": "warmup_cosine"}}, "give schedulers by their names: generator"),
        ({"lr_scheduler": {"x": {"type": "warmup_cosine"}}}, "no optimizer of this name"),
        ({"model": NET}, "optimizer.generator: several by name need several of `model:`"),
        ({"model": {"generator": NET, "discriminator": {"width": 2}}}, "model.discriminator: exp"),
    ],
)
def test_names_that_do_not_fit_are_told(recipe: Write, changes: dict, expected: str):
    assert expected in refusal(recipe(**GAN | changes))


# Schedulers


def sequential(**changes: Any) -> dict[str, Any]:
    return {
        "_target_": SCHEDULES + "SequentialLR",
        "schedulers": [
            {"_target_": SCHEDULES + "LinearLR", "total_iters": 2},
            {"_target_": SCHEDULES + "CosineAnnealingLR"},
        ],
        "milestones": [2],
    } | changes


def test_schedulers_that_follow_each_other_know_their_stretch(recipe: Write):
    loaded = load_recipe(recipe(lr_scheduler=sequential()))
    trainer: Any = build_trainer(loaded)
    [record] = trainer.callbacks
    assert trainer.lr_scheduler._schedulers[1].T_max == 6 - 2
    assert "lr_scheduler.schedulers.1.T_max" in [setting for _, setting in record.plan]
    assert build_trainer(loaded).train(seed=0).complete


def test_milestones_may_be_shares_of_the_run(recipe: Write):
    path = recipe(lr_scheduler=sequential(milestones=[0.5]))
    scheduler: Any = build(path, "trainer.epochs=4").lr_scheduler
    assert (scheduler._milestones, scheduler._schedulers[1].T_max) == ([6], 6)


def test_schedulers_that_act_together_know_the_whole(recipe: Write):
    node = sequential(_target_=SCHEDULES + "ChainedScheduler")
    del node["milestones"]
    scheduler: Any = build(recipe(lr_scheduler=node)).lr_scheduler
    assert scheduler._schedulers[1].T_max == 6


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (sequential(milestones=[9]), "milestones [9] do not split 6 optimizer steps into 2"),
        (sequential(milestones=[2, 3]), "2 schedulers need 1 increasing milestones"),
        ({"_target_": SCHEDULES + "LambdaLR", "lr_lambda": "x"}, "takes Python functions"),
        ({"_target_": SCHEDULES + "MultiplicativeLR"}, "takes Python functions"),
        (sequential(schedulers=[{"_target_": "toy.Net", "width": 1}]), "is not a lr_scheduler"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(recipe: Write, node: dict, expected: str):
    assert expected in refusal(recipe(lr_scheduler=node))


@pytest.mark.parametrize(
    ("ranks", "changes", "steps"),
    [
        (1, [], 6),  # 20 samples, 8 at a time, 2 epochs
        (2, [], 4),
        (4, [], 2),
        (2, ["trainer.gradient_accumulation_steps=2"], 2),
        (1, ["trainer.global_batch_size=16"], 4),
        (2, ["trainer.global_batch_size=16"], 4),
        (2, ["trainer.lr_scheduler_interval=epoch"], 2),
    ],
)
def test_the_length_is_in_optimizer_steps_at_any_layout(
    recipe: Write, monkeypatch, ranks: int, changes: list[str], steps: int
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    trainer: Any = build(recipe(lr_scheduler={"type": "warmup_cosine", "warmup": 0.5}), *changes)
    assert trainer.lr_scheduler.total_steps == steps
    assert trainer.lr_scheduler.warmup_steps == steps / 2
    if ranks == 1:
        assert trainer.train(seed=0).global_step == steps or "epoch" in changes[0]
