"""Profiler: traces chosen optimizer steps with torch's own profiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

FOLDER = "trace"


class Profiler(Callback):
    """Writes a trace of the steps `first` to `first + steps - 1` into the run folder.

    The file is `trace/steps_<first>-<last>_rank_<rank>.json`, for chrome://tracing or Perfetto. It
    includes validations and checkpoints between those steps. Steps are counted from the beginning
    of the run, so a resumed run does not repeat them: a run that is stopped in the middle writes
    what it has, and the resumed one writes the rest. The profiler is off except in these steps and
    the `warmup` before them; starting and stopping it may wait for the device.

    Args:
        first: the first optimizer step to record, from 1.
        steps: how many steps to record.
        warmup: steps before the first in which the profiler runs but discards its records, so that
            the trace does not show the profiler's own start-up.
        all_ranks: write a file for each rank, not for rank 0 alone.
        shapes: also record the shapes of operators' inputs.
        memory: also record allocations.
        stacks: also record the source lines of operators, which is slow.

    Raises:
        ConfigError: an argument is out of range or, at the start of the run, there is no run
            folder.
    """

    # Before other callbacks, so that the trace includes their work in a step.
    priority = 0

    def __init__(
        self,
        first: int = 10,
        steps: int = 3,
        *,
        warmup: int = 2,
        all_ranks: bool = False,
        shapes: bool = False,
        memory: bool = False,
        stacks: bool = False,
    ) -> None:
        if first < 1 or steps < 1 or warmup < 0:
            raise ConfigError(
                f"Profiler(first={first}, steps={steps}, warmup={warmup}): expected at least 1, 1 "
                "and 0"
            )
        self.first = first
        self.steps = steps
        self.warmup = warmup
        self.all_ranks = all_ranks
        self.shapes = shapes
        self.memory = memory
        self.stacks = stacks
        self._folder: Path | None = None
        self._rank = 0
        self._profile: Any = None
        self._recorded: list[int] = []  # steps

    def on_setup(self, trainer: Trainer) -> None:
        """Chooses the file of the trace."""
        if trainer.run_dir is None:
            raise ConfigError("Profiler writes its trace into the run folder: give a run_dir.")
        self._rank = trainer.world.rank
        wanted = self.all_ranks or trainer.world.is_main
        self._folder = trainer.run_dir / FOLDER if wanted else None
        self._profile, self._recorded = None, []

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts the profiler if the next step is to be recorded."""
        self._start(trainer.global_step)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Starts, advances or stops the profiler, depending on the next step."""
        done = trainer.global_step
        if self._profile is None:
            self._start(done)
            return
        if done >= self.first:
            self._recorded.append(done)
        if done >= self.first + self.steps - 1:
            self._stop()
        else:
            self._profile.step()

    def on_teardown(self, trainer: Trainer) -> None:
        """Writes what was recorded, if the run ends in the middle."""
        if self._profile is not None:
            self._stop()

    def _start(self, done: int) -> None:
        if self._folder is None or not (
            self.first - self.warmup - 1 <= done < self.first + self.steps - 1
        ):
            return
        warmup = max(0, self.first - 1 - done)
        profiler = torch.profiler
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        self._recorded = []
        schedule = profiler.schedule(wait=0, warmup=warmup or 1, active=self.steps, repeat=1)
        self._profile = profiler.profile(
            activities=activities,
            schedule=schedule if warmup else None,
            record_shapes=self.shapes,
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        self._profile.start()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        if not self._recorded or self._folder is None:
            return  # the first step was never reached
        self._folder.mkdir(exist_ok=True)
        name = f"steps_{self._recorded[0]}-{self._recorded[-1]}_rank_{self._rank}.json"
        partial = self._folder / f".{name}"
        profile.export_chrome_trace(str(partial))
        os.replace(partial, self._folder / name)
