"""Progress: shows the run's progress, as bars on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from paceline.data.source import batches_in
from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_COUNTERS = frozenset({"step", "global_step", "epoch", "samples", "items", "tokens", "batch"})
_SHOWN = 6  # values of a row that a plain line has; the rows hold all of them
_SECONDS_IN_VALIDATION = 10.0  # between plain lines within one validation
_LONGEST_PAUSE = 600.0  # seconds between plain lines, so that a silent log means something


class Progress(Callback):
    """Shows epoch, step, the newest row's values, samples a second and the time left, on rank 0.

    On a terminal two bars (training, validation) are redrawn in place, by the training loop
    itself: there is no thread. In a notebook one line is. Elsewhere (a file, a batch job) rows and
    validations are plain lines: frequent at first, then rarer, so that a log stays short however
    long the run is. It reads the clock and rows that are already on the host, never the device,
    so it changes no bit of the run and waits for no kernel.

    Args:
        refresh_seconds: the least time between two drawings in place, in seconds.
        line_seconds: the least time between two plain lines, in seconds. The pause grows to a fifth
            of the time that the run has taken, and to 10 minutes at most.
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
        self._due = self._validation_due = math.inf
        self._held = ""  # a validation's result that no line has shown
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
        self._view = _view(stream)
        self._rows_only = isinstance(self._view, _Lines)
        self._began, self._due, self._validation_due = time.monotonic(), 0.0, 0.0
        self._step_before = trainer.global_step
        self._counted = (self._began, int(trainer.progress.samples))
        self._row, self._speed, self._held = {}, "", ""

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
        """Shows the validation's result, as a line that stays where there are lines."""
        if self._view is None or not (values := _values(metrics)):
            return
        self._held = f"validation at step {trainer.global_step}  {'  '.join(values)}"
        now = time.monotonic()
        if not self._rows_only or now >= self._validation_due:
            self._validation_due = now + self._pause(now)
            self._show_held()

    def on_train_end(self, trainer: Trainer) -> None:
        """Shows the final state, or as lines what has not been shown of it."""
        self._show_held()
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

    def _pause(self, now: float) -> float:
        """Seconds until the next drawing."""
        if not self._rows_only:
            return self.refresh_seconds
        return max(self.line_seconds, min((now - self._began) / 5, _LONGEST_PAUSE))

    def _show_held(self) -> None:
        if self._view is not None and self._held:
            self._view.result(self._held)
        self._held = ""

    def _draw(self, trainer: Trainer) -> None:
        now = time.monotonic()
        self._due = now + self._pause(now)
        if self._view is None:
            self._due = math.inf
            return
        elapsed = max(now - self._began, 1e-9)
        step, total = trainer.global_step, trainer.training_horizon
        steps_per_second = (step - self._step_before) / elapsed
        left = ""
        if total and steps_per_second > 0:
            left = f"{_clock((total - step) / steps_per_second)} left"
        # Between two epochs it is the one that has ended.
        epoch, epochs = max(trainer.current_epoch + trainer.progress.begun, 1), trainer.epochs
        label = f"epoch {epoch}/{epochs}" if epochs else f"epoch {epoch}"
        values = _values(self._row) or _loss_now(trainer)
        self._view.training(label, step, total, _Notes(values[:_SHOWN], self._speed, left))
        self._unshown = False

    def _draw_validation(self, trainer: Trainer) -> None:
        now = time.monotonic()
        self._due = now + (_SECONDS_IN_VALIDATION if self._rows_only else self._pause(now))
        if self._view is not None:
            self._view.validation(trainer.global_step, self._validated, self._validation_length)


@dataclass(frozen=True)
class _Notes:
    """What a line says beside epoch and step.

    Attributes:
        values: `"name value"` each, the losses first, then the rates.
        speed: samples a second; may be empty.
        left: the time left; may be empty.
    """

    values: list[str]
    speed: str
    left: str

    def fitting(self, width: float = math.inf) -> str:
        """As much as a line has room for: the first loss, the time left, the first rate and the
        speed come before other values."""
        loss, rate = self.values[:1], [v for v in self.values[1:] if v.startswith("lr")][:1]
        room, kept = width, set[str]()
        for note in [*loss, self.left, *rate, self.speed, *self.values]:
            if note and note not in kept and (room := room - len(note) - 2) >= -2:
                kept.add(note)
        return "  ".join(v for v in [*self.values, self.speed, self.left] if v in kept)


