"""pytorch_template's users at home: OptimizeConfig, its study, and what its trials leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from paceline.errors import ConfigError, RecipeError
from paceline.log.run_record import read_run
from paceline.tune import (
    OptimizeConfig,
    RunConfig,
    TrialsFailed,
    load_best_model,
    load_model,
    load_study,
    run,
)

OPT = """\
study_name: search
trials: 3
seed: 42
metric: val_loss
direction: minimize
sampler: {name: optuna.samplers.TPESampler, kwargs: {n_startup_trials: 2}}
pruner: {name: optuna.pruners.MedianPruner, kwargs: {n_startup_trials: 1}}
search_space:
  net_config:
    nodes: {type: categorical, choices: [4, 8]}
  optimizer_config:
    lr: {type: float, min: 1.e-4, max: 1.e-1, log: true}
  batch_size: {type: int, min: 8, max: 16, step: 8}
"""


@pytest.fixture
def config(project: Path) -> RunConfig:
    (project / "opt.yaml").write_text(OPT)
    return RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1])


def opt(**changes: Any) -> OptimizeConfig:
    words = [f"{key}={value}" for key, value in changes.items()]
    return OptimizeConfig.from_yaml("opt.yaml", words)


def told(study: optuna.Study) -> list[Any]:
    return [(t.number, t.state.name, t.params, t.values) for t in study.trials]


def test_PT_21_two_fresh_studies_of_one_seed_suggest_the_same(config: RunConfig) -> None:
    best = run(config, optimize_config=opt())
    first = load_study("Parity", "search")
    assert len(first.trials) == 3
    assert best == first.best_value
    names = ["net_config_nodes", "optimizer_config_lr", "batch_size"]
    assert list(first.trials[0].params) == names
    run(config.with_overrides(project="Again"), optimize_config=opt())
    assert told(load_study("Again", "search")) == told(first)
    run(config.with_overrides(project="Other"), optimize_config=opt(seed=1, trials=1))
    assert told(load_study("Other", "search"))[0][2] != told(first)[0][2]


def test_PT_22_pruners_work_and_a_restarted_study_keeps_what_it_knows(config: RunConfig) -> None:
    """Intermediate values are Optuna's own; 2 trials and 1 more are 3."""
    run(config, optimize_config=opt(trials=2))
    run(config, optimize_config=opt())
    parts = load_study("Parity", "search")
    assert all(trial.intermediate_values for trial in parts.trials)
    run(config.with_overrides(project="Whole"), optimize_config=opt())
    assert told(parts) == told(load_study("Whole", "search"))
    for name in ("PFLPruner", "pruner.PFLPruner", "predicted_final"):
        chosen = replace(opt(), pruner={"name": name, "kwargs": {"top_k": 3}})
        assert chosen.settings()["pruner"] == {"type": "predicted_final", "top_k": 3}


def test_PT_22_a_pruned_trial_trains_no_further_seed(config: RunConfig) -> None:
    config = config.with_overrides(seeds=[1, 2])
    with pytest.raises(ConfigError, match="there is no study"):
        load_study("Parity", "search")
    threshold = {"name": "optuna.pruners.ThresholdPruner", "kwargs": {"upper": 0.0}}
    run(config, optimize_config=replace(opt(trials=1), pruner=threshold))
    study = load_study("Parity", "search")
    assert [trial.state.name for trial in study.trials] == ["PRUNED"]
    group = Path("runs/Parity_Opt", study.trials[0].user_attrs["group_name"])
    assert read_run(group / "seed_1")["status"] == "pruned"
    assert not (group / "seed_2").exists()


def test_PT_24_batch_size_and_optimizer_are_searched(config: RunConfig) -> None:
    """Loaders are made anew for each trial; so is the optimizer, of another class."""
    space = {
        "batch_size": {"type": "categorical", "choices": [4, 20]},
        "optimizer": {
            "type": "categorical",
            "choices": ["torch.optim.SGD", "torch.optim.adamw.AdamW"],
        },
    }
    search = OptimizeConfig("search", space, trials=4, sampler={"name": "GridSampler"})
    run(config, optimize_config=search)
    study = load_study("Parity", "search")
    seen = set()
    for trial in study.trials:
        group = Path("runs/Parity_Opt", trial.user_attrs["group_name"])
        record = read_run(group / "seed_1")
        steps = -(-20 // trial.params["batch_size"]) * 3
        if trial.state.name == "COMPLETE":
            assert record["step"] == steps
        kept = RunConfig.from_yaml(group / "config.yaml")
        assert (kept.batch_size, kept.optimizer) == tuple(trial.params.values())
        seen.add(tuple(trial.params.values()))
    assert len(seen) == 4
    with pytest.raises(ConfigError, match="the loaders that were given have their own"):
        run(config, [1], [1], optimize_config=opt())


def test_8_an_error_in_a_trial_is_a_failure_with_its_trace(config: RunConfig) -> None:
    def breaks(**settings: Any) -> Any:
        raise KeyError("a typing mistake")

    with pytest.raises(TrialsFailed, match="a typing mistake"):
        run(config, optimize_config=opt(trials=5), trainer=breaks)
    states = [trial.state.name for trial in load_study("Parity", "search").trials]
    assert states == ["FAIL"] * 5


def test_43_the_best_model_and_any_other_are_loaded(config: RunConfig) -> None:
    run(config, optimize_config=opt(trials=2))
    study = load_study("Parity", "search")
    model, kept = load_best_model("Parity", "search")
    assert kept.net_config["nodes"] == study.best_trial.params["net_config_nodes"]
    x, y = kept.create_dataloaders()[1].dataset.tensors
    loss = torch.nn.functional.mse_loss(model(x), y)
    assert float(loss) == pytest.approx(study.best_value, rel=1e-6)
    again, _ = load_model("Parity_Opt", study.best_trial.user_attrs["group_name"], 1)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ConfigError, match="seed 7 is none of its seeds: 1"):
        load_best_model("Parity", "search", 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"directon": "minimize"}, "did you mean 'direction'"),
        ({"direction": "minimise"}, "expected minimize or maximize"),
        ({"trials": 0}, "at least 1"),
        ({"sampler.name": "optuna.samplers.TPESampl"}, "is none of: TPESampler"),
        ({"search_space.optimizer_config.lr.type": "flot"}, "did you mean 'float'"),
        ({"search_space.optimizer_config.lr.min": 1}, "search_space.*low|above|1"),
        ({"search_space.net_config.nodes.choices": "[]"}, "search_space"),
    ],
)
def test_32_a_wrong_search_is_refused_when_it_is_read(
    config: RunConfig, change: dict[str, Any], said: str
) -> None:
    words = [f"{'+' if key == 'directon' else ''}{key}={value}" for key, value in change.items()]
    with pytest.raises(RecipeError, match=said):
        OptimizeConfig.from_yaml("opt.yaml", words)


def test_32_what_the_configuration_does_not_take_is_refused_before_training(
    config: RunConfig,
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'optimizer_config'"):
        run(config, optimize_config=OptimizeConfig("s", {"optimiser_config": {}}))
    wrong = {"optimizer_config": {"rate": {"type": "float", "min": 0.1, "max": 1.0}}}
    with pytest.raises(RecipeError, match="rate"):
        run(config, optimize_config=OptimizeConfig("s", wrong))
    assert not Path("runs").exists()
