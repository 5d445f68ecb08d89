"""Throughput: samples and items per second, time per step and peak memory, in the timing rows."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class Throughput(Callback):
    """Measures the steps since the previous row, without validations.

    Each timing row gets `samples_per_second` and `items_per_second` (all ranks together),
    `step_seconds` (mean), `peak_memory_bytes` (of rank 0 since it started: the device's allocator,
    or the whole process on a CPU). It never waits for the device: the metrics row written at the
    same time already did.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._counted = (0, 0, 0)
        self._validation_began = 0.0

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts the clock; steps before a resume are not counted."""
        self._restart(trainer)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Logs the speeds, if there is a row at this step."""
        if not metrics or not trainer.world.is_main:
            return
        seconds = time.perf_counter() - self._since
        steps, samples, items = (
            now - then for now, then in zip(_counts(trainer), self._counted, strict=True)
        )
        if steps > 0 and seconds > 0:
            speeds = self.speeds(trainer, seconds, samples=samples, items=items)
            speeds["step_seconds"] = seconds / steps
            speeds["peak_memory_bytes"] = peak_memory(trainer.device)
            for name, value in speeds.items():
                trainer.log_timing(name, value)
        self._restart(trainer)

    def speeds(
        self, trainer: Trainer, seconds: float, *, samples: int, items: int
    ) -> dict[str, float]:
        """What was done since the last row, per second.

        Args:
            trainer: which did it.
            seconds: since the last row, without validations.
            samples, items: of all ranks in these seconds.
        """
        return {"samples_per_second": samples / seconds, "items_per_second": items / seconds}

    def on_validation_start(self, trainer: Trainer) -> None:
        """Stops the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer) -> None:
        """Restarts the clock."""
        self._since += time.perf_counter() - self._validation_began

    def _restart(self, trainer: Trainer) -> None:
        self._since = time.perf_counter()
        self._counted = _counts(trainer)


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: on `device`, or by the process if it is the CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def _counts(trainer: Trainer) -> tuple[int, int, int]:
    # If there is a row, the items have already been read from the device.
    return trainer.global_step, int(trainer.progress.samples), int(trainer.progress.items)
