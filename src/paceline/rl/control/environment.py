"""Environments of gymnasium: episodes whose seeds are derived, and whose state can be saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from paceline import registry
from paceline.errors import ConfigError, DataError
from paceline.world.seeding import stream

Vectorization = Literal["sync", "async", "vector_entry_point"]


class Traits(NamedTuple):
    """What a run needs to know of its environments beforehand.

    Attributes:
        observation_space, action_space: of one environment.
        skips: whether some steps are none, since they only reset.
    """

    observation_space: Any
    action_space: Any
    skips: bool


class Environment:
    """Makes environments for a run to act in.

    A subclass with a `name` registers itself, and recipes take it as `environment: {type: NAME}`.
    One of your own overrides `make`.

    Args:
        num_envs: environments on all ranks.
        steps: of each environment in one experience.
        normalize_observations: whether observations are scaled to mean 0 and deviation 1, by those
            seen before the experience at hand.
        normalize_rewards: whether rewards are divided by the deviation of the discounted return.
        clip: bound of what is normalized.

    Raises:
        ConfigError: a number is below 1.
    """

    name: ClassVar[str]

    def __init__(
        self,
        *,
        num_envs: int = 1,
        steps: int = 128,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        clip: float = 10.0,
    ) -> None:
        for setting, value in (("num_envs", num_envs), ("steps", steps)):
            if value < 1:
                raise ConfigError(f"environment.{setting}={value}: expected at least 1.")
        self.num_envs, self.steps = num_envs, steps
        self.normalize_observations, self.normalize_rewards = (
            normalize_observations,
            normalize_rewards,
        )
        self.clip = clip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named("environment", cls)

    @abstractmethod
    def make(self, count: int) -> Any:
        """A vector of environments (`gymnasium.vector.VectorEnv`).

        Args:
            count: environments in it.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a make(count).")

    @cached_property
    def traits(self) -> Traits:
        """What is known of the environments before there are any: one is made, looked at, closed.

        Raises:
            ConfigError: they cannot be trained in.
        """
        vector = self.make(1)
        try:
            _check_vector(vector)
            spaces = vector.single_observation_space, vector.single_action_space
            skips = _autoreset(vector) == "NEXT_STEP"
        finally:
            vector.close()
        if type(spaces[0]).__name__ == "Tuple":
            raise ConfigError(
                "environment: observations of Tuple have no names: make it a Dict (or wrap it)."
            )
        if type(spaces[1]).__name__ in ("Tuple", "Dict"):
            raise ConfigError(
                f"environment: actions of {type(spaces[1]).__name__} do not exist here: flatten "
                "them (gymnasium.spaces.utils.flatten_space)."
            )
        if self.normalize_observations and not _is_numbers(spaces[0]):
            raise ConfigError(
                f"environment.normalize_observations: it takes a Box of numbers, not {spaces[0]}: "
                "normalize within the environment."
            )
        return Traits(*spaces, skips)


class GymEnvironment(Environment):
    """Environments by their id in gymnasium's registry.

    Args:
        id: such as "CartPole-v1".
        vectorization: "sync" in this process, "async" in a process each, or "vector_entry_point",
            the environment's own.
        kwargs: arguments of the environment.
        **settings: as of `Environment`.
    """

    name = "gym"

    def __init__(
        self,
        id: str,
        *,
        vectorization: Vectorization = "sync",
        kwargs: Mapping[str, Any] | None = None,
        num_envs: int = 1,
        steps: int = 128,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        clip: float = 10.0,
    ) -> None:
        super().__init__(
            num_envs=num_envs,
            steps=steps,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
            clip=clip,
        )
        self.id, self.vectorization = id, vectorization
        self.kwargs = dict(kwargs or {})

    def make(self, count: int) -> Any:
        gymnasium = gymnasium_module()
        # So that each episode has a seed of its own: the others reset by themselves, without one.
        own = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        vector_kwargs = {} if self.vectorization == "vector_entry_point" else own
        try:
            return gymnasium.make_vec(
                self.id,
                num_envs=count,
                vectorization_mode=self.vectorization,
                vector_kwargs=vector_kwargs,
                **self.kwargs,
            )
        except gymnasium.error.Error as error:
            raise ConfigError(f"environment.id={self.id!r}: {error}") from error


