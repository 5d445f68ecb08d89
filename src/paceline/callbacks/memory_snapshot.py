"""MemorySnapshot: what a GPU's memory holds in chosen steps, and who allocated it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

FOLDER = "memory"


class MemorySnapshot(Callback):
    """Records every allocation of the steps `first` to `first + steps - 1` on each rank's GPU.

    The run folder gets `memory/steps_<first>-<last>_rank_<rank>.json`: the allocator's segments and
    blocks (`segments`) and each allocation and release in order (`device_traces`), with sizes in
    bytes and the Python frames that made them. A run that ends in the middle, out of memory above
    all, writes what it has. Recording slows these steps down; it changes no number.

    It is what torch's viewer of memory (https://pytorch.org/memory_viz) draws from a pickle, which
    is never written here: make one of the file's content yourself.

    Args:
        first: the first optimizer step to record, from 1.
        steps: how many steps to record.
        max_entries: allocations and releases to keep, the latest.

    Raises:
        ConfigError: an argument is out of range or, when training starts, there is no run folder or
            the device is no NVIDIA or AMD GPU.
    """

    def __init__(self, first: int = 1, steps: int = 1, *, max_entries: int = 100_000) -> None:
        if min(first, steps, max_entries) < 1:
            raise ConfigError(
                f"MemorySnapshot(first={first}, steps={steps}, max_entries={max_entries}): "
                "expected at least 1 each."
            )
        self.first, self.steps, self.max_entries = first, steps, max_entries
        self._recording = False
        self._done = 0  # optimizer steps of the run
        self._began_at = 0
        self._file = Path()

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts to record, if the next step is the first."""
        if trainer.device.type != "cuda":
            raise ConfigError(
                f"MemorySnapshot needs a GPU: torch keeps no record of the memory of a "
                f"{trainer.device.type}."
            )
        if trainer.run_dir is None:
            raise ConfigError("MemorySnapshot writes into the run folder: give a run_dir.")
        self._file = trainer.run_dir / FOLDER / f"rank_{trainer.world.rank}.json"
        self._done = trainer.global_step
        self._start_if_due()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Starts to record, or writes what was recorded, depending on the next step."""
        self._done = trainer.global_step
        if not self._recording:
            self._start_if_due()
        elif self._done >= self.first + self.steps - 1:
            self._write(self._done)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Writes what was recorded, the step that failed included."""
        if self._recording:
            self._write(self._done + 1)

    def on_teardown(self, trainer: Trainer) -> None:
        """Writes what was recorded, if the run ends in the middle."""
        if self._recording:
            self._write(self._done)

    def _start_if_due(self) -> None:
        if self.first - 1 <= self._done < self.first + self.steps - 1:
            torch.cuda.memory._record_memory_history(max_entries=self.max_entries, stacks="python")
            self._recording, self._began_at = True, self._done

    def _write(self, last: int) -> None:
        self._recording = False
        found: dict[str, Any] = {**torch.cuda.memory._snapshot()}
        torch.cuda.memory._record_memory_history(enabled=None)
        if last == self._began_at:
            return  # no step was taken
        self._file.parent.mkdir(exist_ok=True)
        path = self._file.with_name(f"steps_{self._began_at + 1}-{last}_{self._file.name}")
        partial = path.with_name(f".{path.name}")
        wanted = {name: found[name] for name in ("segments", "device_traces")}
        partial.write_text(json.dumps(wanted, default=str))
        os.replace(partial, path)
