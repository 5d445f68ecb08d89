"""Environments whose every number is known, and a policy whose values are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from paceline.rl import Environment, Policy


class Ladder(gym.Env):
    """Observes the steps taken, rewards with them, and ends after a number of them."""

    def __init__(self, length: int, *, terminates: bool, spoil: str | None = None) -> None:
        self.observation_space = Box(0, 100, (1,), np.float32)
        self.action_space = Discrete(2)
        self.length, self.terminates, self.spoil = length, terminates, spoil

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return self._seen(), {}

    def _seen(self) -> Any:
        bad = self.spoil == "observation" and self.at == 2
        return np.array([np.nan if bad else self.at], np.float32)

    def step(self, action: Any) -> Any:
        self.at += 1
        over = self.at == self.length
        reward = np.inf if self.spoil == "reward" and self.at == 3 else float(self.at)
        return self._seen(), reward, over and self.terminates, over and not self.terminates, {}


class Ladders(Environment):
    """Ladders in a mode; each with a length of its own, even ones cut off, odd ones ended."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        mode: str = "DISABLED",
        *,
        state: bool = True,
        spoil: tuple[str, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_envs=len(lengths), **settings)
        self.lengths, self.mode, self.state, self.spoil = lengths, mode, state, spoil

    def make(self, count: int) -> Any:
        def made(i: int) -> Callable[[], gym.Env]:
            spoil = self.spoil[0] if self.spoil and self.spoil[1] == i else None
            length = self.lengths[i]
            return lambda: Ladder(length, terminates=length % 2 == 1, spoil=spoil)

        kind = Stateful if self.state else SyncVectorEnv
        return kind([made(i) for i in range(count)], autoreset_mode=AutoresetMode[self.mode])


class Stateful(SyncVectorEnv):
    """Says where it is, and comes back."""

    def get_state(self) -> Any:
        return {"at": [env.unwrapped.at for env in self.envs], "ended": list(self._autoreset_envs)}

    def set_state(self, state: Any) -> None:
        self._autoreset_envs[:] = state["ended"]
        for env, at in zip(self.envs, state["at"], strict=True):
            env.unwrapped.at = at


class Known(Policy):
    """Values an observation at ten times it, plus a parameter of 0; acts with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def act(self, obs: Any, deterministic: bool = False) -> Any:
        ones = torch.ones(len(obs))
        return ones.long() * 0, ones * 0, obs[:, 0] * 10 + self.zero

    def evaluate_actions(self, obs: Any, action: Any) -> Any:
        return self.zero * torch.ones(len(obs)), torch.ones(len(obs)), obs[:, 0] * 10 + self.zero


class Walk(gym.Env):
    """A walk with random pushes, observed in parts; some of its luck lies in its generator."""

    def __init__(self, forgets: bool = False) -> None:
        self.observation_space = Dict(
            {"at": Box(-50, 50, (2,), np.float32), "lit": MultiBinary(3), "room": Discrete(4)}
        )
        self.action_space = Discrete(3, start=-1)
        self.forgets = forgets

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.where, self.left = self.np_random.normal(size=2), 9
        return self._seen(), {}

    def _seen(self) -> Any:
        lit = (self.np_random.random(3) < 0.5).astype(np.int8)
        return {"at": self.where.astype(np.float32), "lit": lit, "room": self.left % 4}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        push = np.random.default_rng().normal() if self.forgets else self.np_random.normal()
        self.where = self.where + np.array([float(action), push])
        self.left -= 1
        over = bool(abs(self.where[0]) > 3)
        return self._seen(), float(-abs(self.where[0])), over, self.left == 0, {}


class Walks(Environment):
    """Walks, each begun by the run."""

    name = "walks_of_the_tests"

    def __init__(self, *, forgets: bool = False, num_envs: int = 3, steps: int = 12) -> None:
        super().__init__(num_envs=num_envs, steps=steps)
        self.forgets = forgets

    def make(self, count: int) -> Any:
        made = [lambda: Walk(self.forgets) for _ in range(count)]
        return SyncVectorEnv(made, autoreset_mode=AutoresetMode.DISABLED)
