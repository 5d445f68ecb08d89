"""Evaluations of a policy that disturb nothing: fresh episodes, each with a stream of its own."""

from __future__ import annotations

from paceline.errors import ConfigError


class Evaluation:
    """What a policy is evaluated on, and when.

    Args:
        every: experiences between two evaluations.
        episodes: fresh episodes over all ranks, the same in each evaluation.
        deterministic: whether the most likely action is taken.
        threshold: the return from which on an episode is a success; None to count none.

    Raises:
        ConfigError: a number is below 1.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        episodes: int = 100,
        deterministic: bool = True,
        threshold: float | None = None,
    ) -> None:
        for setting, value in (("every", every), ("episodes", episodes)):
            if value < 1:
                raise ConfigError(f"evaluation.{setting}={value}: expected at least 1.")
        self.every, self.episodes = every, episodes
        self.deterministic, self.threshold = deterministic, threshold
