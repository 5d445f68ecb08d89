"""What is wrong with a study is told before its first trial, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuned_recipes import RECIPE, write

from paceline.errors import RecipeError
from paceline.recipe.compose import compose
from paceline.tune.checks import check_study


def mistakes(folder: Path, tune: str, *overrides: str, recipe: str = RECIPE) -> str:
    with pytest.raises(RecipeError) as caught:
        check_study(compose(write(folder, tune, recipe), overrides))
    return str(caught.value).replace(f"{folder}/", "")


def test_a_study_without_mistakes(tmp_path: Path) -> None:
    checked = check_study(compose(write(tmp_path)))
    assert [parameter.key for parameter in checked.space.parameters] == [
        "optimizer.lr",
        "train_dataloader.batch_size",
    ]
    assert checked.settings.metrics == ["val/loss"]
    assert checked.recipe.run_dir == Path("runs/p/s")


def test_all_mistakes_of_the_space_are_told_with_line_and_nearest_name(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        """\
tune:
  sampler: tpee
  pruner: {type: medain}
  metrik: val/loss
  space:
    optimizer.lr: {float: [0.5, 0.1]}
    optimizer.momentum: {float: [0, 0.9], log: true}
    optimizer.weight_decay: {float: [0, 1], step: 0.3}
    model.bias: [true, true]
    loss_fn.reduction: []
    optimizer.dampening: {float: [0, 1], when: {optimizer.momentun: 0.9}}
    optimizer.nesterov: {flaot: [0, 1]}
    trainer.max_grad_norm: 3
""",
    )
    for line in (
        "11 mistakes",
        "toy.yaml:17: tune.sampler.type: there is no sampler 'tpee'; did you mean 'tpe'?",
        "toy.yaml:18: tune.pruner.type: there is no pruner 'medain'; did you mean 'median'?",
        "toy.yaml:19: tune.metrik: there is no such key; did you mean 'metric'?",
        "toy.yaml:21: tune.space.optimizer.lr.float: low is above high",
        "toy.yaml:22: tune.space.optimizer.momentum.float: a logarithmic scale begins above 0",
        "toy.yaml:23: tune.space.optimizer.weight_decay.step: steps of 0.3 from 0 miss high, 1: "
        "the last is 0.9",
        "toy.yaml:24: tune.space.model.bias: duplicate choice: True",
        "toy.yaml:25: tune.space.loss_fn.reduction: there are no choices",
        "toy.yaml:26: tune.space.optimizer.dampening.when.optimizer.momentun: optimizer.momentun "
        "is not searched",
        "toy.yaml:27: tune.space.optimizer.nesterov: expected one of float, int, choices; got "
        "flaot; did you mean 'float'?",
        "toy.yaml:28: tune.space.trainer.max_grad_norm: expected `{float: [low, high]}`",
    ):
        assert line in told, told


def test_choices_that_optuna_takes_for_one_are_refused(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        """\
tune:
  space:
    model.bias: [1, true]
    optimizer.nesterov: [false, true, 0]
    optimizer.momentum: [0.0, 0]
""",
    )
    assert "3 mistakes" in told
    assert "toy.yaml:18: tune.space.model.bias: duplicate choice: True equals 1 before it" in told
    assert "toy.yaml:19: tune.space.optimizer.nesterov: duplicate choice: 0 equals False" in told
    assert "toy.yaml:20: tune.space.optimizer.momentum: duplicate choice: 0 equals 0.0" in told


def test_the_recipe_is_checked_with_each_value(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        """\
tune:
  space:
    optimizer.lrr: {float: [0.1, 1]}
    modle.width: [1, 2]
    train_dataloader.batch_size: [4, many]
    run.name: [a, b]
""",
    )
    assert "toy.yaml:18: tune.space.optimizer.lrr: with 0.1: " in told
    assert "did you mean 'lr'?" in told
    assert "toy.yaml:19: tune.space.modle.width: with 1: modle: there is no such key" in told
    assert "toy.yaml:20: tune.space.train_dataloader.batch_size: with 'many': " in told
    assert "tune.space.run.name: `run` is the study's own" in told


def test_whole_components_are_checked_too(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        """\
tune:
  space:
    optimizer:
      - {_target_: torch.optim.SGD, lr: 0.1}
      - {_target_: torch.optim.Adam, momentum: 0.9}
""",
    )
    assert "toy.yaml:18: tune.space.optimizer: with 'Adam': optimizer.momentum: " in told
    assert "SGD" not in told


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    told = mistakes(
        tmp_path,
        """\
tune:
  metric: [val/loss, val/accuracy]
  direction: [min, upwards]
  pruner: median
  sampler: grid
  first: [{optimizer.lr: 7, optimizer.l: 1}]
  space: {optimizer.lr: {float: [0.1, 1]}}
seeds: [1, 2]
""",
    )
    assert "tune.direction: expected 'min' or 'max'" in told
    assert "tune.pruner: 'median' compares trials by one metric" in told
    assert "tune.sampler.type: 'grid' tries every value, and optimizer.lr has no end" in told
    assert "toy.yaml:21: tune.first.0.optimizer.lr: 7 is not between 0.1 and 1." in told
    assert "tune.first.0.optimizer.l: optimizer.l is not searched" in told
    assert "did you mean 'optimizer.lr'?" in told
    assert "in a study it is `tune.seeds`" in told
    wilcoxon = "tune: {pruner: wilcoxon, audit: 2, space: {optimizer.lr: [1, 2]}}\n"
    assert "tune.audit" in mistakes(tmp_path, wilcoxon)


def test_a_metric_that_no_validation_logs(tmp_path: Path) -> None:
    tune = "tune: {metric: val/los, space: {optimizer.lr: [0.1, 0.2]}}\n"
    told = mistakes(tmp_path, tune)
    assert "tune.metric: 'val/los' is not measured; did you mean 'val/loss'?" in told
    without = RECIPE[: RECIPE.index("val_dataloader")]
    assert "nothing is ever validated" in mistakes(tmp_path, tune, recipe=without)


def test_a_recipe_without_the_section(tmp_path: Path) -> None:
    assert "no section `tune:`" in mistakes(tmp_path, "")
    assert "nothing is searched" in mistakes(tmp_path, "tune: {trials: 3}\n")
