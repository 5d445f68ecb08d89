"""Experiences of a policy among environments: transitions with advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from paceline.data.source import StopCollecting
from paceline.errors import ConfigError, MismatchError
from paceline.losses import gae
from paceline.rl.control.actor_critic import ActorCritic, Policy
from paceline.rl.control.environment import (
    Environment,
    Episodes,
    check_finite,
    packed_observation,
)
from paceline.rl.control.system import columns_of, observation_of
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World

_ROWS = 1024  # transitions that are evaluated at a time, as images take much memory


class ControlCollector:
    """Acts in environments for a number of steps each.

    Args:
        environment: where.
        policy: gives what acts, as it is placed.
        acting: within it the policy acts.
        gamma, lam: of the advantages.
        device: where the policy is.
        identity: settings that decide what is collected.
    """

    def __init__(
        self,
        environment: Environment,
        policy: Callable[[], Policy],
        acting: Callable[[], AbstractContextManager[None]],
        *,
        gamma: float,
        lam: float,
        device: Callable[[], torch.device],
        identity: Mapping[str, Any],
    ) -> None:
        self.environment, self._policy, self._acting = environment, policy, acting
        self._gamma, self._lam, self._device = gamma, lam, device
        self.identity = dict(identity)
        whole = environment.num_envs * environment.steps
        self.steps = None if environment.traits.skips else whole
        self._episodes: Episodes | None = None
        self._stopping: Callable[[], bool] = lambda: False

    def open(self, seed: int, world: World, stopping: Callable[[], bool]) -> None:
        """A run begins; see `paceline.rl.source.Collector`.

        Args:
            seed: the run's.
            world: the ranks, which share out the environments.
            stopping: whether to give up the experience at hand.

        Raises:
            ConfigError: there are fewer environments than ranks.
        """
        total = self.environment.num_envs
        if total < world.dp_size:
            raise ConfigError(
                f"environment.num_envs={total}: each of the {world.dp_size} ranks needs at least "
                "one environment."
            )
        self.close()
        own = np.array_split(np.arange(total), world.dp_size)[world.dp_rank]
        self._seed, self._stopping = seed, stopping
        self._first, self._own, self._ranks = int(own[0]), len(own), world.dp_size
        # Equal on all ranks; changes with each experience. None before the first.
        self._state: dict[str, Any] = {"environments": None}
        self._entered = False  # whether the environments here are in that state

    def _enter(self) -> Episodes:
        """The environments, where the state says that they are."""
        if self._episodes is None:
            environment = self.environment
            self._episodes = Episodes(environment, self._first, self._own, self._seed)
        if not self._entered:
            held = self._state["environments"]
            if held is None:
                self._episodes.start()
            else:
                self._episodes.load(self._mine(held))
            self._entered = True
        return self._episodes

    def _mine(self, held: list[Any]) -> list[Any]:
        """This rank's part of the states of all environments."""
        if len(held) == self.environment.num_envs:
            return held[self._first : self._first + self._own]
        if len(held) != self._ranks:
            raise MismatchError(
                f"the environments' state is that of {len(held)} ranks, and there are "
                f"{self._ranks}: vectors that reset by themselves resume on as many; "
                "vectorization: sync resumes on any number."
            )
        return held[len(held) * self._first // self.environment.num_envs :][:1]

    def collect(self, experience: int) -> dict[str, Any]:
        with self._acting():
            return self._collect(self._enter(), experience)

    def _collect(self, episodes: Episodes, experience: int) -> dict[str, Any]:
        environment, policy, device = self.environment, self._policy(), self._device()
        self._entered = False  # until all ranks have what is collected here
        steps, own = environment.steps, self._own
        later = evaluates_later(policy)
        key = stream(self._seed, "env", 0, experience, 1)
        noise = self._noise(policy, key, steps)
        watch = Seen(environment, self._state, own, self._first, self._gamma)
        seen: list[dict[str, torch.Tensor]] = []
        rewards, terminated, ended, valid = (np.zeros((steps, own)) for _ in range(4))
        after_end = np.zeros((steps, own), dtype=np.float32)  # values of what was cut off
        finished: list[tuple[int, int, float, int]] = []
        for t in range(steps):
            if self._stopping():
                raise StopCollecting
            obs = scaled(policy, episodes.observations, device)
            of_action: dict[str, torch.Tensor] = {}
            if noise is None:
                seed_everything(stream(self._seed, "env", self._first, experience, 2 + t))
                action, of_action["logp"], of_action["value"] = policy.act(obs)
            elif later:
                action = policy.decide(obs, noise[t].to(device))  # pyright: ignore[reportCallIssue]
            else:
                action, of_action["logp"], of_action["value"] = policy.act(
                    obs,
                    noise=noise[t].to(device),  # pyright: ignore[reportCallIssue]
                )
            outcome = episodes.step(to_environment(policy, action))
            check_finite(outcome, self._first, f"step {t} of experience {experience}")
            row = {**columns_of(obs), "action": action, **of_action}
            seen.append({name: part.cpu() for name, part in row.items()})
            watch.add(outcome)
            rewards[t] = watch.rewards(outcome.rewards)
            terminated[t], valid[t] = outcome.terminated, outcome.valid
            ended[t] = outcome.terminated | outcome.truncated
            cut = outcome.truncated & ~outcome.terminated
            if cut.any():
                final = scaled(policy, outcome.final, device)
                after_end[t][cut] = policy.value(final).cpu().numpy()[cut]
            if ended[t].any():
                finished += watch.finished(t, ended[t], outcome.valid)
        last = scaled(policy, episodes.observations, device)
        columns = {name: torch.stack([row[name] for row in seen]) for name in seen[0]}
        if "value" not in columns:
            columns |= evaluated(policy, columns, device)
        values = columns["value"].numpy()
        following = np.concatenate([values[1:], policy.value(last).cpu().numpy()[None]])
        following = np.where(ended > 0, after_end, following)
        by_time = (rewards, values, following, terminated, ended, valid)
        advantages, _ = gae(
            *(torch.from_numpy(part.T.astype(np.float64)) for part in by_time),
            gamma=self._gamma,
            lam=self._lam,
        )
        columns["advantages"] = advantages.T.float().contiguous()
        columns["returns"] = columns["advantages"] + columns["value"]
        return {
            "columns": columns,
            "valid": valid > 0,
            "finished": finished,
            "environments": episodes.state(),
            "seen": watch.sums(),
        }

    def _noise(self, policy: Policy, key: int, steps: int) -> torch.Tensor | None:
        """This rank's part of the random numbers of all environments' actions."""
        draw = getattr(policy, "noise", None)
        if draw is None:
            return None
        generator = torch.Generator().manual_seed(key >> 1)
        whole = draw(generator, steps, self.environment.num_envs)
        return whole[:, self._first : self._first + self._own]

    def together(self, parts: list[Any]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        names = parts[0]["columns"]
        valid = torch.from_numpy(np.concatenate([part["valid"] for part in parts], 1)).flatten()
        whole = {n: torch.cat([part["columns"][n] for part in parts], 1) for n in names}
        columns = {name: column.flatten(0, 1)[valid] for name, column in whole.items()}
        finished = sorted(one for part in parts for one in part["finished"])
        after = Seen.added(self._state, [part["seen"] for part in parts])
        fresh = after.pop("observations", None)
        if fresh is not None and self._scaling() is not None:
            self._scaling().add(*fresh)
        self._state = {
            "environments": [state for part in parts for state in part["environments"]],
            **after,
        }
        self._entered = True
        row = {"rollout/episodes": float(len(finished))}
        if finished:
            row["rollout/return"] = float(np.mean([one[2] for one in finished]))
            row["rollout/length"] = float(np.mean([one[3] for one in finished]))
        return columns, row

    def _scaling(self) -> Any:
        return getattr(self._policy(), "observation_scaling", None)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self._entered = dict(state), False

    def close(self) -> None:
        if self._episodes is not None:
            self._episodes.close()
        self._episodes = None


class Seen:
    """What is seen in an experience; scales rewards by what was seen before it.

    Args:
        environment: with the settings.
        state: of the collector.
        own: environments of this rank.
        first: the number of the first of them.
        gamma: of the discounted returns.
    """

    def __init__(
        self, environment: Environment, state: Any, own: int, first: int, gamma: float = 1.0
    ) -> None:
        self._environment, self._first = environment, first
        returns = state.get("returns") if environment.normalize_rewards else None
        self._std = None if returns is None else _deviation(returns)
        held = state.get("running")
        running = None if held is None else held[first : first + own]
        # Of the episodes at hand: return, length, and the discounted return that scales rewards.
        self._running = np.zeros((own, 3)) if running is None else np.array(running)
        self._gamma = gamma
        self._sums = np.zeros((own, 3))  # count, sum, sum of squares of discounted returns
        self._seen: list[Any] = []

    def rewards(self, values: np.ndarray) -> np.ndarray:
        """Rewards as the algorithm sees them.

        Args:
            values: of [envs].
        """
        if self._std is None:
            return values
        clip = self._environment.clip
        return (values / self._std).clip(-clip, clip)

    def add(self, outcome: Any) -> None:
        """Counts a step.

        Args:
            outcome: of the step.
        """
        if self._environment.normalize_observations:
            self._seen.append(np.asarray(packed_observation(outcome.final), dtype=np.float64))
        running, valid = self._running, outcome.valid
        running[:, 0] += outcome.rewards * valid
        running[:, 1] += valid
        running[:, 2] = np.where(
            valid, running[:, 2] * self._gamma + outcome.rewards, running[:, 2]
        )
        if self._environment.normalize_rewards:
            r = running[:, 2] * valid
            self._sums += np.stack([valid.astype(float), r, r**2], 1)

    def finished(self, t: int, ended: np.ndarray, valid: np.ndarray) -> list[Any]:
        """The episodes that end with a step.

        Args:
            t: the step in this experience.
            ended: whether an environment's episode ends; [envs].
            valid: whether it was a step at all; [envs].

        Returns:
            Of each the step, the environment's number, its return and its length.
        """
        found = [
            (t, self._first + int(i), float(self._running[i, 0]), int(self._running[i, 1]))
            for i in np.flatnonzero((ended > 0) & valid)
        ]
        self._running[(ended > 0) & valid] = 0
        return found

    def sums(self) -> dict[str, Any]:
        """What was seen, environment by environment, so that ranks add up to the same."""
        found: dict[str, Any] = {"running": self._running, "returns": self._sums}
        if self._seen:
            seen = np.stack(self._seen)  # [steps, envs, ...]
            found["observations"] = (len(seen), seen.sum(0), (seen**2).sum(0))
        return found

    @staticmethod
    def added(state: Mapping[str, Any], parts: list[Any]) -> dict[str, Any]:
        """The state after an experience.

        Args:
            state: before it.
            parts: `sums` of each rank.
        """
        after: dict[str, Any] = {"running": np.concatenate([part["running"] for part in parts])}
        returns = np.concatenate([part["returns"] for part in parts]).sum(0)
        before = state.get("returns")
        after["returns"] = returns if before is None else before + returns
        if "observations" in parts[0]:
            sums = np.concatenate([part["observations"][1] for part in parts])
            squares = np.concatenate([part["observations"][2] for part in parts])
            fresh = (np.array(float(len(sums) * parts[0]["observations"][0])), sums.sum(0),
                     squares.sum(0))  # fmt: skip
            after["observations"] = fresh
        return after


def _deviation(sums: np.ndarray) -> float | None:
    count, total, squares = sums
    if count < 2:
        return None
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0) + 1e-8))


