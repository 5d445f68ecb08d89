"""Preview: the recipe with its places, the model, the data and the learning rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paceline.checkup import preview
from paceline.checkup.schedule import plot
from paceline.checkup.settings import settings_of
from paceline.recipe import build_trainer
from paceline.recipe.compose import compose


def test_every_value_comes_with_its_place(tmp_path: Path, monkeypatch):
    """Given a value from a group's file, one from an override, a reference to it and a look-up,
    when the recipe is shown, then each says where it was written and the look-up stays one."""
    monkeypatch.setenv("SECRET_OF_MINE", "hush")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "big.yaml").write_text("_target_: toy.Net\nscale: 1.5\n")
    (tmp_path / "own.yaml").write_text(
        "defaults: [_self_, {model: big}]\nseed: 4\n"
        "run: {name: 'seed_${seed}', dir: '${oc.env:SECRET_OF_MINE}/${run.name}'}\n"
    )
    found = {s.key: (s.value, s.place) for s in settings_of(compose("own.yaml", ["seed=5"]))}
    assert found["model.scale"] == (1.5, "model/big.yaml:2")
    assert found["seed"] == (5, "override 'seed=5'")
    assert found["run.name"] == ("seed_5", "own.yaml:3")
    assert found["run.dir"][0] == "${oc.env:SECRET_OF_MINE}/${run.name}"
    assert "hush" not in str(found)


def test_a_reference_to_a_look_up_shows_the_look_up(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "hush")
    path = tmp_path / "a.yaml"
    path.write_text("a: '${oc.env:SECRET_OF_MINE}'\nb: 'x${a}'\nc: ['${a}', 1]\n")
    found = {s.key: s.value for s in settings_of(compose(path))}
    look_up = "${oc.env:SECRET_OF_MINE}"
    assert found == {"a": look_up, "b": f"x{look_up}", "c": [look_up, 1]}


def test_layers_have_shapes_and_sizes(recipe):
    shown = preview(recipe("+model.frozen=true"))
    layers = {layer.name: layer for layer in shown.layers}
    assert list(layers) == ["model", "model.first", "model.last"]
    assert (layers["model"].parameters, layers["model"].trainable) == (83, 27)
    assert layers["model.first"].output == "(8, 8) float32"
    assert (layers["model.last"].kind, layers["model.last"].depth) == ("Linear", 1)
    assert shown.parameters == (83, 27)
    assert shown.flops == 2 * 8 * (6 * 8 + 8 * 3)  # two matrix products of a batch of 8


def test_data_are_described(recipe):
    shown = preview(recipe("+trainer.gradient_accumulation_steps=2"))
    assert shown.training == {
        "samples": "40",
        "samples a step": "16",
        "batch": "list[(8, 6) float32, (8,) int64]",
        "batches an epoch": "5",
        "steps an epoch": "3",
        "steps in the run": "60",
        "workers": "0",
    }
    assert shown.validation["samples"] == "100"
    assert any("permutation" in decision for decision, _ in shown.plan)


def test_several_validation_loaders_are_described_by_name(recipe):
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": 8}
    loaders = {
        "near": {**loader, "dataset": {"_target_": "toy.Points", "n": 12}},
        "far": {**loader, "dataset": {"_target_": "toy.Points", "n": 20}},
    }
    shown = preview(recipe(val_dataloader=loaders)).validation
    assert (shown["near: samples"], shown["near: batches"]) == ("12", "2")
    assert (shown["far: samples"], shown["validates every"]) == ("20", "epoch")


def test_the_schedule_is_the_one_that_training_has(recipe):
    """Given a warm-up and a cosine, when the run is trained, then its rates are those shown."""
    checked = recipe()
    (schedule,) = preview(checked).schedules
    trainer = build_trainer(checked)
    trainer.run_dir, trainer.show_progress = None, False
    rates: list[float] = []
    trainer.on_before_optimizer_step = lambda optimizer: rates.append(
        optimizer.param_groups[0]["lr"]
    )
    trainer.train(seed=0)
    assert schedule.rates == rates
    assert (schedule.unit, schedule.peak, len(rates)) == ("optimizer steps", 9, 100)


@pytest.mark.parametrize(
    ("scheduler", "overrides", "unit", "rates"),
    [
        (None, [], "optimizer steps", [0.01] * 100),
        ({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 10},
         ["+trainer.lr_scheduler_interval=epoch"], "epochs", [0.01] * 10 + [0.001] * 10),
        ({"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
         ["+trainer.lr_scheduler_interval=metric"], "optimizer steps", [0.01]),
    ],
)  # fmt: skip
def test_schedules_of_every_interval(recipe, scheduler, overrides, unit, rates):
    (schedule,) = preview(recipe(*overrides, lr_scheduler=scheduler)).schedules
    assert schedule.unit == unit
    assert schedule.rates == pytest.approx(rates)
    assert ("metric" in schedule.note) == (len(rates) == 1)


def test_several_models_and_optimizers_are_shown(recipe):
    keys = {"model": None, "optimizer": None, "lr_scheduler": None}
    shown = preview(recipe("trainer._target_=toy.Pair", **keys))
    assert [layer.name for layer in shown.layers] == ["a", "b"]
    assert [layer.output for layer in shown.layers] == ["(8, 3) float32"] * 2
    assert [schedule.optimizer for schedule in shown.schedules] == ["one", "two"]
    assert (shown.flops, shown.problem) == (None, "")  # its step() is no forward pass
    assert shown.training["batch"] == "list[(8, 6) float32, (8,) int64]"


def test_a_derivative_in_the_forward_pass_is_no_problem(recipe):
    shown = preview(recipe("trainer._target_=toy.Penalised"))
    assert shown.problem == ""
    assert {layer.output for layer in shown.layers} == {"(8, 3) float32", "(8, 8) float32"}


def test_a_forward_pass_that_fails_leaves_the_rest(recipe):
    shown = preview(recipe("+model.wrong=true"))
    assert "mat1 and mat2" in shown.problem
    assert shown.flops is None
    assert shown.parameters == (83, 83)
    assert shown.training["batch"] == "list[(8, 6) float32, (8,) int64]"


def test_a_trainer_of_ones_own_that_takes_no_callbacks_is_previewed(recipe) -> None:
    shown = preview(recipe("trainer._target_=toy.Quiet"))
    assert [layer.name for layer in shown.layers] == ["model", "model.first", "model.last"]


def test_nothing_is_written_and_the_same_is_shown_again(recipe, tmp_path: Path):
    checked = recipe()
    before = {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts}
    state = torch.get_rng_state()
    first = preview(checked).as_json()
    torch.manual_seed(77)
    assert preview(checked).as_json() == first
    torch.set_rng_state(state)
    assert {p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts} == before
    assert json.loads(json.dumps(first))["parameters"] == 83


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 70, 71, 1000])
def test_a_picture_fits_its_width_and_reaches_its_corners(length, ascii):
    rates = [1e-3 * (i + 1) / length for i in range(length)]
    lines = plot(rates, "optimizer steps", width=80, ascii=ascii)
    assert all(len(line) <= 80 for line in lines)
    assert all(line.isascii() for line in lines) == ascii
    dot = "*" if ascii else "•"
    assert lines[0].rstrip().endswith(dot)  # the highest rate, at the top right
    assert lines[0].startswith("1.00e-03")
    assert lines[-1].endswith(f"{length:,} optimizer steps")
    width = max(len(line) for line in lines)
    columns = [{line[c] for line in lines[:-2] if c < len(line)} for c in range(10, width)]
    assert sum(dot in column for column in columns) >= min(length, 70)


def test_a_rate_of_zero_all_along_is_drawn_on_the_floor():
    lines = plot([0.0, 0.0], "epochs", ascii=True)
    assert "**" in lines[-3]
    assert "*" not in "".join(lines[:-3])
