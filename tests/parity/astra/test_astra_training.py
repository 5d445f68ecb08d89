"""ASTRA-RL's configuration, harness and trainers, row by row."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astra_systems import Reinforced, Said, WordSystem, tiny

from paceline import Callback
from paceline.errors import ConfigError, DataError, MissingExtraError
from paceline.rl import (
    ASTSampler,
    Graph,
    Harness,
    HFRolloutConfiguration,
    HFRolloutTrainer,
    Node,
    RLTrainer,
    RolloutTrainer,
    Sampler,
    TrainingConfiguration,
)

PROMPTS = ["one two", "red green", "blue three"]


def sampler_of(system: Any = None, width: int = 2, depth: int = 1, **settings: Any) -> ASTSampler:
    return ASTSampler(WordSystem() if system is None else system, PROMPTS, width, depth, **settings)


class Fixed(Sampler):
    """The same six turns in each episode, without chance."""

    def rollout(self, seed: int | None = None) -> Graph:
        words = ("red", "green", "blue", "one", "two", "bad")
        return Graph("", [Node("", f" {w}", "", 0.1 * i + 0.2) for i, w in enumerate(words)])


def test_A1_the_defaults_are_astras() -> None:
    assert vars(TrainingConfiguration()) == {
        "lr": 3e-3, "batch_size": 16, "optimizer": "adamw", "gradient_accumulation_steps": 1,
        "training_steps": 1024, "num_episodes_per_experience": 8,
    }  # fmt: skip


def test_A2_the_preset_for_language_models_has_astras_values() -> None:
    assert vars(HFRolloutConfiguration()) == {
        "lr": 1e-5, "batch_size": 4, "optimizer": "adamw", "gradient_accumulation_steps": 1,
        "training_steps": 1000, "num_episodes_per_experience": 2,
    }  # fmt: skip
    assert HFRolloutConfiguration(lr=0.1).lr == 0.1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"learning_rate": 1.0}, "learning_rate: here it is lr"),
        ({"batchsize": 1}, "batchsize: no such setting.*batch_size"),
        ({"lr": -1}, "lr=-1: .*at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0: .*at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"training_steps": 2.5}, "training_steps=2.5: .*whole"),
        ({"optimizer": "lion"}, "optimizer='lion': .*adam, adamw, sgd, rmsprop, adagrad"),
    ],
)
def test_A3_a_typo_or_an_impossible_value_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("'", "['\"]")):
        TrainingConfiguration(**setting)


class MyConfig(TrainingConfiguration):
    def __init__(self) -> None:
        super().__init__(lr=1e-2, batch_size=4, training_steps=2, num_episodes_per_experience=2)
        self.eval_every = 100
        self.ckpt_dir = "checkpoints"


def test_A4_a_configuration_of_ones_own_has_fields_of_its_own() -> None:
    config = MyConfig()
    assert (config.eval_every, config.ckpt_dir, config.lr) == (100, "checkpoints", 1e-2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_A5_the_optimizer_has_exactly_the_systems_parameters(name: str, kind: type) -> None:
    sampler = sampler_of()
    config = TrainingConfiguration(optimizer=name, lr=0.125)
    trainer = RolloutTrainer(config, sampler, Reinforced(sampler.system))
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is kind
    assert [id(p) for g in groups for p in g["params"]] == list(
        map(id, sampler.system.parameters())
    )
    assert groups[0]["lr"] == 0.125


def plain(windows: list[list[list[Said]]]) -> torch.Tensor:
    """The bias after a step of SGD for each window, the mean over its items, by plain torch."""
    system = WordSystem()
    optimizer = torch.optim.SGD(system.parameters(), lr=0.5)
    for window in windows:
        steps = [step for batch in window for step in batch]
        logps = system.get_auditor_logprobs(None, [s.probe for s in steps]).sum(1)
        (-(torch.tensor([s.reward for s in steps]) * logps).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return system.auditor.bias.detach()


def test_A7_what_is_left_of_an_accumulation_is_stepped_at_an_experiences_end() -> None:
    sampler = Fixed(WordSystem())
    algorithm = Reinforced(sampler.system)
    seen: list[list[Said]] = []
    algorithm.collate_fn = lambda steps: seen.append(list(steps)) or list(steps)  # type: ignore[method-assign]
    config = TrainingConfiguration(
        lr=0.5, optimizer="sgd", batch_size=1, gradient_accumulation_steps=4, training_steps=1,
        num_episodes_per_experience=1,
    )  # fmt: skip
    result = RolloutTrainer(config, sampler, algorithm).train()
    assert result.global_step == 2
    assert [len(batch) for batch in seen] == [1] * 6
    expected = plain([seen[:4], seen[4:]])
    torch.testing.assert_close(sampler.system.auditor.bias.detach(), expected, atol=1e-6, rtol=0)


class Watching(Callback):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.rows.append(dict(metrics))


def test_A8_A9_A10_training_steps_are_experiences_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampler, watching = sampler_of(), Watching()
    played: list[int] = []
    real = sampler.rollouts
    sampler.rollouts = lambda seeds: played.append(len(seeds)) or real(seeds)  # type: ignore[method-assign]
    before = sampler.system.auditor.bias.detach().clone()
    config = TrainingConfiguration(training_steps=5, batch_size=4, num_episodes_per_experience=3)
    trainer = RolloutTrainer(
        config=config,
        sampler=sampler,
        algorithm=Reinforced(sampler.system),
        callbacks=[watching],
        log_every=1,
    )
    result = trainer.train()
    assert isinstance(trainer, RLTrainer)
    assert played == [3] * 5
    assert result.global_step == 10 == len(watching.rows)  # 6 turns: batches of 4 and 2
    assert not torch.equal(before, sampler.system.auditor.bias)
    assert {"train/loss", "reward/mean"} <= set(watching.rows[-1])
    assert list(tmp_path.iterdir()) == []


def test_A11_A12_an_experience_is_batches_of_the_algorithms_own() -> None:
    sampler = sampler_of(width=3)
    harness = Harness(
        sampler, Reinforced(sampler.system), 4, dataloader_kwargs={"batch_size": 5, "shuffle": True}
    )
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    batches = harness.experience()
    assert len(batches) == 3  # type: ignore[arg-type]
    found = list(batches)
    assert [len(batch) for batch in found] == [5, 5, 2]
    assert all(isinstance(step, Said) for batch in found for step in batch)
    loss, logs = harness.step(found[0])
    assert loss.requires_grad
    assert loss.ndim == 0
    assert {type(value) for value in logs.values()} == {float}
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    harness.log_current_step(logs)


def test_A13_a_seed_gives_one_experience_whose_episodes_differ() -> None:
    sampler = sampler_of()
    harness = Harness(sampler, Reinforced(sampler.system), 6, dataloader_kwargs={"batch_size": 4})
    first, again = list(harness.experience(seed=3)), list(harness.experience(seed=3))
    assert first == again
    assert len({(step.context, step.probe) for batch in first for step in batch}) > 4
    assert list(harness.experience()) != list(harness.experience())
    assert list(harness.experience(seed=0)) == list(harness.experience(seed=0)) != first


def test_shuffled_steps_have_an_order_of_the_seed() -> None:
    sampler = Fixed(WordSystem())
    shuffled = {"batch_size": 6, "shuffle": True}
    harness = Harness(sampler, Reinforced(sampler.system), 1, dataloader_kwargs=shuffled)
    orders = [[step.probe for step in next(harness.experience(seed))] for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_an_experience_without_a_step_is_an_error_that_says_so() -> None:
    sampler = sampler_of(depth=0)
    with pytest.raises(DataError, match="no step to train on"):
        Harness(sampler, Reinforced(sampler.system), 2).experience()


def test_wandb_is_asked_for_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        Harness(sampler, Reinforced(sampler.system), use_wandb=True)
    logged: list[Any] = []

    class Wandb:
        @staticmethod
        def init(**settings: Any) -> Any:
            logged.append(settings)
            return Wandb

        @staticmethod
        def log(row: Any) -> None:
            logged.append(row)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    kwargs = {"name": "probe", "mode": "offline"}
    harness = Harness(sampler, Reinforced(sampler.system), use_wandb=True, wandb_kwargs=kwargs)
    harness.log_current_step({"loss": 1.0})
    assert logged == [{"project": "paceline_rl", **kwargs}, {"loss": 1.0}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that evaluates every second of six experiences, and what it had at each evaluation."""
    folder = tmp_path_factory.mktemp("ckpt")
    sampler = ASTSampler(tiny(), PROMPTS, 2, 1)
    config = HFRolloutConfiguration(training_steps=6, lr=1e-2, batch_size=2)
    evaluated: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    class Trainer(HFRolloutTrainer):
        def evaluate(self) -> Any:
            metrics = super().evaluate()
            weights = {k: v.clone() for k, v in self.system.auditor.state_dict().items()}
            evaluated.append((self.global_step, metrics["val/reward"], weights))
            return metrics

    trainer = Trainer(
        config,
        environment=sampler,
        algorithm=Reinforced(sampler.system),
        dev_prompts=(text for text in ("good day", "red tea")),
        eval_every=2,
        ckpt_dir=folder / "kept",
    )
    frozen = {
        name: {k: v.clone() for k, v in getattr(sampler.system, name).state_dict().items()}
        for name in ("target", "baseline")
    }
    trainer.train()
    return trainer, evaluated, folder / "kept", frozen


