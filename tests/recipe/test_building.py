"""Building a recipe: reproducible weights, schedules that know the run's length, a kept copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from paceline.errors import ConfigError, RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.schedules import WarmupCosine

Write = Callable[..., Path]


def build(path: Path, *overrides: str):
    return build_trainer(load_recipe(path, overrides))


def test_weights_are_a_function_of_the_seed(recipe: Write):
    path = recipe()

    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)  # whatever was drawn before does not matter
        return build(path, f"seed={seed}").model.layers[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_every_part_reaches_the_trainer(recipe: Write):
    trainer = build(
        recipe(val_dataloader={"_target_": "toy.Batches"}),
        "trainer.max_grad_norm=1",
        "trainer.metric_monitor={metric_name: val/loss, mode: min}",
        "+checkpoint.every_steps=3",
        "callbacks.lr.type=learning_rate",
        "callbacks.off=null",
        "loggers=[]",
        "run.dir=elsewhere",
    )
    assert type(trainer.model).__module__ == "toy"
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["params"][0] is trainer.model.layers[0].weight
    assert isinstance(trainer.loss_fn, torch.nn.MSELoss)
    assert (trainer.epochs, trainer.max_grad_norm) == (2, 1)
    assert trainer.metric_monitor.metric_name == "val/loss"
    assert trainer.checkpoint_policy.every_steps == 3
    assert [type(c).__name__ for c in trainer.callbacks] == ["LearningRate", "RecordRecipe"]
    assert trainer.loggers == []
    assert trainer.run_dir == Path("elsewhere")


def test_validation_loaders_may_be_several_by_name(recipe: Write):
    several = {"near": {"_target_": "toy.Batches"}, "far": {"_target_": "toy.Batches"}}
    trainer = build(
        recipe(val_dataloader=several), "+trainer.metric_monitor={metric_name: val/far/loss}"
    )
    assert [*trainer.val_dataloader] == ["near", "far"]
    with pytest.raises(RecipeError, match=r"trainer.metric_monitor: 'val/loss' is not measured"):
        build(recipe(val_dataloader=several), "+trainer.metric_monitor={metric_name: val/loss}")
    misspelt = recipe(val_dataloader={**several, "far": {"_target_": "toy.Batchs"}})
    with pytest.raises(RecipeError, match=r"val_dataloader.far._target_: .*'Batchs'"):
        build(misspelt)


def test_null_switches_checkpoints_off(recipe: Write):
    assert build(recipe(), "checkpoint=null").checkpoint_policy is None


@pytest.mark.parametrize(
    ("node", "name"),
    [({"type": "scaled", "scale": 2.0}, "Scaled"), ({"_target_": "toy.Fit"}, "Fit")],
)
def test_a_trainer_of_the_users_own(recipe: Write, node: dict, name: str):
    trainer = build(recipe(trainer={"epochs": 1, **node}))
    assert type(trainer).__name__ == name
    assert getattr(trainer, "scale", 2.0) == 2.0


def test_a_factory_function_may_take_the_model(recipe: Write):
    trainer = build(
        recipe(
            model={"_target_": "toy.make_net", "width": 3},
            optimizer={"_target_": "toy.decayed", "lr": 0.5},
        )
    )
    assert trainer.model.layers[0].out_features == 3
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_nested_modules_are_given_by_position(recipe: Write):
    linear = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    node = {"_target_": "torch.nn.Sequential", "_args_": [linear, {"_target_": "torch.nn.Tanh"}]}
    assert [type(m).__name__ for m in build(recipe(model=node)).model] == ["Linear", "Tanh"]


def test_a_function_in_the_place_of_a_loss_is_the_loss(recipe: Write):
    one, two = torch.zeros(3), torch.full((3,), 2.0)
    loss = build(recipe(), "loss_fn={_target_: torch.nn.functional.mse_loss}").loss_fn
    assert loss(one, two) == 4.0
    loss = build(recipe(), "loss_fn={_target_: toy.own_loss, power: 3}").loss_fn
    assert loss(one, two) == 8.0


@pytest.mark.parametrize(
    ("node", "changes", "horizon"),
    [
        ({"type": "warmup_cosine"}, [], 6),  # 20 samples, 8 at a time, 2 epochs
        ({"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR"}, [], 6),
        ({"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0}, [], 6),
        ({"type": "warmup_cosine"}, ["train_dataloader.drop_last=true"], 4),
        ({"type": "warmup_cosine"}, ["trainer.max_steps=5"], 5),
        ({"type": "warmup_cosine"}, ["trainer.gradient_accumulation_steps=2"], 4),
        ({"type": "warmup_cosine"}, ["trainer.lr_scheduler_interval=epoch"], 2),
        ({"type": "warmup_cosine", "total_steps": 99}, [], 99),
    ],
)
def test_a_schedule_is_told_the_length_of_the_run(recipe: Write, node, changes, horizon):
    loaded = load_recipe(recipe(lr_scheduler=node), changes)
    trainer = build_trainer(loaded)
    scheduler, [record] = trainer.lr_scheduler, trainer.callbacks
    assert getattr(scheduler, "total_steps", getattr(scheduler, "T_max", None)) == horizon
    told = [decision for decision, setting in record.plan if setting.startswith("lr_scheduler.")]
    assert len(told) == ("total_steps" not in node)


def test_a_recipe_may_be_built_again(recipe: Write):
    loaded = load_recipe(recipe(lr_scheduler={"type": "warmup_cosine"}))
    plan = [*loaded.plan]
    horizons = [build_trainer(loaded).lr_scheduler.total_steps for _ in range(2)]
    assert horizons == [6, 6]
    assert loaded.plan == plan


def test_a_schedule_is_as_long_as_the_run_of_all_replica_groups(recipe: Write, monkeypatch):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://node1:29510")
    monkeypatch.setenv("REPLICA_GROUP_ID", "0")
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "2")
    trainer = build(recipe(lr_scheduler={"type": "warmup_cosine"}))
    assert trainer.lr_scheduler.total_steps == 4  # of 8 of 10 rows, twice, and the rest


def test_one_cycle_may_be_told_its_length_in_epochs(recipe: Write):
    node = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0}
    trainer = build(recipe(lr_scheduler=node | {"epochs": 3, "steps_per_epoch": 7}))
    assert trainer.lr_scheduler.total_steps == 21


def test_a_constructor_that_fails_is_named_with_its_place(recipe: Write):
    with pytest.raises(RecipeError, match=r"toy.yaml:5: model: Net could not be built: RuntimeErr"):
        build(recipe(model={"_target_": "toy.Net", "width": -1}))


def test_the_run_folder_keeps_a_recipe_that_runs_again(recipe: Write, monkeypatch, capsys):
    monkeypatch.setenv("TOY_WIDTH", "6")
    path = recipe(model={"_target_": "toy.Net", "width": "${oc.decode:${oc.env:TOY_WIDTH}}"})
    loaded = load_recipe(path)
    build_trainer(loaded).train(seed=loaded.seed)
    kept = loaded.run_dir / "recipe.yaml"
    assert "${oc.decode:${oc.env:TOY_WIDTH}}" in kept.read_text()
    assert (loaded.run_dir / "code" / "toy.py").read_text() == path.with_name("toy.py").read_text()

    path.with_name("toy.py").unlink()
    again = load_recipe(kept)
    assert again.run_dir == loaded.run_dir
    assert build_trainer(again).train(seed=again.seed).complete
    assert "is complete" in capsys.readouterr().err
    plan = json.loads((loaded.run_dir / "run.json").read_text())["plan"]
    assert "run.dir" in [line["setting"] for line in plan]


def test_a_recipe_that_may_not_go_on_with_the_run_is_not_recorded(recipe: Write):
    path = recipe()
    first = load_recipe(path)
    build_trainer(first).train(seed=0)
    before = (first.run_dir / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        build(path, "optimizer.lr=1.0", "trainer.epochs=3").train(seed=0)
    assert (first.run_dir / "recipe.yaml").read_text() == before


def test_warmup_cosine_follows_its_formula():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, total_steps=10, warmup=0.2, min_ratio=0.1)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[10] == rates[11] == pytest.approx(0.2)
    assert json.loads(json.dumps(schedule.state_dict())) == schedule.state_dict()


def test_warmup_cosine_goes_on_where_it_stood_and_on_a_longer_curve_if_told_so():
    def make(total: int) -> WarmupCosine:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return WarmupCosine(optimizer, total_steps=total)

    first, same, longer = make(10), make(10), make(20)
    for _ in range(4):
        first.optimizer.step()
        first.step()
    for other in (same, longer):
        other.load_state_dict(first.state_dict())
        other.optimizer.step()
        other.step()
    first.optimizer.step()
    first.step()
    assert same.get_last_lr() == first.get_last_lr()
    assert longer.get_last_lr() == [make(20).factor(5)]


@pytest.mark.parametrize(
    "wrong", [{"total_steps": 0}, {"warmup": 1.5}, {"warmup": 11}, {"min_ratio": 2.0}]
)
def test_warmup_cosine_refuses_numbers_that_make_no_schedule(wrong: dict):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError):
        WarmupCosine(optimizer, **({"total_steps": 10} | wrong))


SAMPLERS = [
    {"sampler": {"_target_": "torch.utils.data.RandomSampler", "num_samples": 7}},
    {"sampler": {"_target_": "torch.utils.data.SequentialSampler"}},
    {
        "batch_sampler": {
            "_target_": "torch.utils.data.BatchSampler",
            "sampler": {"_target_": "torch.utils.data.SequentialSampler"},
            "batch_size": 4,
            "drop_last": False,
        },
        "batch_size": 1,
    },
]


@pytest.mark.parametrize("given", SAMPLERS, ids=["random", "sequential", "in batches"])
def test_a_sampler_gets_the_data_set_of_its_loader(recipe, given):
    loader = {
        "_target_": "torch.utils.data.DataLoader",
        "dataset": {"_target_": "toy.Points", "n": 10},
        "batch_size": 4,
        **given,
    }
    made = build_trainer(load_recipe(recipe(train_dataloader=loader))).train_dataloader
    sampler = made.sampler if "sampler" in given else made.batch_sampler.sampler
    assert sampler.data_source is made.dataset
    assert sum(len(batch[0]) for batch in made) == (7 if "num_samples" in str(given) else 10)


def test_a_project_may_have_brackets_in_its_name(recipe):
    """As a study's trials have in pytorch_template; the run is found again at a resume."""
    path = recipe(run={"project": "Opt[0]", "name": "b[1]"})
    trainer = build_trainer(load_recipe(path))
    trainer.train()
    assert trainer.result.checkpoint.parts[-5:-1] == ("runs", "Opt[0]", "b[1]", "checkpoints")
    again = build_trainer(load_recipe(path, ["trainer.epochs=3"]))
    again.train()
    assert (again.global_step, trainer.global_step) == (9, 6)
    assert again.local_batches == 3
