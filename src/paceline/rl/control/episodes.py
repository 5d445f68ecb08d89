"""Whole fresh episodes of a policy, for evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from paceline.rl.baselines import RandomActions
from paceline.rl.control.actor_critic import Policy
from paceline.rl.control.collector import scaled, to_environment
from paceline.rl.control.environment import Environment, Episodes, check_finite
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World


def fresh_episodes(
    environment: Environment,
    policy: Policy,
    count: int,
    *,
    seed: int,
    world: World,
    device: torch.device,
    deterministic: bool,
    stopping: Callable[[], bool],
) -> list[tuple[float, int]] | None:
    """Returns and lengths of episodes, the same on every rank, whatever their number.

    Args:
        environment: where.
        policy: what acts.
        count: episodes over all ranks.
        seed: the run's.
        world: the ranks.
        device: where the policy is.
        deterministic: whether the most likely action is taken.
        stopping: whether to abandon them.

    Returns:
        A pair an episode; None if they were abandoned.
    """
    own = np.array_split(np.arange(count), world.dp_size)[world.dp_rank]
    found: list[tuple[float, int]] = []
    abandoned = False
    if len(own):
        if isinstance(policy, RandomActions):
            policy.begin_episodes(own.tolist())
        episodes = Episodes(environment, int(own[0]), len(own), seed, "eval")
        try:
            lived = _live(episodes, policy, seed, device, deterministic, stopping)
        finally:
            episodes.close()
        found, abandoned = lived or [], lived is None
    parts = world.all_gather_object((abandoned, found))[:: max(1, world.size // world.dp_size)]
    if any(left for left, _ in parts):
        return None
    return [one for _, part in parts for one in part]


def _live(
    episodes: Episodes,
    policy: Policy,
    seed: int,
    device: torch.device,
    deterministic: bool,
    stopping: Callable[[], bool],
) -> list[tuple[float, int]] | None:
    """This rank's episodes, one in each environment; None if they were abandoned."""
    episodes.start()
    done = np.zeros(episodes.count, dtype=bool)
    returns, lengths = np.zeros(episodes.count), np.zeros(episodes.count, dtype=np.int64)
    t = 0
    while not done.all():
        if stopping():
            return None
        obs: Any = scaled(policy, episodes.observations, device)
        if not deterministic:
            seed_everything(stream(seed, "eval", episodes.first, 1 << 32, t))
        action = policy.act(obs, deterministic=deterministic)[0]
        outcome = episodes.step(to_environment(policy, action))
        check_finite(outcome, episodes.first, f"step {t} of an evaluation")
        counted = outcome.valid & ~done
        returns[counted] += outcome.rewards[counted]
        lengths += counted
        done |= outcome.terminated | outcome.truncated
        t += 1
    return list(zip(returns.tolist(), lengths.tolist(), strict=True))
