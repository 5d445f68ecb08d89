"""What the collector makes of environments, against values by hand on scripted ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scripted import Known, Ladders, Walks

from paceline.data.source import StopCollecting
from paceline.errors import ConfigError, DataError
from paceline.rl import PPO, ActorCritic, Environment, Evaluation, GymEnvironment, RLTrainer
from paceline.rl.control.collector import ControlCollector
from paceline.rl.control.environment import Episodes
from paceline.rl.control.episodes import fresh_episodes
from paceline.rl.control.scaling import ObservationScaling
from paceline.testing import Ranks
from paceline.world.world import World

CPU = torch.device("cpu")
GAMMA, LAM = 0.9, 0.8


def collector(
    environment: Environment, policy: Any, stopping: Callable[[], bool] = lambda: False
) -> ControlCollector:
    made = ControlCollector(
        environment,
        lambda: policy,
        torch.no_grad,
        gamma=GAMMA,
        lam=LAM,
        device=lambda: CPU,
        identity={},
    )
    made.open(5, World(), stopping)
    return made


class Experiences:
    """Collects experiences; gives the columns and the row of the last, and the collector."""

    def __init__(self) -> None:
        self.opened: list[ControlCollector] = []

    def __call__(self, environment: Environment, policy: Any, count: int = 1) -> Any:
        made = collector(environment, policy)
        self.opened.append(made)
        for number in range(count):
            columns, row = made.together([made.collect(number)])
        return columns, row, made


@pytest.fixture
def experience() -> Iterator[Callable[..., Any]]:
    made = Experiences()
    yield made
    for one in made.opened:
        one.close()


def by_hand(length: int, steps: int, terminates: bool) -> list[tuple[float, float]]:
    """Observation and advantage of each step on a ladder, in the plainest way.

    The step from k to k + 1 rewards k + 1, an observation k is worth 10 k.
    """
    observed = [t % length for t in range(steps)]
    found: list[tuple[float, float]] = []
    later = 0.0
    for k in reversed(observed):
        over = k == length - 1
        following = 0.0 if over and terminates else 10.0 * (k + 1)
        later = (k + 1) + GAMMA * following - 10.0 * k + (0.0 if over else GAMMA * LAM * later)
        found.append((float(k), later))
    return found[::-1]


@pytest.mark.parametrize("mode", ["DISABLED", "SAME_STEP"])
def test_advantages_bootstrap_what_was_cut_off_and_not_what_ended(
    mode: str, experience: Callable[..., Any]
) -> None:
    columns, row, _ = experience(Ladders((3, 4), mode, steps=7), Known())
    expected = [by_hand(3, 7, True), by_hand(4, 7, False)]
    rows = [one for pair in zip(*expected, strict=True) for one in pair]
    assert columns["obs"][:, 0].tolist() == [k for k, _ in rows]
    torch.testing.assert_close(columns["advantages"], torch.tensor([a for _, a in rows]))
    torch.testing.assert_close(columns["returns"] - columns["value"], columns["advantages"])
    assert row == {"rollout/episodes": 3.0, "rollout/return": (6 + 6 + 10) / 3,
                   "rollout/length": (3 + 3 + 4) / 3}  # fmt: skip


def test_a_step_that_only_resets_is_no_sample(experience: Callable[..., Any]) -> None:
    """A ladder of 3 steps and a reset; of 9 calls 7 are steps: 0 1 2 - 0 1 2 - 0."""
    environment = Ladders((3, 4), "NEXT_STEP", steps=9)
    columns, row, made = experience(environment, Known())
    assert made.steps is None, "their number is not known ahead"
    first, second = by_hand(3, 7, True), by_hand(4, 8, False)
    expected: list[tuple[float, float]] = []
    for t in range(9):
        expected += [first[t - (t > 3) - (t > 7)]] if t not in (3, 7) else []
        expected += [second[t - (t > 4)]] if t != 4 else []
    assert columns["obs"][:, 0].tolist() == [k for k, _ in expected]
    torch.testing.assert_close(columns["advantages"], torch.tensor([a for _, a in expected]))
    assert row["rollout/length"] == pytest.approx((3 + 3 + 4 + 4) / 4)


@pytest.mark.parametrize("mode", ["DISABLED", "SAME_STEP", "NEXT_STEP"])
def test_an_evaluation_lives_one_whole_episode_in_each(mode: str) -> None:
    collecting = collector(Ladders((3, 4), mode, steps=1), Known())
    lived = fresh_episodes(
        collecting.environment, Known(), 2, seed=0, world=World(), device=CPU,
        deterministic=True, stopping=lambda: False,
    )  # fmt: skip
    assert lived == [(6.0, 3), (10.0, 4)]


def test_the_second_experience_begins_where_the_first_one_ended(
    experience: Callable[..., Any],
) -> None:
    columns, row, _ = experience(Ladders((5,), steps=3), Known(), count=2)
    assert columns["obs"][:, 0].tolist() == [3, 4, 0]
    assert (row["rollout/return"], row["rollout/length"]) == (15.0, 5.0)


def test_normalization_uses_what_was_seen_before(experience: Callable[..., Any]) -> None:
    environment = Ladders((4,), steps=4, normalize_observations=True, normalize_rewards=True)
    policy: Any = Known()
    policy.observation_scaling = ObservationScaling(spaces.Box(-9, 9, (1,)))
    columns, row, _ = experience(environment, policy, count=2)
    seen = np.array([1.0, 2.0, 3.0, 4.0])  # after each step of the first experience
    expected = (np.array([0.0, 1, 2, 3]) - seen.mean()) / seen.std()
    np.testing.assert_allclose(columns["obs"][:, 0].numpy(), expected, rtol=1e-5)
    discounted = list(itertools.accumulate(seen, lambda held, r: held * GAMMA + r))
    delta = 4 / np.std(discounted) + GAMMA * 10 * (4 - 2.5) / seen.std() - 10 * expected[3]
    assert float(columns["advantages"][3]) == pytest.approx(delta, rel=1e-4)
    assert row["rollout/return"] == 10.0, "what is logged is not scaled"
    other = ObservationScaling(spaces.Box(-9, 9, (1,)))
    other.load_state_dict(policy.observation_scaling.state_dict())
    again = [one(torch.from_numpy(seen[:, None])) for one in (other, policy.observation_scaling)]
    assert torch.equal(*again)
    for space in (spaces.Discrete(3), spaces.Dict({"a": spaces.Discrete(2)})):
        with pytest.raises(ConfigError, match="normalize within the environment"):
            ObservationScaling(space)


def states(environment: Environment, steps: int, mirror: Episodes | None = None) -> Any:
    """Episodes after steps with chosen actions."""
    made = mirror or Episodes(environment, 0, environment.num_envs, 7)
    if mirror is None:
        made.start()
    space = made.vector.single_action_space
    for t in range(steps):
        base = [int(getattr(space, "start", 0)) + (t + i) % 2 for i in range(made.count)]
        if type(space).__name__ == "Box":
            base = [[np.sin(t + i)] for i in range(made.count)]
        made.step(np.array(base))
    return made


@pytest.mark.parametrize(
    "environment",
    [
        GymEnvironment("CartPole-v1", num_envs=3),
        GymEnvironment("CartPole-v1", num_envs=3, vectorization="vector_entry_point"),
        GymEnvironment("Pendulum-v1", num_envs=2),
        Walks(),
        Ladders((3, 4), "NEXT_STEP"),
    ],
    ids=["cartpole", "vector_entry_point", "pendulum", "dict", "own_state"],
)
@pytest.mark.parametrize("steps", [0, 25])
def test_episodes_go_on_from_a_saved_state_bitwise(environment: Environment, steps: int) -> None:
    one = states(environment, steps)
    held = one.state()
    other = Episodes(environment, 0, environment.num_envs, 7)
    other.load(held)
    for made in (one, other):
        states(environment, 30, made)
    assert repr(one.state()) == repr(other.state())
    one.load(held)
    states(environment, 30, one)
    assert repr(one.state()) == repr(other.state()), "and once more, in the same environments"
    one.close()
    other.close()


def test_an_environment_that_forgets_is_told_at_the_resume() -> None:
    environment = Walks(forgets=True)
    held = states(environment, 5)
    other = Episodes(environment, 0, 3, 7)
    with pytest.raises(DataError, match=r"environment 0 came to another.*get_state\(\)"):
        other.load(held.state())
    held.close()
    other.close()


def test_each_environment_of_each_seed_begins_elsewhere() -> None:
    """The same numbers, whatever rank they are on."""
    environment = GymEnvironment("CartPole-v1", num_envs=4)
    whole, half, other = (
        Episodes(environment, first, count, seed) for first, count, seed in
        [(0, 4, 1), (2, 2, 1), (0, 4, 2)]
    )  # fmt: skip
    for made in (whole, half, other):
        made.start()
        made.close()
    assert len(np.unique(np.concatenate([whole.observations, other.observations]))) == 32
    np.testing.assert_array_equal(whole.observations[2:], half.observations)


def test_an_async_vector_collects_what_a_sync_one_does(experience: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    made = [GymEnvironment("CartPole-v1", vectorization=kind, num_envs=2, steps=60)
            for kind in ("sync", "async")]  # fmt: skip
    policy = ActorCritic(*made[0].traits[:2], hidden=(4,))
    one, other = (experience(environment, policy)[0] for environment in made)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stop_abandons_the_experience() -> None:
    asked = iter([False, False, True])
    stopped = collector(Ladders((3,), steps=50), Known(), lambda: next(asked))
    with pytest.raises(StopCollecting):
        stopped.collect(0)
    stopped.close()


def trainer(environment: Environment, **changes: Any) -> RLTrainer:
    model = Known()
    settings: dict[str, Any] = {
        "environment": environment,
        "model": model,
        "algorithm": PPO(None, passes=1, minibatch=4),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "epochs": 1,
        "run_dir": None,
        "loggers": [],
        "checkpoint": None,
        "progress": False,
    }
    return RLTrainer(**{**settings, **changes})


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_number_that_is_none_is_named_with_its_place(what: str) -> None:
    spoilt = Ladders((9, 9, 9), steps=4, spoil=(what, 1))
    step = {"reward": 2, "observation": 1}[what]
    with pytest.raises(DataError, match=f"environment 1: .*{what} in step {step} of experience 0"):
        trainer(spoilt).train()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": GymEnvironment("CartPole-v7")}, "environment.id='CartPole-v7'"),
        ({"environment": GymEnvironment("CartPol-v1")}, "Did you mean: `CartPole`"),
        (
            {"environment": GymEnvironment("Pendulum-v1", vectorization="vector_entry_point")},
            "environment.id='Pendulum-v1'",
        ),
        ({"environment": Ladders((3,), "NEXT_STEP", state=False)}, "autoreset_mode=.*DISABLED"),
        ({"algorithm": PPO(None, minibatch=13)}, "minibatch=13: an experience has 12 samples"),
        ({"model": torch.nn.Linear(1, 1)}, r"has no act\(obs, deterministic\)"),
        (
            {"environment": GymEnvironment("FrozenLake-v1", normalize_observations=True)},
            "normalize_observations: it takes a Box",
        ),
    ],
)
def test_mistakes_end_before_training(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer(**{"environment": Ladders((3, 3, 3), steps=4), **changes}).train()


def test_a_policy_of_one_s_own_acts_and_learns() -> None:
    made = trainer(Ladders((3, 4), steps=6), evaluation=Evaluation(episodes=2, threshold=10))
    made.train()
    assert made.model.zero.item() != 0, "its value came closer to the returns"
    assert made.result.metrics["val/return"] == 8.0
    assert made.result.metrics["val/success"] == 0.5
    assert made.result.metrics["val/return_low"] == 6.0
    assert made.result.metrics["val/return_high"] == 10.0


def differing(size: int) -> tuple[str, str]:
    """What ranks say that act elsewhere, or are more than there are environments."""
    rank = World().dp_rank
    said: list[str] = []
    for environment in (
        GymEnvironment(["CartPole-v1", "Pendulum-v1"][rank], num_envs=4),
        Ladders((3,), steps=4),
    ):
        with nullcontext():
            try:
                trainer(environment).train()
            except ConfigError as error:
                said.append(str(error))
    return said[0], said[1]


def test_ranks_that_do_not_fit_are_told_before_training(ranks: Ranks) -> None:
    for said, few in ranks(differing, 2, 2):
        assert "ranks have different spaces" in said
        assert "environment.num_envs=1: each of the 2 ranks needs at least one" in few