def gymnasium_module() -> Any:
    """The module gymnasium, with its vectors.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gymnasium
        import gymnasium.vector
    except ImportError as error:
        raise ConfigError('environments need gymnasium: pip install "paceline[rl]"') from error
    return gymnasium


class Outcome(NamedTuple):
    """What a step of a vector of environments led to.

    Attributes:
        observations: to act on next; of an environment whose episode ended, of a new one.
        final: the observations after the step, those of ended episodes too.
        rewards: [envs].
        terminated, truncated: whether the episode ended, and how; [envs].
        valid: whether it was a step at all, and no reset; [envs].
    """

    observations: Any
    final: Any
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


def check_finite(outcome: Outcome, first: int, where: str) -> None:
    """Refuses NaN and infinite numbers of a step.

    Args:
        outcome: of the step.
        first: the number of the first environment.
        where: the step.

    Raises:
        DataError: there is one.
    """
    for what, values in (("reward", outcome.rewards), ("observation", outcome.final)):
        if (i := _not_finite(values)) is not None:
            raise DataError(f"environment {first + i}: a NaN or infinite {what} in {where}.")


def _not_finite(values: Any) -> int | None:
    """The first environment with a number that is not finite; None if there is none.

    Args:
        values: arrays of [envs, ...], of any nesting.
    """
    if isinstance(values, Mapping):
        found = [_not_finite(value) for value in values.values()]
        return next((one for one in found if one is not None), None)
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return None
    return int(np.argwhere(~np.isfinite(values))[0, 0])


def _is_numbers(space: Any) -> bool:
    return type(space).__name__ == "Box" and space.dtype.kind == "f"


class Episodes:
    """A vector of environments in which one episode follows the other.

    The k-th episode of an environment begins with a seed of its own, whatever rank it is on. Where
    the vector resets by itself (`vector_entry_point`), the first one alone has.

    Args:
        environment: makes the vector.
        first: the number, over all ranks, of its first environment.
        count: environments in it.
        seed: the run's.
        label: of the random streams.

    Attributes:
        observations: to act on next; None before `start` or `load`.
    """

    def __init__(
        self, environment: Environment, first: int, count: int, seed: int, label: str = "env"
    ) -> None:
        self.vector = environment.make(count)
        mode = _autoreset(self.vector)
        self._disabled, self._same = mode == "DISABLED", mode == "SAME_STEP"
        self._dtype = self.vector.action_space.dtype
        self._seed, self._label = seed, label
        self.first, self.count = first, count
        self._episode = np.zeros(count, dtype=np.int64)  # begun before the one at hand
        self._actions: list[list[Any]] = [[] for _ in range(count)]  # since its start
        self._ended = np.zeros(count, dtype=bool)  # resets with its next step, which is none
        self.observations: Any = None

    def start(self) -> None:
        """Begins every environment's first episode."""
        self._episode[:] = 0
        self._ended[:] = False
        self._actions = [[] for _ in range(self.count)]
        seeds = [self._seed_of(i) for i in range(self.count)]
        self.observations = self.vector.reset(seed=seeds if self._disabled else seeds[0])[0]

    def step(self, actions: Any) -> Outcome:
        """Takes a step in each environment.

        Args:
            actions: as the vector's action space has them.
        """
        actions = np.asarray(actions, dtype=self._dtype)  # as a replay will have them
        after, rewards, terminated, truncated, info = self.vector.step(actions)
        final, ended = after, terminated | truncated
        valid = ~self._ended
        if self._disabled:
            for i, one in enumerate(actions):
                self._actions[i].append(one)
            if ended.any():
                after = copied(after)  # the vector may write into it
                final, after = after, self._begin(ended)
        elif self._same:
            if ended.any():
                final = merged(after, info["final_obs"], ended)
        else:
            self._ended = ended & valid
        self.observations = after
        return Outcome(after, final, rewards, terminated & valid, truncated & valid, valid)

    def _begin(self, ended: np.ndarray) -> Any:
        """Begins the next episode of some environments."""
        self._episode[ended] += 1
        for i in np.flatnonzero(ended):
            self._actions[i] = []
        seeds = [self._seed_of(i) if ended[i] else None for i in range(self.count)]
        return self.vector.reset(seed=seeds, options={"reset_mask": ended})[0]

    def _seed_of(self, i: int) -> int:
        key = stream(self._seed, self._label, self.first + i, int(self._episode[i]))
        return key & 0x7FFFFFFF  # what numpy and gymnasium take

    # State

    def state(self) -> list[Any]:
        """What each environment needs to be where it is, in order."""
        if self._disabled:
            return [self._state_of(i) for i in range(self.count)]
        held = {"vector": _state_of_vector(self.vector), "ended": self._ended.copy()}
        return [{**held, "observation": packed_observation(self.observations)}]

    def _state_of(self, i: int) -> dict[str, Any]:
        held: dict[str, Any] = {"episode": int(self._episode[i])}
        held["observation"] = packed_observation(at(self.observations, i))
        own = self._with_state(i)
        if own is not None:
            return {**held, "state": own.get_state()}
        return {**held, "actions": np.array(self._actions[i])}

    def _with_state(self, i: int) -> Any:
        """An environment that gives its state and takes it back; None if it does not."""
        envs = getattr(self.vector, "envs", None)
        own = None if envs is None else envs[i].unwrapped
        return own if _gives_state(own) else None

    def load(self, states: list[Any]) -> None:
        """Brings the environments to where they were.

        Args:
            states: from `state`, of this vector's environments.

        Raises:
            DataError: replaying an episode's actions did not lead where they had led.
        """
        if not self._disabled:
            if self.observations is None:
                self.start()  # an environment's own state may be set between resets alone
            _load_vector(self.vector, states[0]["vector"])
            self._ended = np.array(states[0]["ended"])
            self.observations = states[0]["observation"]
            return
        self._episode[:] = [state["episode"] for state in states]
        self._actions = [list(state.get("actions", ())) for state in states]
        self.observations = self._replayed(states)
        for i, state in enumerate(states):
            if not same(packed_observation(at(self.observations, i)), state["observation"]):
                raise DataError(
                    f"environment {self.first + i} came to another observation as the episode's "
                    "actions were taken again: its steps depend on more than seed and actions: "
                    "give it get_state() and set_state(state), and vectorization: sync."
                )

    def _replayed(self, states: list[Any]) -> Any:
        """Takes all actions again; the shorter episodes begin later, so that all end together."""
        seeds = [self._seed_of(i) for i in range(self.count)]
        seen = copied(self.vector.reset(seed=seeds)[0])
        lengths = [len(actions) for actions in self._actions]
        longest = max(lengths)
        idle = self.vector.action_space.sample()
        for t in range(longest):
            begins = np.array([longest - length == t for length in lengths])
            if begins.any() and t:
                self._again(begins, seeds)
            actions = copied(idle)
            for i, length in enumerate(lengths):
                if t >= longest - length:
                    actions[i] = self._actions[i][t - (longest - length)]
            seen, _, terminated, truncated, _ = self.vector.step(actions)
            waits = np.array([t < longest - length for length in lengths])
            if (astray := (terminated | truncated) & waits).any():
                self._again(astray, seeds)
        fresh = np.array([length == 0 for length in lengths])
        if fresh.any() and longest:
            seen = self._again(fresh, seeds)
        seen = copied(seen)
        for i, state in enumerate(states):
            own = self._with_state(i)
            if own is not None and "state" in state:
                own.set_state(state["state"])
                put(seen, i, state["observation"])
        return seen

    def _again(self, which: np.ndarray, seeds: list[int]) -> Any:
        masked = [s if w else None for s, w in zip(seeds, which, strict=True)]
        return self.vector.reset(seed=masked, options={"reset_mask": which})[0]

    def close(self) -> None:
        """Ends the environments."""
        self.vector.close()


