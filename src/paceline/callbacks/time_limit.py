"""TimeLimit: stops the run cleanly before the scheduler kills it."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_CLOCK = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)"
)


class TimeLimit(Callback):
    """Asks the run to stop after a time limit; it is saved and can be resumed.

    The limit applies to each start of the run, counted from `on_setup`: it mirrors the limit of a
    scheduler's allocation, and a resumed run has a new one. So it has no state in checkpoints.
    Leave time for the last checkpoint: the run stops at the end of the step, or of the validation
    batch, in which the limit passes.

    Args:
        limit: "HH:MM:SS" or, as Slurm writes it, "D-HH:MM:SS"; or a number of seconds.
        hours, minutes, seconds: the limit in parts, instead of `limit`; they add up.

    Raises:
        ConfigError: the limit is missing, unreadable, given twice or not positive.
    """

    def __init__(
        self,
        limit: str | float | None = None,
        *,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
    ) -> None:
        parts = hours * 3600 + minutes * 60 + seconds
        if limit is not None and parts:
            raise ConfigError("TimeLimit: give either `limit` or hours, minutes, seconds")
        self.seconds = parts if limit is None else _parse(limit)
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"TimeLimit must be a positive time; got {self.seconds} seconds")
        self._deadline = math.inf

    def on_setup(self, trainer: Trainer) -> None:
        """Starts the clock. Ranks may differ: they agree on the step at which all stop."""
        self._deadline = time.monotonic() + self.seconds if trainer.world.is_main else math.inf

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Checks the clock."""
        if time.monotonic() >= self._deadline:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Checks the clock: a validation may take longer than the time left."""
        if time.monotonic() >= self._deadline:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._deadline = math.inf  # asked once
        trainer.request_stop("time limit")


def _parse(limit: str | float) -> float:
    if isinstance(limit, int | float):
        return float(limit)
    match = _CLOCK.fullmatch(limit.strip())
    if match is None:
        raise ConfigError(
            f"TimeLimit: cannot read {limit!r}; write HH:MM:SS or D-HH:MM:SS, "
            "or give hours=, minutes=, seconds="
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
