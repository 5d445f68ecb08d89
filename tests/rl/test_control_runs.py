"""PPO in environments resumes bitwise, from within a rollout too, on any number of ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from control_runs import EPOCHS, Strike, train, trainer_of

from endings import ending, saved_steps
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, RecipeError, ResumeError
from paceline.recipe import build_trainer, load_model, load_recipe
from paceline.recipe.trained import load_trainer
from paceline.rl import PPO
from paceline.testing import Ranks, bits, rows

SIZES = [1, 2]


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of runs that nobody breaks off, by the number of ranks."""
    folders = {size: tmp_path_factory.mktemp(f"unbroken{size}") for size in SIZES}
    for size, folder in folders.items():
        ranks(train, size, folder, None)
    return folders


def weights(folder: Path) -> torch.Tensor:
    step = saved_steps(folder / "run")[-1]
    tree = load_tree(folder / "run" / "checkpoints" / f"step_{step:08d}")
    return torch.cat([t.flatten() for t in tree["models"]["model"].values()])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [7, None], ids=["in a rollout", "between minibatches"])
def test_a_killed_run_goes_on_bitwise(
    ranks: Ranks, unbroken: dict[int, Path], tmp_path: Path, size: int, step: int | None
) -> None:
    killed = ranks.outcomes(train, size, tmp_path, Strike(signal.SIGKILL, step=step, rank=size - 1))
    assert killed[-1].code == -signal.SIGKILL
    ranks(train, size, tmp_path, None)
    assert ending(tmp_path / "run") == ending(unbroken[size] / "run")


@pytest.mark.parametrize("size", SIZES)
def test_a_signal_abandons_the_rollout_on_all_ranks(
    ranks: Ranks, unbroken: dict[int, Path], tmp_path: Path, size: int
) -> None:
    strike = Strike(signal.SIGTERM, rank=size - 1, lasting=0.5)
    stopped = ranks.outcomes(train, size, tmp_path, strike)
    assert [one.code for one in stopped] == [75] * size, stopped
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["stopped_by"], record["step"]) == ("signal SIGTERM", 6), "before the second"
    ranks(train, size, tmp_path, None)
    assert ending(tmp_path / "run") == ending(unbroken[size] / "run")