def _autoreset(vector: Any) -> str:
    """The name of a vector's autoreset mode."""
    modes = gymnasium_module().vector.AutoresetMode
    return modes(vector.metadata.get("autoreset_mode", modes.NEXT_STEP)).name


_KEPT = ("state", "steps", "prev_done")  # by gymnasium's own CartPoleVectorEnv


def _check_vector(vector: Any) -> None:
    """Refuses a vector from which a resumed run could not go on.

    Episodes that we begin ourselves are replayed; of one that resets by itself only its state says
    where it is.
    """
    own = vector.unwrapped
    if _autoreset(vector) == "DISABLED" or _gives_state(own):
        return
    if not all(hasattr(own, name) for name in _KEPT):
        raise ConfigError(
            f"environment: {type(own).__qualname__} resets by itself and gives no state that could "
            "be saved: give it get_state() and set_state(state), or make it with "
            "autoreset_mode=AutoresetMode.DISABLED (vectorization: sync does)."
        )


def _gives_state(own: Any) -> bool:
    return hasattr(own, "get_state") and hasattr(own, "set_state")


def _state_of_vector(vector: Any) -> dict[str, Any]:
    own = vector.unwrapped
    if _gives_state(own):
        return {"own": own.get_state()}
    held = {name: np.array(getattr(own, name)) for name in _KEPT}
    return {"attributes": held, "generator": own.np_random.bit_generator.state}


