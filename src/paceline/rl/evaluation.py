"""Evaluations of a policy that disturb nothing: fresh episodes, each with a stream of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, nearest
from paceline.rl.played import Played
from paceline.rl.prompts import file_of, read_prompts, usable

BASELINES = ("untrained", "random")


class Evaluation:
    """What a policy is evaluated on, and when.

    Args:
        every: experiences between two evaluations.
        episodes: fresh episodes over all ranks, the same in each evaluation; without prompts.
        deterministic: whether the most likely action is taken, in an environment.
        threshold: the return, or the last turn's reward, from which on an episode is a success;
            None to count none.
        prompts: of a sampler's: each is played without branches; texts, or {"file": path} with one
            a line, relative to the recipe.
        attempts: how often each prompt is played, each time with other random numbers.
        against_untrained: whether the same episodes are played before training, and each evaluation
            says by how much it has gained on them.
        baselines: which other policies `paceline evaluate` plays the same episodes with:
            "untrained", the policy as it was before training, and "random", which draws actions or
            tokens uniformly.

    Raises:
        ConfigError: a number is below 1, there is no prompt, or a baseline is unknown.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        episodes: int = 100,
        deterministic: bool = True,
        threshold: float | None = None,
        prompts: Any = None,
        attempts: int = 1,
        against_untrained: bool = False,
        baselines: Sequence[str] = BASELINES,
    ) -> None:
        for setting, value in (("every", every), ("episodes", episodes), ("attempts", attempts)):
            if value < 1:
                raise ConfigError(f"evaluation.{setting}={value}: expected at least 1.")
        if attempts > 1 and prompts is None:
            raise ConfigError(
                f"evaluation.attempts={attempts}: they are at prompts, and none are given; fresh "
                "episodes are counted by `episodes`."
            )
        wrong = [name for name in baselines if name not in BASELINES]
        if isinstance(baselines, str) or wrong:
            name = baselines if isinstance(baselines, str) else wrong[0]
            raise ConfigError(
                f"evaluation.baselines: expected a list of {', '.join(BASELINES)}, not {name!r}"
                f"{nearest(str(name), BASELINES)}"
            )
        self.attempts, self.baselines = attempts, tuple(baselines)
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

    @property
    def files(self) -> list[str]:
        """The files that it reads relative to the recipe."""
        return [] if self._file is None else [self._file]

    def locate(self, folder: Path) -> None:
        """Reads a file of prompts.

        Args:
            folder: that its path is relative to.
        """
        if self._file is not None:
            self.prompts = read_prompts(folder, self._file)


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


@dataclass
class Beside:
    """One policy of a full evaluation.

    Attributes:
        policy: "trained", or the baseline's name.
        played: its episodes, with their records.
        left_out: why there are none, in words; empty if there are.
    """

    policy: str
    played: list[Played] = field(default_factory=list)
    left_out: str = ""