@pytest.mark.parametrize(
    ("kind", "step"), [("pendulum", 7), ("vector", None), ("walks", 11)], ids=lambda one: str(one)
)
def test_a_killed_run_goes_on_bitwise_in_other_environments(
    ranks: Ranks, tmp_path: Path, kind: str, step: int | None
) -> None:
    """Continuous actions; a vector that resets by itself; observations in parts."""
    ranks(train, 1, tmp_path, None, kind)
    whole = ending(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    killed = ranks.outcomes(train, 1, tmp_path, Strike(signal.SIGKILL, step=step), kind)
    assert killed[0].code == -signal.SIGKILL
    ranks(train, 1, tmp_path, None, kind)
    assert ending(tmp_path / "run") == whole


def test_a_checkpoint_is_evaluated_with_the_scaling_of_its_observations(
    unbroken: dict[int, Path],
) -> None:
    """In another process than the run's, as the run has measured; the policy keeps the scaling."""
    last = [row for row in rows(unbroken[1] / "run") if "val/return" in row][-1]
    again = trainer_of(unbroken[1])
    again.seed = 11
    assert again.evaluate(checkpoint=unbroken[1] / "run") == {
        k: last[k] for k in last if k[:4] == "val/"
    }
    assert float(again.model.observation_scaling.count) == EPOCHS * 4 * 16


def test_ranks_share_out_one_run(unbroken: dict[int, Path]) -> None:
    """The same episodes and minibatches; sums over ranks are added up in another order."""
    one, two = rows(unbroken[1] / "run"), rows(unbroken[2] / "run")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        assert {k: other[k] for k in row} == pytest.approx(row, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(weights(unbroken[2]), weights(unbroken[1]), rtol=0, atol=1e-6)


def test_a_run_resumes_on_another_number_of_ranks(
    ranks: Ranks, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    """Killed between two minibatches of an experience on two ranks, continued on one."""
    ranks.outcomes(train, 2, tmp_path, Strike(signal.SIGKILL, step=None, rank=1))
    ranks(train, 1, tmp_path, None)
    torch.testing.assert_close(weights(tmp_path), weights(unbroken[1]), rtol=0, atol=1e-6)


def test_other_hyperparameters_are_refused_at_a_resume(tmp_path: Path) -> None:
    def start(epochs: int, **changes: Any) -> None:
        algorithm = PPO(None, **{"passes": 2, "minibatch": 24, "entropy_coef": 0.01, **changes})
        trainer_of(tmp_path, algorithm=algorithm, epochs=epochs).train(seed=11)

    start(1)
    for changes in ({"gamma": 0.5}, {"clip_range": 0.3}, {"passes": 3}, {"minibatch": 32}):
        (name,) = changes
        with pytest.raises(ResumeError, match=rf"algorithm\.{name}"):
            start(2, **changes)
    start(2)


RECIPE = """
trainer: {type: rl, epochs: 2, progress: false}
environment: {type: gym, id: CartPole-v1, num_envs: 2, steps: 8, normalize_observations: true}
algorithm: {type: ppo, passes: 1, minibatch: 8}
optimizer: {type: adamw, lr: 1.0e-3}
evaluation: {episodes: 2, every: 2}
"""


def test_a_recipe_is_checked_trained_loaded_and_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "cartpole.yaml"
    path.write_text(RECIPE)
    run = tmp_path / "run"
    trainer = build_trainer(load_recipe(path, [f"run.dir={run}"]))
    metrics = trainer.train(seed=0).metrics
    model = load_model(run)
    assert bits(model.state_dict()) == bits(trainer.model.state_dict())
    with torch.no_grad():
        assert model.act(torch.zeros(1, 4), deterministic=True)[0].shape == (1,)
    assert float(model.observation_scaling.count) == 2 * 2 * 8
    assert load_trainer(run).trainer.evaluate(checkpoint=run) == metrics
    small = [f"run.dir={tmp_path / 'small'}", "+model={type: actor_critic, hidden: [8]}"]
    build_trainer(load_recipe(path, small)).train(seed=0)
    assert load_model(tmp_path / "small").policy_net[0].out_features == 8
    wrong = {
        "algorithm.pases=2": r"has no such argument.*did you mean 'passes'",
        "environment.id=CartPole-v9": "CartPole-v9",
        "trainer.min_steps=9": "min_steps is about a loader's batches",
        "algorithm.system=1": "is given by Paceline",
        "algorithm.type=pqo": "did you mean 'ppo'",
        "evaluation.evry=1": "did you mean 'every'",
    }
    for override, said in wrong.items():
        with pytest.raises((RecipeError, ConfigError), match=said):
            build_trainer(load_recipe(path, [f"run.dir={tmp_path / 'w'}", f"++{override}"])).train()


@pytest.mark.parametrize("size", SIZES)
def test_target_kl_ends_the_passes_over_an_experience(
    ranks: Ranks, tmp_path: Path, size: int
) -> None:
    """After the first pass on some experiences, never in its middle; also when resumed there."""
    ranks(train_within, size, tmp_path, 3)
    lengths = steps_of_experiences(tmp_path / "run")
    assert all(length % 3 == 0 and 3 <= length < 12 for length in lengths), lengths
    broken = tmp_path / "broken"
    strike = Strike(signal.SIGKILL, step=None, rank=size - 1)  # after 4 steps of the second
    assert ranks.outcomes(train_within, size, broken, 3, strike)[-1].code == -signal.SIGKILL
    ranks(train_within, size, broken, 3)
    assert ending(broken / "run") == ending(tmp_path / "run")


def train_within(folder: Path, epochs: int, strike: Strike | None = None) -> None:
    """A rank of a run with four passes in three minibatches, which are ended early."""
    algorithm = PPO(None, passes=4, minibatch=24, target_kl=1e-5)
    trainer_of(folder, strike, algorithm=algorithm, epochs=epochs, evaluation=None).train(seed=11)


def steps_of_experiences(run_dir: Path) -> list[int]:
    at = [row["epoch"] for row in rows(run_dir) if "train/approx_kl" in row]
    return [at.count(epoch) for epoch in sorted(set(at))]