def scaled(policy: Any, observations: Any, device: torch.device) -> Any:
    """Observations as a policy sees them.

    Args:
        policy: which may have an `observation_scaling`.
        observations: arrays of [envs, ...], of any nesting.
        device: where the policy is.
    """
    found = tensors(observations, device)
    scaling = getattr(policy, "observation_scaling", None)
    return found if scaling is None else scaling(found)


def evaluates_later(policy: Any) -> bool:
    """Whether a policy acts as `ActorCritic` does, which need not say at once what acting is worth.

    Args:
        policy: of any class; what a subclass has made of `act` is heeded.
    """
    methods = ("act", "decide", "noise", "evaluate_actions")
    return all(getattr(type(policy), n, None) is getattr(ActorCritic, n) for n in methods)


def evaluated(
    policy: Policy, columns: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Log-probabilities and values of transitions, of [steps, envs], some steps at a time.

    Args:
        policy: acted in them.
        columns: their observations and actions, of [steps, envs, ...].
        device: where the policy is.
    """
    steps, envs = columns["action"].shape[:2]
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for some in torch.arange(steps).split(max(1, _ROWS // envs)):
        rows = {
            name: column[some[0] : some[-1] + 1].flatten(0, 1).to(device)
            for name, column in columns.items()
        }
        logp, _, value = policy.evaluate_actions(observation_of(rows), rows["action"])
        parts.append((logp.cpu(), value.cpu()))
    names = "logp", "value"
    found = (torch.cat(part).unflatten(0, (steps, envs)) for part in zip(*parts, strict=True))
    return dict(zip(names, found, strict=True))


def tensors(values: Any, device: torch.device) -> Any:
    """Arrays of any nesting as tensors, copied.

    Args:
        values: observations.
        device: where they go.
    """
    if isinstance(values, Mapping):
        return {name: tensors(value, device) for name, value in values.items()}
    return torch.as_tensor(np.array(values), device=device)


def to_environment(policy: Any, action: torch.Tensor) -> Any:
    """A policy's actions as the environment takes them.

    Args:
        policy: whose actions.
        action: of [envs, ...].
    """
    convert = getattr(getattr(policy, "actions", None), "to_environment", None)
    return action.cpu().numpy() if convert is None else convert(action)
