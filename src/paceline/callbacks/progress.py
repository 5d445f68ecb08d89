"""Progress: shows the run's progress, as bars on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from paceline.data.source import batches_in
from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_COUNTERS = frozenset({"step", "global_step", "epoch", "samples", "items", "tokens", "batch"})
_SHOWN = 6  # values of a row that fit beside the bar; the rows hold all of them
_SECONDS_IN_VALIDATION = 10.0  # between plain lines within one validation


class Progress(Callback):
    """Shows epoch, step, the newest row's values, samples a second and the time left, on rank 0.

    On a terminal two bars (training, validation) are redrawn in place, by the training loop
    itself: there is no thread. Elsewhere (a file, a notebook, a batch job) each metrics row is one
    line and each validation another. It reads the clock and rows that are already on the host,
    never the device, so it changes no bit of the run and waits for no kernel.

    Args:
        refresh_seconds: the least time between two drawings of the bars, in seconds.
        line_seconds: the least time between two plain lines of training, in seconds.
        file: where to write; stdout by default.

    Raises:
        ConfigError: a time is negative.
    """

    # After the others, so that the row is shown as they left it.
    priority = 1000

    def __init__(
        self,
        *,
        refresh_seconds: float = 0.2,
        line_seconds: float = 1.0,
        file: TextIO | None = None,
    ) -> None:
        if refresh_seconds < 0 or line_seconds < 0:
            raise ConfigError("Progress: a time between drawings cannot be negative")
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self.file = file
        self._view: _View | None = None
        self._rows_only = True
        self._row: dict[str, Any] = {}
        self._unshown = False  # there is a row that no line has shown
        self._due = math.inf
        self._interval = line_seconds
        self._began = 0.0
        self._step_before = 0
        self._counted = (0.0, 0)  # time and samples of the newest row
        self._speed = ""
        self._validated = 0
        self._validation_length: int | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Opens the view; speeds are measured from here."""
        if not trainer.world.is_main:
            return
        stream: TextIO = sys.stdout if self.file is None else self.file
        self._rows_only = not stream.isatty()
        self._interval = self.line_seconds if self._rows_only else self.refresh_seconds
        self._view = _Lines(stream) if self._rows_only else _Bars(stream)
        self._began, self._due = time.monotonic(), 0.0
        self._step_before = trainer.global_step
        self._counted = (self._began, int(trainer.progress.samples))
        self._row, self._speed = {}, ""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Keeps the row, if there is one, and draws if a drawing is due."""
        if metrics:
            self._take(metrics)
        elif self._rows_only:
            return
        if time.monotonic() >= self._due:
            self._draw(trainer)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Opens the validation's bar."""
        # This rank's share of the loaders; an evaluate() of the user's own has none.
        self._validated = 0
        most = trainer.max_val_batches
        self._validation_length = batches_in(trainer.validation, most) or None
        if self._rows_only:
            self._due = time.monotonic() + _SECONDS_IN_VALIDATION
        elif self._view is not None:
            self._draw_validation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Draws if a drawing is due."""
        self._validated += 1
        if time.monotonic() >= self._due:
            self._draw_validation(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        """Removes the validation's bar."""
        self._due = 0.0
        if self._view is not None:
            self._view.validation_over()

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Writes the validation's result as a line that stays."""
        if self._view is not None and (values := _values(metrics)):
            self._view.line(f"validation at step {trainer.global_step}  {'  '.join(values)}")

    def on_train_end(self, trainer: Trainer) -> None:
        """Shows the final state, or as a line the last row if it has not been shown."""
        if self._view is not None and (self._unshown or not self._rows_only):
            self._draw(trainer)

    def on_teardown(self, trainer: Trainer) -> None:
        """Restores the terminal, however the run ended."""
        if self._view is not None:
            self._view.close()
        self._view, self._due, self._rows_only = None, math.inf, True

    def _take(self, row: dict[str, Any]) -> None:
        """Keeps a row. Samples are counted from rows: elsewhere the count may be a tensor."""
        (then, before), self._counted = self._counted, (time.monotonic(), row["samples"])
        self._row, self._unshown = row, True
        if (seconds := self._counted[0] - then) > 0:
            self._speed = f"{(self._counted[1] - before) / seconds:,.0f} samples/s"

    def _draw(self, trainer: Trainer) -> None:
        now = time.monotonic()
        self._due = now + self._interval
        if self._view is None:
            self._due = math.inf
            return
        elapsed = max(now - self._began, 1e-9)
        values = _values(self._row)[:_SHOWN] or _loss_now(trainer)
        notes = [*values, *([self._speed] if self._speed else [])]
        step, total = trainer.global_step, trainer.training_horizon
        steps_per_second = (step - self._step_before) / elapsed
        if total and steps_per_second > 0:
            notes.append(f"{_clock((total - step) / steps_per_second)} left")
        # Between two epochs it is the one that has ended.
        epoch, epochs = max(trainer.current_epoch + trainer.progress.begun, 1), trainer.epochs
        label = f"epoch {epoch}/{epochs}" if epochs else f"epoch {epoch}"
        self._view.training(label, step, total, notes)
        self._unshown = False

    def _draw_validation(self, trainer: Trainer) -> None:
        pause = _SECONDS_IN_VALIDATION if self._rows_only else self._interval
        self._due = time.monotonic() + pause
        if self._view is not None:
            self._view.validation(trainer.global_step, self._validated, self._validation_length)