def test_A34_an_evaluation_is_due_every_so_many_experiences(trained: Any) -> None:
    trainer, evaluated, _, _ = trained
    assert [step for step, _, _ in evaluated] == [4, 8, 12]  # an experience has two batches
    assert trainer.best_score == max(score for _, score, _ in evaluated)
    graphs = [trainer.sampler.eval_rollout(prompt) for prompt in trainer.dev_prompts]
    rewards = [graph.children[0].reward for graph in graphs]
    assert evaluated[-1][1] == pytest.approx(np.mean(rewards))


def test_A36_A38_best_and_last_load_without_a_network(trained: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer, evaluated, folder, _ = trained
    best = max(evaluated, key=lambda one: one[1])[2]
    for name, weights in (("best", best), ("last", trainer.system.auditor.state_dict())):
        loaded = AutoModelForCausalLM.from_pretrained(folder / name).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in weights.items()), name
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert (
            tokenizer("good day")["input_ids"] == trainer.system.tokenizer("good day")["input_ids"]
        )
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last"]


def test_A30_target_and_baseline_stay_as_they_are(trained: Any) -> None:
    trainer, _, _, frozen = trained
    for name, before in frozen.items():
        model = getattr(trainer.system, name)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_A38_A39_A40_without_prompts_nothing_is_evaluated_and_the_last_is_kept(
    tmp_path: Path,
) -> None:
    sampler = ASTSampler(tiny(), PROMPTS, 2, 1)
    algorithm = Reinforced(sampler.system)
    config = HFRolloutConfiguration(training_steps=1)
    with pytest.raises(ConfigError, match="sampler, environment"):
        HFRolloutTrainer(config, sampler, algorithm, environment=sampler)
    trainer = HFRolloutTrainer(
        config=config, sampler=sampler, algorithm=algorithm, eval_every=100, ckpt_dir=tmp_path / "c"
    )
    trainer.train()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["last"]
    assert trainer.best_score == -float("inf")
    words = sampler_of()
    with pytest.raises(ConfigError, match="no model of transformers"):
        HFRolloutTrainer(config, words, Reinforced(words.system), ckpt_dir=tmp_path)