def _load_vector(vector: Any, held: Mapping[str, Any]) -> None:
    own = vector.unwrapped
    if "own" in held:
        own.set_state(held["own"])
        return
    for name, value in held["attributes"].items():
        setattr(own, name, np.array(value))
    own.np_random.bit_generator.state = held["generator"]


# Observations: arrays, or dictionaries and tuples of them.


def copied(values: Any) -> Any:
    """A copy of arrays of any nesting."""
    if isinstance(values, Mapping):
        return {name: copied(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(copied(value) for value in values)
    return np.array(values)


def at(values: Any, i: int) -> Any:
    """One environment's part of what a vector gave.

    Args:
        values: arrays of [envs, ...], of any nesting.
        i: the environment's index.
    """
    if isinstance(values, Mapping):
        return {name: at(value, i) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(at(value, i) for value in values)
    return values[i]


def put(values: Any, i: int, value: Any) -> None:
    """Puts one environment's observation among those of a vector.

    Args:
        values: arrays of [envs, ...], which are changed.
        i: the environment's index.
        value: its observation.
    """
    if isinstance(values, Mapping):
        for name in values:
            put(values[name], i, value[name])
    elif isinstance(values, tuple):
        for one, other in zip(values, value, strict=True):
            put(one, i, other)
    else:
        values[i] = value


def merged(values: Any, others: Any, where: np.ndarray) -> Any:
    """Observations of a vector, with those of some environments replaced.

    Args:
        values: arrays of [envs, ...].
        others: a list with an entry an environment, or arrays of [envs, ...] by name.
        where: which environments' observations are replaced.
    """
    whole = copied(values)
    for i in np.flatnonzero(where):
        put(whole, int(i), others[i] if not isinstance(others, Mapping) else at(others, int(i)))
    return whole


def packed_observation(value: Any) -> Any:
    """An observation as a checkpoint holds it."""
    if isinstance(value, Mapping):
        return {name: packed_observation(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [packed_observation(one) for one in value]
    return np.array(value)


def same(one: Any, other: Any) -> bool:
    """Whether two observations are equal, bit by bit.

    Args:
        one, other: from `packed_observation`.
    """
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
