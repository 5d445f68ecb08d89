"""Rollouts as training data: an epoch is one experience, its windows are minibatches of it.

Each rank collects its share of an experience for as long as it needs. Then all ranks exchange what
they have, so that every rank holds the whole experience: minibatches, advantages and checkpoints
are the same on any number of ranks, and a run resumes on another number of them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from paceline.data.source import Draw, WindowSize
from paceline.errors import ConfigError, DataError, counted
from paceline.recipe.mistakes import with_article
from paceline.rl.algorithm import Algorithm
from paceline.world.seeding import stream
from paceline.world.world import World


class Collector(Protocol):
    """What makes the experiences of a run.

    Attributes:
        steps: of an experience on all ranks; None if that is not known ahead.
        identity: settings that decide what is collected, as plain values.
    """

    @property
    def steps(self) -> int | None:
        """See above."""
        ...

    identity: dict[str, Any]

    def open(self, seed: int, world: World, stopping: Callable[[], bool]) -> None:
        """A run begins.

        Args:
            seed: the run's.
            world: the ranks.
            stopping: whether the run stops before the experience at hand is complete; then
                `collect` raises `StopCollecting`.
        """
        ...

    def collect(self, experience: int) -> Any:
        """This rank's part of an experience.

        Args:
            experience: experiences made before it.
        """
        ...

    def together(self, parts: list[Any]) -> tuple[Any, dict[str, float]]:
        """The steps of an experience and what is logged of it, the same on every rank.

        Args:
            parts: what `collect` returned on each rank.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its state between two experiences, equal on all ranks; nothing that is written to."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state."""
        ...

    def close(self) -> None:
        """Ends processes and the like; may be called more than once."""
        ...


class Rollouts:
    """The training data of a run that collects them itself.

    Args:
        collector: makes the experiences.
        algorithm: what is trained on each of them, how often and in which minibatches.
        report: takes what is logged of an experience.
        max_empty: experiences in a row that may come to nothing.
        goes_on: the algorithm's, called within the context in which models are evaluated.
    """

    def __init__(
        self,
        collector: Collector,
        algorithm: Algorithm,
        report: Callable[[dict[str, float]], None] = lambda row: None,
        max_empty: int = 8,
        goes_on: Callable[[Any], bool] | None = None,
    ) -> None:
        self.goes_on = algorithm.goes_on if goes_on is None else goes_on
        self.collector, self.algorithm = collector, algorithm
        self.report, self.max_empty = report, max_empty

    def open_source(
        self, size: WindowSize, seed: int, world: World, stopping: Callable[[], bool]
    ) -> RolloutSource:
        """Makes the source of a run that begins; see `paceline.data.source.SourceFactory`.

        Args:
            size: of windows, in micro-batches.
            seed: the run's.
            world: the ranks.
            stopping: whether the run stops before the experience that is collected.

        Raises:
            ConfigError: windows are to have a number of samples of their own.
        """
        if size.global_batch_size is not None or size.epoch_length is not None:
            raise ConfigError(
                "global_batch_size, epoch_length: the windows of a run with rollouts are the "
                "algorithm's minibatches: set algorithm.minibatch."
            )
        known, size_of = self.collector.steps, self.algorithm.minibatch
        if known is not None and size_of is not None and size_of > known:
            raise ConfigError(
                f"algorithm.minibatch={size_of}: an experience has {known} samples; take at most "
                "so many, or null for all of them."
            )
        self.collector.open(seed, world, stopping)
        return RolloutSource(self, size.gradient_accumulation_steps, seed, world)