def test_A45_without_extras_a_system_of_ones_own_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "wandb", "detoxify", "profanity_check", "gymnasium"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [n for n in sys.modules if n.startswith("paceline.rl.redteam.scorers")]:
        importlib.reload(sys.modules[name])
    sampler = sampler_of()
    config = TrainingConfiguration(training_steps=1, num_episodes_per_experience=1)
    assert RolloutTrainer(config, sampler, Reinforced(sampler.system)).train().global_step == 1
    scorers = importlib.import_module("paceline.rl.redteam.scorers")
    with pytest.raises(MissingExtraError, match=r"paceline\[detoxify\]"):
        scorers.DetoxifyScorer()
    with pytest.raises(MissingExtraError, match=r"paceline\[redteam\]"):
        scorers.ProfanityScorer()


def test_A47_a_loop_of_ones_own_finds_harness_optimizer_and_config() -> None:
    class Mine(RolloutTrainer):
        def train(self) -> int:  # type: ignore[override]
            schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
            steps = 0
            for _ in range(self.config.training_steps):
                for batch in self.harness.experience():
                    loss, _ = self.harness.step(batch)
                    loss.backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    steps += 1
                schedule.step()
            return steps

    sampler = sampler_of()
    before = sampler.system.auditor.bias.detach().clone()
    trainer = Mine(MyConfig(), sampler, Reinforced(sampler.system))
    assert trainer.train() == 2
    assert trainer.config.ckpt_dir == "checkpoints"
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0025
    assert not torch.equal(before, sampler.system.auditor.bias)