class _View(Protocol):
    def training(self, label: str, step: int, total: int | None, notes: list[str]) -> None: ...
    def validation(self, step: int, batch: int, total: int | None) -> None: ...
    def validation_over(self) -> None: ...
    def line(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """Plain lines, flushed one by one so that a batch job's log is never late."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = -1

    def training(self, label: str, step: int, total: int | None, notes: list[str]) -> None:
        if step != self._last:  # the end of a run and its last row share a line
            self.line("  ".join([label, f"step {step}{f'/{total}' if total else ''}", *notes]))
        self._last = step

    def validation(self, step: int, batch: int, total: int | None) -> None:
        self.line(f"validation at step {step}  batch {batch}{f'/{total}' if total else ''}")

    def validation_over(self) -> None: ...

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None: ...


class _Bars:
    """Two bars of rich, drawn by the caller: a thread would compete with the training."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[notes]}", markup=False),
            console=Console(file=stream),
            auto_refresh=False,
        )
        self._training = self._bars.add_task("training", total=None, notes="")
        self._validation = self._bars.add_task("validation", visible=False, notes="")
        self._bars.start()

    def training(self, label: str, step: int, total: int | None, notes: list[str]) -> None:
        self._bars.update(
            self._training,
            description=label,
            completed=step,
            total=total,
            notes="  ".join(notes),
            refresh=True,
        )

    def validation(self, step: int, batch: int, total: int | None) -> None:
        self._bars.update(
            self._validation, completed=batch, total=total, visible=True, refresh=True
        )

    def validation_over(self) -> None:
        self._bars.update(self._validation, visible=False, refresh=True)

    def line(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()


def _loss_now(trainer: Trainer) -> list[str]:
    """Before the first row the loss of the last batch, where reading it waits for no device."""
    loss = getattr(trainer.window, "loss", None) if trainer.local_batches else None
    if isinstance(loss, torch.Tensor) and loss.device.type == "cpu":
        return [f"loss {loss.item():.4g}"]
    return []


def _values(row: dict[str, Any]) -> list[str]:
    """`"name value"` for each number of a row, losses first; counters are left out."""
    numbers = {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and name not in _COUNTERS
    }
    ordered = sorted(numbers, key=lambda name: "loss" not in name)  # stable: else the row's order
    return [f"{name} {numbers[name]:.4g}" for name in ordered]


def _clock(seconds: float) -> str:
    """`seconds` as H:MM:SS."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