class RolloutSource:
    """The windows of experiences (`paceline.Source`).

    Args:
        rollouts: where they come from.
        accumulation: micro-batches into which a minibatch is divided on each rank.
        seed: the run's.
        world: the ranks.
    """

    per_rank = False

    def __init__(self, rollouts: Rollouts, accumulation: int, seed: int, world: World) -> None:
        self._rollouts, self._accumulation = rollouts, accumulation
        self._collector, self._algorithm = rollouts.collector, rollouts.algorithm
        self._seed, self._world = seed, world
        self._alike = max(1, world.size // world.dp_size)  # ranks that collect the same
        self._epoch, self._window = 0, 0
        self._empty = 0  # experiences in a row without a window
        self._part: Any = None  # of this rank, till the ranks have exchanged theirs
        self._steps: Any = None  # of the experience at hand, on all ranks
        self._packed: Any = None  # the same for a checkpoint, once it was asked for
        self._count: int | None = None  # of them; None before they are collected
        self._order: torch.Tensor | None = None  # of the pass at hand
        self._asked, self._ended = 0, False  # the window at which the algorithm was asked to go on
        early = self._algorithm.ends_early
        self.windows_per_epoch = None if early else self._windows(self._collector.steps)
        many = self.windows_per_epoch
        self.micro_batches = None if many is None else many * accumulation
        self.identity = self._collector.identity
        size = self._algorithm.minibatch
        passes = counted(self._algorithm.passes, "pass", "es")
        self.plan = [
            (
                f"an epoch is one experience, {passes} over it"
                + (f" in minibatches of {size}" if size else ""),
                "algorithm",
            )
        ]

    def start_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._window = epoch, 0
            self._steps = self._packed = self._count = self._order = None
            self._asked, self._ended = 0, False

    def collect(self) -> None:
        """Collects this rank's part of the experience, unless it is there."""
        if self._count is None:
            self._part = self._collector.collect(self._epoch)

    def draw(self) -> Draw | None:
        if self._count is None:
            self._complete()
        assert self._count is not None
        if self.at_end(keep=True):
            return None
        share = self._share()
        pieces = [p for p in share.tensor_split(self._accumulation) if len(p)]
        self._window += 1
        steps, collate = self._steps, self._algorithm.collate_fn

        def batch(j: int) -> Any:
            if isinstance(steps, Mapping):
                return {name: column[pieces[j]] for name, column in steps.items()}
            return collate([steps[i] for i in pieces[j].tolist()])

        return Draw([len(p) for p in pieces], self._drawn, batch, lambda j: pieces[j].tolist())

    def _complete(self) -> None:
        """Exchanges the ranks' parts of an experience, which all of them have collected."""
        parts = self._world.all_gather_object(self._part)[:: self._alike]
        self._part = None
        steps, row = self._collector.together(parts)
        self._steps, self._packed = self._algorithm.prepare(steps), None
        self._count = number_of(self._steps)
        row = {**row, "rollout/steps": self._count}
        self._empty = 0 if self._count else self._empty + 1
        if self._empty:
            row["rollout/empty"] = self._empty
        self._rollouts.report(row)
        if self._empty > self._rollouts.max_empty:
            raise DataError(
                f"{self._empty} experiences in a row came to no step to train on: look at the "
                "rewards (all equal?) and at what the rows count as skipped, or raise max_empty."
            )

    def _windows(self, count: int | None) -> int | None:
        """Minibatches in an experience of so many steps."""
        size = self._algorithm.minibatch
        if count is None:
            return None if size is not None else self._algorithm.passes
        return self._algorithm.passes * -(-count // (size or count)) if count else 0

    def _share(self) -> torch.Tensor:
        """The indices of this rank's steps in the next minibatch."""
        assert self._count is not None
        size = self._algorithm.minibatch or self._count
        a_pass, place = divmod(self._window, -(-self._count // size))
        if self._order is None or place == 0:
            key = stream(self._seed, "order", self._epoch, a_pass) >> 1
            generator = torch.Generator().manual_seed(key)
            self._order = torch.randperm(self._count, generator=generator)
        whole = self._order[place * size : (place + 1) * size]
        self._drawn = len(whole)
        return whole[self._world.dp_rank :: self._world.dp_size]

    def at_end(self, *, keep: bool) -> bool:
        if self._count is None:
            return False
        whole = self._windows(self._count) or 0
        if self._algorithm.ends_early and 0 < self._window < whole:
            a_pass = whole // self._algorithm.passes
            if self._window % a_pass == 0 and self._asked != self._window:
                self._asked = self._window
                self._ended = not self._rollouts.goes_on(self._steps)
        return self._ended or self._window >= whole

    def batches_done(self) -> int:
        """This rank's: it has none of a minibatch with fewer steps than ranks before it."""
        if not self._count:
            return 0
        size = self._algorithm.minibatch or self._count
        passes, place = divmod(self._window, -(-self._count // size))
        full, rest = divmod(self._count, size)
        of_pass = full * self._pieces(size) + self._pieces(rest)
        return passes * of_pass + place * self._pieces(size)

    def _pieces(self, steps: int) -> int:
        """Micro-batches that this rank has of a minibatch of so many steps."""
        own = len(range(self._world.dp_rank, steps, self._world.dp_size))
        return min(own, self._accumulation)

    def state_dict(self) -> dict[str, Any]:
        done = self._count is None or self.at_end(keep=True)
        if not done and self._packed is None:  # each draw asks for it, and nothing changes it
            self._packed = packed(self._steps, type(self._algorithm))
        return {
            "epoch": self._epoch,
            "window": self._window,
            "empty": self._empty,
            "asked": [self._asked, self._ended],
            "count": self._count,
            "steps": None if done else self._packed,
            "collector": self._collector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._window = state["epoch"], state["window"]
        self._empty = state["empty"]
        self._count, self._order, self._part = state["count"], None, None
        self._asked, self._ended = state["asked"]
        held = state["steps"]
        self._packed = None
        self._steps = None if held is None else unpacked(held, type(self._algorithm))
        self._collector.load_state_dict(state["collector"])

    def close(self) -> None:
        self._collector.close()


def number_of(steps: Any) -> int:
    """The number of steps in a list or in columns."""
    if isinstance(steps, Mapping):
        return len(next(iter(steps.values()))) if steps else 0
    return len(steps)


def packed(steps: Any, owner: type) -> Any:
    """Steps as plain values, which a checkpoint can hold.

    Args:
        steps: a list of dataclasses, tuples, dictionaries or plain values; or columns.
        owner: the algorithm's class; dataclasses are looked for where it and its bases are defined.

    Raises:
        ConfigError: one is an object of another class.
    """
    if dataclasses.is_dataclass(steps) and not isinstance(steps, type):
        name = type(steps).__qualname__
        if _dataclass(name, owner) is not type(steps):
            raise ConfigError(
                f"a resumed run would not find the class {name} of the steps: define it at the "
                f"top of the module of {owner.__qualname__}."
            )
        fields = {f.name: packed(getattr(steps, f.name), owner) for f in dataclasses.fields(steps)}
        return {"class": name, "fields": fields}
    if isinstance(steps, Mapping):
        return {"items": {str(name): packed(value, owner) for name, value in steps.items()}}
    if isinstance(steps, tuple):
        return {"tuple": [packed(one, owner) for one in steps]}
    if isinstance(steps, list):
        return [packed(one, owner) for one in steps]
    if isinstance(steps, torch.Tensor):
        return steps.detach()
    if steps is None or isinstance(steps, (bool, int, float, str, np.ndarray, np.generic)):
        return steps
    kind = with_article(type(steps).__qualname__)
    raise ConfigError(
        f"flatten() of {owner.__qualname__} returned steps with {kind}, which a checkpoint cannot "
        "hold: make it a dataclass of tensors, arrays, numbers and texts, or train without "
        "checkpoints (checkpoint: null)."
    )


def unpacked(held: Any, owner: type) -> Any:
    """What `packed` gave, as it was; no constructor runs.

    Args:
        held: from a checkpoint.
        owner: the algorithm's class; dataclasses are looked for where it and its bases are defined.
    """
    if isinstance(held, list):
        return [unpacked(one, owner) for one in held]
    if not isinstance(held, Mapping):
        return held
    if "tuple" in held:
        return tuple(unpacked(one, owner) for one in held["tuple"])
    if "items" in held:
        return {name: unpacked(value, owner) for name, value in held["items"].items()}
    found = _dataclass(held["class"], owner)
    if found is None:
        raise DataError(
            f"the checkpoint holds steps of the class {held['class']}, and the module of "
            f"{owner.__qualname__} has no dataclass of that name."
        )
    step = object.__new__(found)
    for name, value in held["fields"].items():
        object.__setattr__(step, name, unpacked(value, owner))
    return step


def _dataclass(name: str, owner: type) -> type | None:
    """The dataclass of a name in the modules of a class and its bases."""
    for base in owner.__mro__:
        found: Any = sys.modules.get(base.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            return found
    return None
