"""Runs on a sampler's trees: resumed bitwise, the same on ranks, every episode recorded."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from control_runs import once
from tiny_game import Game, GameSampler

from endings import ending
from paceline import CheckpointPolicy
from paceline.data.source import StopCollecting
from paceline.errors import ConfigError, DataError
from paceline.rl import Algorithm, Evaluation, Graph, RLTrainer, read_rollouts
from paceline.rl.graph import final_reward
from paceline.rl.source import Rollouts, RolloutSource, packed, unpacked
from paceline.testing import Ranks, rows
from paceline.world.seeding import stream

EPOCHS = 3


@dataclass
class Step:
    context: str
    probe: str
    advantage: float


@dataclass
class Batch:
    contexts: list[str]
    probes: list[str]
    advantages: torch.Tensor


class Reinforce(Algorithm):
    """Each turn against the mean of its siblings; turns without an advantage are no steps."""

    def flatten(self, graph: Graph) -> list[Step]:
        steps = []
        for siblings in graph.siblings():
            mean = sum(node.reward for node in siblings) / len(siblings)
            steps += [Step(n.context, n.probe, n.reward - mean) for n in siblings]
        return [step for step in steps if step.advantage]

    @staticmethod
    def collate_fn(steps: Any) -> Batch:
        advantages = torch.tensor([step.advantage for step in steps])
        return Batch([s.context for s in steps], [s.probe for s in steps], advantages)

    def count_items(self, batch: Batch) -> int:
        return len(batch.probes)

    def step(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        logps = self.system.get_auditor_logprobs(batch.contexts, batch.probes).sum(1)
        return -(batch.advantages * logps).mean(), {"train/logp": logps.mean()}


class Struck(GameSampler):
    """Kills its rank in the middle of an experience, once."""

    kills: Path | None = None

    def rollouts(self, seeds: Any) -> list[Graph]:
        graphs = super().rollouts(seeds)
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if self.kills is not None and self.version >= 8 and last and once(self.kills):
            os.kill(os.getpid(), signal.SIGKILL)
        return graphs


def trainer_of(folder: Path | None, *, kills: bool = False, **changes: Any) -> RLTrainer:
    system = Game()
    sampler = Struck(system, width=3, depth=2, episodes=5)
    sampler.kills = folder if kills else None
    settings: dict[str, Any] = {
        "sampler": sampler,
        "algorithm": Reinforce(system, passes=2, minibatch=16),
        "optimizer": torch.optim.Adam(system.parameters(), lr=0.05),
        "checkpoint": CheckpointPolicy(every_epochs=None, every_steps=3, save_best=False),
        "epochs": EPOCHS,
        "progress": False,
        "log_every": 1,
        "run_dir": None if folder is None else folder / "run",
    }
    return RLTrainer(**{**settings, **changes})


def train(folder: Path, kills: bool) -> None:
    trainer_of(folder, kills=kills).train(seed=3)


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {size: tmp_path_factory.mktemp(f"whole{size}") for size in (1, 2)}
    for size, folder in folders.items():
        ranks(train, size, folder, False)
    return folders


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_in_an_experience_goes_on_bitwise(
    ranks: Ranks, unbroken: dict[int, Path], tmp_path: Path, size: int
) -> None:
    """The checkpoint before it is from within an experience, and holds steps of a user's class."""
    killed = ranks.outcomes(train, size, tmp_path, True)
    assert killed[-1].code == -signal.SIGKILL
    ranks(train, size, tmp_path, False)
    assert ending(tmp_path / "run") == ending(unbroken[size] / "run")
    recorded = [folder / "run" / "rollouts.jsonl" for folder in (tmp_path, unbroken[size])]
    assert recorded[0].read_bytes() == recorded[1].read_bytes()


def test_two_ranks_play_the_episodes_of_one(unbroken: dict[int, Path]) -> None:
    one, two = (rows(unbroken[size] / "run") for size in (1, 2))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-5, abs=1e-6)
    texts = [(unbroken[size] / "run" / "rollouts.jsonl").read_text() for size in (1, 2)]
    assert texts[0] == texts[1]


