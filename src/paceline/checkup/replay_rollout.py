"""Plays a recorded episode once more, from the weights that had played it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.checkup.nonfinite_origin import StepIsOver
from paceline.checkup.replay import newest_before, seed_of, trained_again
from paceline.errors import ConfigError, PacelineError
from paceline.rl.recorded import RecordRollouts, read_rollouts
from paceline.trainer.callback import Callback
from paceline.trainer.trainer import Trainer


@dataclass(frozen=True)
class ReplayedRollout:
    """An episode that was played once more.

    Attributes:
        recorded: the episode as the run recorded it.
        again: as it was played now.
        checkpoint: from whose weights the run was trained forward; None for its start.
    """

    recorded: dict[str, Any]
    again: dict[str, Any]
    checkpoint: Path | None

    @property
    def reproduced(self) -> bool:
        """Whether both are equal."""
        return self.recorded == self.again


class _Played(RecordRollouts):
    """Ends the run once an experience is recorded; keeps one of its episodes."""

    def __init__(self, experience: int, episode: int) -> None:
        super().__init__()
        self.wanted = experience, episode
        self.found: dict[str, Any] | None = None

    def add(self, episodes: Any) -> None:
        for one in episodes:
            if (one["experience"], one["episode"]) == self.wanted:
                self.found = dict(one)
        if self.found is not None:
            raise StepIsOver


def replay_rollout(
    trainer: Trainer, run_dir: Path | str, experience: int, episode: int
) -> ReplayedRollout:
    """Plays a recorded episode once more.

    The run is resumed in a temporary folder from its newest checkpoint before that experience, or
    started, and trained up to it, since a resume is exact. Nothing is written to the run's folder.

    Args:
        trainer: made as for the run, and not trained yet. It is of no use afterwards.
        run_dir: the run's folder.
        experience, episode: the numbers that the record gives it.

    Raises:
        ConfigError: there is no such episode, or the trainer's settings are not the run's.
        PacelineError: the run fails or ends before it.
    """
    run_dir = Path(run_dir).absolute()
    recorded = recorded_episode(run_dir, experience, episode)
    version = max((turn["version"] for turn in recorded["turns"]), default=0)
    found = newest_before(run_dir, version + 1)
    played = _Played(experience, episode)
    with trained_again(trainer, run_dir, found, Callback()):
        trainer.loggers = [played]
        with contextlib.suppress(StepIsOver):
            trainer.fit(seed=seed_of(run_dir) or 0)
    if played.found is None:
        raise PacelineError(
            f"the replay ended before experience {experience}, at step {trainer.global_step} "
            f"({trainer.result.stopped_by}): the settings are not those of the run."
        )
    return ReplayedRollout(recorded, played.found, None if found is None else found.path)


def recorded_episode(run_dir: Path | str, experience: int, episode: int) -> dict[str, Any]:
    """One of the episodes that a run has recorded.

    Args:
        run_dir: the run's folder.
        experience, episode: its numbers.

    Raises:
        ConfigError: there is none of these numbers.
    """
    last = None
    for one in read_rollouts(run_dir):
        last = one["experience"], one["episode"]
        if last == (experience, episode):
            return one
    known = "none is recorded" if last is None else f"the last one is {last[0]}:{last[1]}"
    raise ConfigError(f"{run_dir} has no episode {experience}:{episode}; {known}.")
