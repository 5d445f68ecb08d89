"""Evaluations of a policy that disturb nothing: fresh episodes, each with a stream of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.rl.prompts import file_of, read_prompts, usable


class Evaluation:
    """What a policy is evaluated on, and when.

    Args:
        every: experiences between two evaluations.
        episodes: fresh episodes over all ranks, the same in each evaluation; without prompts.
        deterministic: whether the most likely action is taken, in an environment.
        threshold: the return, or the last turn's reward, from which on an episode is a success;
            None to count none.
        prompts: of a sampler's: each is played once, without branches; texts, or {"file": path}
            with one a line, relative to the recipe.
        against_untrained: whether the same episodes are played before training, and each evaluation
            says by how much it has gained on them.

    Raises:
        ConfigError: a number is below 1, or there is no prompt.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        episodes: int = 100,
        deterministic: bool = True,
        threshold: float | None = None,
        prompts: Any = None,
        against_untrained: bool = False,
    ) -> None:
        for setting, value in (("every", every), ("episodes", episodes)):
            if value < 1:
                raise ConfigError(f"evaluation.{setting}={value}: expected at least 1.")
        self.every, self.episodes = every, episodes
        self.deterministic, self.threshold = deterministic, threshold
        self.against_untrained = against_untrained
        self._file: str | None = None
        self.prompts: list[Any] | None = None
        if isinstance(prompts, Mapping):
            self._file = file_of("evaluation.prompts", prompts)
        elif isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes):
            self.prompts = usable(list(prompts), "evaluation.prompts")
        elif prompts is not None:
            raise ConfigError("evaluation.prompts: expected texts, or {file: path}.")

    def locate(self, folder: Path) -> None:
        """Reads a file of prompts.

        Args:
            folder: that its path is relative to.
        """
        if self._file is not None:
            self.prompts = read_prompts(folder / self._file)


class Untrained:
    """What the episodes of an evaluation were worth before training; saved with the run.

    Attributes:
        values: one an episode, None for one without a turn; None before they were played.
    """

    values: list[float | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the values."""
        self.values = state["values"]