def test_every_episode_is_recorded(unbroken: dict[int, Path]) -> None:
    episodes = list(read_rollouts(unbroken[1] / "run"))
    assert [(e["experience"], e["episode"]) for e in episodes] == [
        (experience, episode) for experience in range(EPOCHS) for episode in range(5)
    ]
    assert len({e["seed"] for e in episodes}) == len(episodes)
    assert [len(e["turns"]) for e in episodes] == [3 + 9] * len(episodes)
    for episode in episodes:
        for turn in episode["turns"]:
            assert turn["reward"] == turn["probe"].count("1") / 4
    versions = [episode["turns"][0]["version"] for episode in episodes]
    assert versions[0] == 0 < versions[5] < versions[10]
    parents = [turn["parent"] for turn in episodes[0]["turns"]]
    assert parents == [None, 0, 0, 0, None, 4, 4, 4, None, 8, 8, 8]
    rewards = [t["reward"] for e in episodes[:5] for t in e["turns"]]
    first = next(row for row in rows(unbroken[1] / "run") if "rollout/reward" in row)
    assert first["rollout/reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert (first["rollout/episodes"], first["rollout/turns"]) == (5, 60)


def test_the_policy_learns_and_its_rewards_rise(tmp_path: Path) -> None:
    trainer_of(tmp_path, epochs=20, checkpoint=None).train(seed=0)
    found = rows(tmp_path / "run")
    seen = [row["rollout/reward"] for row in found if "rollout/reward" in row]
    assert seen[0] < 0.6
    assert seen[-1] > 0.8


class Nothing(Reinforce):
    def flatten(self, graph: Graph) -> list[Step]:
        return []


def test_experiences_that_come_to_nothing_are_counted_and_end_the_run_in_the_end(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path, epochs=2)
    trainer.algorithm = Nothing(trainer.sampler.system)
    trainer.train()
    assert (trainer.current_epoch, trainer.global_step) == (2, 0)
    assert [row["rollout/empty"] for row in rows(tmp_path / "run")] == [1, 2]
    trainer = trainer_of(None, epochs=9, max_empty=3)
    trainer.algorithm = Nothing(trainer.sampler.system)
    with pytest.raises(DataError, match="4 experiences in a row came to no step to train on"):
        trainer.train()


def test_steps_that_no_checkpoint_can_hold_are_refused() -> None:
    @dataclass
    class Local:
        value: float

    steps = [Step("", "01", 0.5), {"a": (torch.ones(2), None)}]
    assert unpacked(packed(steps, Reinforce), Reinforce)[0] == steps[0]
    with pytest.raises(ConfigError, match="Reinforce returned steps with an object"):
        packed([*steps, object()], Reinforce)
    with pytest.raises(ConfigError, match=r"would not find the class .*Local of the steps"):
        packed([Local(1.0)], Reinforce)
    with pytest.raises(DataError, match="steps of the class Gone"):
        unpacked([{"class": "Gone", "fields": {}}], Reinforce)


def test_a_stop_between_turns_gives_the_rollout_up() -> None:
    sampler = GameSampler(Game())
    sampler.begin(0, lambda: True)
    with pytest.raises(StopCollecting):
        sampler.rollouts([1, 2])


def test_a_rollout_leaves_the_global_generators_as_they_were() -> None:
    trainer = trainer_of(None, epochs=1, max_empty=0)
    seen: list[torch.Tensor] = []

    class Noisy(Struck):
        def rollout(self, seed: int | None = None) -> Graph:
            torch.rand(7)
            return super().rollout(seed)

    for sampler in (Struck, Noisy):
        trainer = trainer_of(None, epochs=1)
        system = trainer.sampler.system
        trainer.sampler = sampler(system, width=3, depth=2, episodes=5)
        trainer.on_train_batch_start = lambda batch, batch_idx: seen.append(torch.get_rng_state())
        trainer.train(seed=1)
    half = len(seen) // 2
    assert all(map(torch.equal, seen[:half], seen[half:]))


def test_a_run_without_rollouts_says_so() -> None:
    with pytest.raises(DataError, match="has recorded no rollouts"):
        read_rollouts("nowhere")


def played_again(trainer: Any) -> list[float]:
    """The rewards of the last turns of an evaluation's episodes, first branches alone."""
    found = []
    for episode in range(12):
        graph = trainer.sampler.eval_rollout(stream(2, "eval", episode) >> 1)
        found.append(final_reward(graph))
    return found


def test_evaluations_say_by_how_much_the_policy_has_gained(tmp_path: Path) -> None:
    """On the same episodes as before training, pair by pair; a resumed run keeps those."""

    def start(folder: str, epochs: int) -> Any:
        evaluation = Evaluation(episodes=12, every=10, threshold=0.9, against_untrained=True)
        trainer = trainer_of(tmp_path / folder, epochs=epochs, evaluation=evaluation)
        trainer.train(seed=2)
        return trainer

    whole = start("whole", 20)
    before = whole.untrained.values
    metrics = whole.result.metrics
    values = played_again(whole)
    assert 0.3 < sum(before) / 12 < 0.7
    assert metrics["val/reward"] == pytest.approx(sum(values) / 12)
    assert metrics["val/gain"] == pytest.approx((sum(values) - sum(before)) / 12)
    assert 0 < metrics["val/gain_low"] < metrics["val/gain"] < metrics["val/gain_high"]
    assert metrics["val/success"] == sum(value >= 0.9 for value in values) / 12
    start("parts", 7)
    parts = start("parts", 20)
    assert parts.untrained.values == before
    assert parts.result.metrics == metrics


@pytest.mark.parametrize("numbers", [(9, 4, 1, 2), (9, 4, 3, 2), (10, 3, 2, 4), (3, 3, 2, 4)])
def test_a_rank_counts_the_micro_batches_that_it_has_had(numbers: tuple[int, ...]) -> None:
    """Of nine steps in minibatches of four, the second of two ranks has none of the last."""
    count, size, accumulation, ranks = numbers
    for rank in range(ranks):
        world: Any = SimpleNamespace(size=ranks, dp_size=ranks, dp_rank=rank)
        collector: Any = SimpleNamespace(steps=count, identity={})
        algorithm = Reinforce(None, passes=2, minibatch=size)
        source = RolloutSource(Rollouts(collector, algorithm), accumulation, 0, world)
        source._steps, source._count = [Step("", "1", 0.1)] * count, count
        had = 0
        while (draw := source.draw()) is not None:
            had += len(draw.sizes)
            assert source.batches_done() == had
        assert source.at_end(keep=True)
