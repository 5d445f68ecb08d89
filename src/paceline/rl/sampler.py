"""What a sampler is: it plays episodes of a system."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from paceline import registry
from paceline.data.source import StopCollecting
from paceline.rl.graph import Graph
from paceline.rl.system import System


class Sampler:
    """Plays episodes of a system.

    A subclass with a `name` registers itself, and recipes take it as `sampler: {type: NAME}`.

    Args:
        system: what is played.
        episodes: in one experience, over all ranks.

    Attributes:
        version: optimizer steps that the policy has taken, for the nodes.
        numbers: which of a run's episodes the next `rollouts` plays, for a sampler that goes
            through data in order; empty outside a run.
    """

    name: ClassVar[str]

    def __init__(self, system: Any, *, episodes: int = 8) -> None:
        self.system, self.episodes = system, episodes
        self.version = 0
        self.numbers: Sequence[int] = ()
        self._stopping: Callable[[], bool] = lambda: False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named("rollout_sampler", cls)

    @abstractmethod
    def rollout(self, seed: int | None = None) -> Graph:
        """One episode.

        Args:
            seed: of every random number in it; None for one of the global generators.

        Returns:
            A tree of turns. The same seed gives the same one.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a rollout(seed).")

    def rollouts(self, seeds: Sequence[int]) -> list[Graph]:
        """Several episodes; one that can play them at once overrides this.

        Args:
            seeds: of each episode.
        """
        graphs = []
        for seed in seeds:
            self.check_stop()
            graphs.append(self.rollout(seed))
        return graphs

    def eval_rollout(self, seed: Any = None) -> Graph:
        """One episode for an evaluation.

        Args:
            seed: as for `rollout`; a sampler of one's own may take others, such as a prompt.

        Raises:
            NotImplementedError: this sampler takes no such seed.
        """
        if seed is None or isinstance(seed, int):
            return self.rollout(seed)
        raise NotImplementedError(
            f"eval_rollout of {type(self).__qualname__} takes an int, not {seed!r:.40}: override "
            "it for other seeds."
        )

    @property
    def files(self) -> list[str]:
        """The files that it reads relative to the recipe; a run keeps copies of them."""
        return []

    def locate(self, folder: Path) -> None:
        """Reads files that it was given relative to a recipe; a trainer calls it before a run.

        Args:
            folder: the recipe's, or the working folder.
        """

    def check_stop(self) -> None:
        """To be called between turns: gives the rollout up if the run stops.

        Raises:
            StopCollecting: it stops.
        """
        if self._stopping():
            raise StopCollecting

    def begin(self, version: int, stopping: Callable[[], bool]) -> None:
        """An experience begins.

        Args:
            version: optimizer steps that the policy has taken.
            stopping: whether the run stops.
        """
        self.version, self._stopping = version, stopping
        if isinstance(self.system, System):
            self.system.check_stop, self.system.version = self.check_stop, version

    def end(self) -> None:
        """The experience is over, or given up: nothing is asked of its run any more."""
        self.begin(self.version, lambda: False)

    def check_skipped(self, skipped: Mapping[str, int]) -> None:
        """Called after each experience, on all ranks: raises if it may not go on like this.

        Args:
            skipped: branches of the experience that were given up, by the reason.
        """