def _view(stream: TextIO) -> _View:
    if stream.isatty():
        return _Bars(stream)
    # A kernel has its own stdout, and is no terminal. IPython is there if it is a notebook.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if stream is sys.stdout and hasattr(shell, "kernel"):
        return _Notebook()
    return _Lines(stream)


class _View(Protocol):
    def training(self, label: str, step: int, total: int | None, notes: _Notes) -> None: ...
    def validation(self, step: int, batch: int, total: int | None) -> None: ...
    def validation_over(self) -> None: ...
    def result(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """Plain lines, flushed one by one so that a batch job's log is never late."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = -1

    def training(self, label: str, step: int, total: int | None, notes: _Notes) -> None:
        if step != self._last:  # the end of a run and its last row share a line
            self.result("  ".join([label, f"step {_of(step, total)}", notes.fitting()]))
        self._last = step

    def validation(self, step: int, batch: int, total: int | None) -> None:
        self.result(f"validation at step {step}  batch {_of(batch, total)}")

    def validation_over(self) -> None: ...

    def result(self, text: str) -> None:
        # A name that the stream cannot encode does not end the run.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        print(shown, file=self._stream, flush=True)

    def close(self) -> None: ...


class _Notebook:
    """One line of a notebook's output, which is replaced."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._training = self._validating = self._result = ""
        self._handle = DisplayHandle()
        self._handle.display({"text/plain": ""}, raw=True)

    def training(self, label: str, step: int, total: int | None, notes: _Notes) -> None:
        self._training = "  ".join([label, f"step {_of(step, total)}", notes.fitting()])
        self._show()

    def validation(self, step: int, batch: int, total: int | None) -> None:
        self._validating = f"validates, batch {_of(batch, total)}"
        self._show()

    def validation_over(self) -> None:
        self._validating = ""

    def result(self, text: str) -> None:
        self._result = text
        self._show()

    def close(self) -> None: ...

    def _show(self) -> None:
        parts = [self._training, self._validating or self._result]
        self._handle.update({"text/plain": "  |  ".join(filter(None, parts))}, raw=True)


class _Bars:
    """Two bars of rich, drawn by the caller: a thread would compete with the training."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=stream)
        self._width = 24 if console.width >= 120 else 12 if console.width >= 100 else 8
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            # The terminal's own colours, which are made for its background.
            BarColumn(self._width, "bright_black", "cyan", "green", "cyan"),
            TextColumn("{task.fields[notes]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._training = self._bars.add_task("training", total=None, notes="")
        self._validation = self._bars.add_task("validation", visible=False, notes="")
        self._bars.start()

    def training(self, label: str, step: int, total: int | None, notes: _Notes) -> None:
        count = _of(step, total)
        taken = max(len(label), len("validation")) + self._width + len(count) + 4
        self._bars.update(
            self._training,
            description=label,
            completed=step,
            total=total,
            notes=f"{count}  {notes.fitting(self._bars.console.width - taken)}",
            refresh=True,
        )

    def validation(self, step: int, batch: int, total: int | None) -> None:
        self._bars.update(
            self._validation,
            completed=batch,
            total=total,
            notes=_of(batch, total),
            visible=True,
            refresh=True,
        )

    def validation_over(self) -> None:
        self._bars.update(self._validation, visible=False, refresh=True)

    def result(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()


def _of(number: int, total: int | None) -> str:
    return f"{number}/{total}" if total else str(number)


def _loss_now(trainer: Trainer) -> list[str]:
    """Before the first row the loss of the last batch, where reading it waits for no device."""
    loss = getattr(trainer.window, "loss", None) if trainer.local_batches else None
    if isinstance(loss, torch.Tensor) and loss.device.type == "cpu":
        return [f"loss {loss.item():.4g}"]
    return []


def _values(row: dict[str, Any]) -> list[str]:
    """`"name value"` for each number of a row, losses and then rates first, without counters."""
    numbers = {
        name.removeprefix("train/"): value
        for name, value in row.items()
        if isinstance(value, int | float) and name not in _COUNTERS
    }
    kinds = {name: ("loss" not in name, not name.startswith("lr")) for name in numbers}
    ordered = sorted(numbers, key=kinds.__getitem__)  # stable: else the row's order
    return [f"{name} {numbers[name]:.4g}" for name in ordered]


def _clock(seconds: float) -> str:
    """`seconds` as M:SS, or H:MM:SS from an hour on."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
