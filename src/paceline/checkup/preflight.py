"""Preflight: takes the first steps of a recipe's run for real, then discards them."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from paceline.callbacks.throughput import peak_memory
from paceline.checkup import preflight_checks
from paceline.checkup.costs import Length, length_of, most_checkpoints
from paceline.checkup.rehearsal import LOOKED_INTO, STAGES, Rehearsal, Reload, Seen
from paceline.checkup.report import Check, PreflightReport, readable_bytes, readable_seconds
from paceline.checkup.suspicious_settings import wrong_lengths, wrong_settings
from paceline.data.source import batches_in
from paceline.errors import ConfigError, DataError, MetricError, NonFiniteError, PacelineError, some
from paceline.log.secrets import mask_credentials
from paceline.log.traceback import told_in_full
from paceline.recipe.builder import build_trainer, origin
from paceline.recipe.recipe import Recipe
from paceline.trainer.settings import Resume, ValidationPolicy
from paceline.world.environment import adopt_slurm, refuse_replica_groups

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_VERDICTS: dict[str, Callable[[Trainer, Seen], list[Check]]] = {
    "components": preflight_checks.components,
    "training data": preflight_checks.training_data,
    "forward pass": preflight_checks.forward_pass,
    "backward pass": preflight_checks.backward_pass,
    "optimizer step": preflight_checks.optimizer_step,
    "scheduler step": preflight_checks.scheduler_step,
    "validation": preflight_checks.validation,
}
NEARLY_FULL = 0.9  # of a device's memory


def preflight(recipe: Recipe) -> PreflightReport:
    """Builds a recipe's components and takes its first steps, as training would.

    The Trainer's own loop trains for a few optimizer steps, validates on a few batches, saves, and
    loads the checkpoint back, in a temporary folder beside the run folder. The run folder itself is
    neither read nor written, and its loggers are built but get no rows. If the recipe has several
    seeds, the first is rehearsed; the estimates of time and disk space are for all runs.

    Args:
        recipe: the checked recipe. Its components are built in this process.

    Returns:
        The checks, one line each, and the estimates.

    Raises:
        ConfigError: this process is one of several: preflight is for one.
    """
    alone("preflight")
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    report = PreflightReport([Check("recipe", "PASS", str(recipe.composed.path))])
    report.checks += wrong_settings(recipe)
    one = recipe.of_seed(recipe.seeds[0]) if recipe.seeds else recipe
    with _scratch_beside(recipe.run_dir) as scratch:
        # Without `whole` nothing is written for all seeds together into the run's own folder.
        one = replace(one, run_dir=scratch / "run", whole=None)
        _Preflight(one, recipe.run_dir, len(recipe.seeds) or 1, report).run()
    gc.collect()  # a trainer has reference cycles, and may hold most of the memory
    return report


def alone(command: str) -> None:
    """Checks that this process is not one of several.

    Args:
        command: the command's name, for the message.

    Raises:
        ConfigError: this process is one of several, or one of several replica groups.
    """
    adopt_slurm()
    refuse_replica_groups(f"`paceline {command}` does")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"{command} runs in one process: start it without a launcher.")


class _Preflight:
    """One preflight.

    Args:
        recipe: with a temporary folder as its run folder.
        run_dir: the run folder of the actual run.
        runs: the number of runs.
        report: collects the checks.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, runs: int, report: PreflightReport) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.runs = runs
        self.report = report
        self.rehearsal = Rehearsal()
        self.trainer: Trainer | None = None

    def run(self) -> None:
        """Rehearses, then writes the report."""
        try:
            trainer = self._build()
            trainer.fit(seed=self.recipe.seed)
            self._verdicts(until=None)
            self._checkpoint(trainer)
        except Exception as error:  # noqa: BLE001 - any error of the user's code becomes a line
            self._fail(error)
        self._memory()
        if self.trainer is not None and self.rehearsal.seen.seconds:
            self._speed(self.trainer)

    def _build(self) -> Trainer:
        trainer = self.trainer = build_trainer(self.recipe, resume="never")
        trainer.callbacks.append(self.rehearsal)
        trainer.loggers = []
        trainer.show_progress = False
        trainer.log_every = 1  # each row reads whether the loss was finite
        trainer.check_gradients = True
        trainer.on_nonfinite = "raise"
        trainer.validate_every = 1  # the rehearsal stops after the first validation
        if trainer.checkpoint_policy is not None:
            trainer.checkpoint_policy = replace(
                trainer.checkpoint_policy, every_epochs=None, every_steps=None, save_best=False
            )
        return trainer

    @property
    def _length(self) -> Length:
        assert self.trainer is not None
        return length_of(self.trainer, _every(self.recipe))

    def _verdicts(self, until: str | None) -> None:
        """Adds the checks of every stage before `until`."""
        trainer, seen = self.trainer, self.rehearsal.seen
        assert trainer is not None
        for stage, verdict in _VERDICTS.items():
            if stage == until:
                return
            self.report.checks += verdict(trainer, seen)
            if stage == "components":
                validations = self._length.validations
                self.report.checks += wrong_lengths(trainer, self.recipe, validations)

    def _fail(self, error: Exception) -> None:
        """Adds a check for the failed stage, and one for each stage that was not reached."""
        seen, report = self.rehearsal.seen, self.report
        cause = cause_of(error)
        if not isinstance(cause, PacelineError):
            report.stack = told_in_full(cause)
        stage = _stage(error, seen)
        if stage != STAGES[0] and all(check.name != STAGES[0] for check in report.checks):
            self._verdicts(until=stage)
        report.checks = [check for check in report.checks if check.name != stage]
        if self.trainer is not None:
            report.checks += preflight_checks.labels(self.trainer, seen)
        report.checks.append(Check(stage, "FAIL", told(error)))
        for later in STAGES[STAGES.index(stage) + 1 :]:
            report.checks.append(Check(later, "SKIP", f"after the failure of: {stage}"))
        _let_go(error)

    def _checkpoint(self, trainer: Trainer) -> None:
        """Loads the checkpoint, compares it and measures its size."""
        saved, seen = trainer.result.checkpoint, self.rehearsal.seen
        if saved is None:
            self.report.checks.append(Check("checkpoint", "SKIP", "the recipe saves no checkpoint"))
            return
        seen.stage = "checkpoint"
        policy = self.recipe.settings.get("checkpoint") or type(trainer.checkpoint_policy)()
        monitored = trainer.metric_monitor is not None
        files = [saved, *saved.rglob("*")]  # a folder, or a file of an engine that writes one
        size = sum(file.stat().st_size for file in files if file.is_file())
        reload = Reload()
        trainer.callbacks[trainer.callbacks.index(self.rehearsal)] = reload
        trainer.resume = Resume("must")
        trainer.validate_every = 1  # as the rehearsal began
        trainer.fit(seed=self.recipe.seed)
        lost = reload.differences
        if lost is None or lost:
            detail = f"changed by saving and loading: {some(lost or ['everything'])}"
            self.report.checks.append(Check("checkpoint", "FAIL", detail))
        else:
            detail = f"{readable_bytes(size)}, saved and loaded back, equal bit by bit"
            self.report.checks.append(Check("checkpoint", "PASS", detail))
        self._disk(size, most_checkpoints(policy, self._length, monitored=monitored))

    def _disk(self, size: int, count: int | None) -> None:
        free = shutil.disk_usage(_existing(self.run_dir)).free
        if count is None:
            text = f"{readable_bytes(size)} per checkpoint, of which the number is unknown"
            self.report.checks.append(Check("disk", "WARN", f"{text}; {readable_bytes(free)} free"))
            return
        count *= self.runs
        needed = self.report.disk_bytes = size * count
        text = f"at most {count} checkpoints at once take {readable_bytes(needed)}"
        status = "FAIL" if needed > free else "PASS"
        self.report.checks.append(Check("disk", status, f"{text}; {readable_bytes(free)} free"))

    def _memory(self) -> None:
        report, device = self.report, torch.device("cpu")
        peak = peak_memory(device)
        report.peak_memory_mb = peak / 1e6 if peak else None
        text = f"peak {readable_bytes(peak)} of this process" if peak else "not known here"
        status = "PASS"
        if torch.accelerator.is_available() and self.trainer is not None:
            device = self.trainer.device
            used = peak_memory(device)
            report.gpu_memory_mb = used / 1e6
            total = torch.accelerator.get_memory_info(device)[1]
            text = f"peak {readable_bytes(used)} of {readable_bytes(total)} on {device}; {text}"
            if used > NEARLY_FULL * total:
                status, text = "WARN", f"{text}: nearly full"
        report.checks.append(Check("memory", status, text))

    def _speed(self, trainer: Trainer) -> None:
        seen, report, length = self.rehearsal.seen, self.report, self._length
        timed = [s for step, s in seen.seconds.items() if step > LOOKED_INTO]
        seconds = median(timed) if timed else seen.seconds[max(seen.seconds)]
        report.seconds_per_step = seconds
        rate = f", {seen.window / seconds:,.0f} samples a second" if seen.window > 0 else ""
        how = f"median of {len(timed)} steps after {LOOKED_INTO}" if timed else "of a first step"
        detail = f"about {readable_seconds(seconds)} per step{rate} ({how}; an estimate)"
        report.checks.append(Check("speed", "PASS", detail))
        validating = None
        if seen.validation_seconds is not None:
            batches = batches_in(trainer.validation, trainer.max_val_batches)
            if batches is not None and length.validations is not None:
                validating = seen.validation_seconds * batches * length.validations
        if length.steps is not None:
            one = seconds * length.steps + (validating or 0.0)
            report.seconds_for_the_run = one * self.runs
        detail = preflight_checks.duration(seconds, length.steps, validating)
        detail += f"; {self.runs} seeds, one run each" if self.runs > 1 else ""
        report.checks.append(Check("the whole run", "PASS", detail))


def _stage(error: Exception, seen: Seen) -> str:
    """The stage that an error belongs to."""
    if isinstance(error, NonFiniteError):
        return "backward pass" if seen.finite_loss else "forward pass"
    if isinstance(error, MetricError) and seen.stage == "training data":
        return "validation"  # raised when its metrics were judged
    if isinstance(error, DataError) and seen.stage == STAGES[0]:
        return "validation" if str(error).startswith("val_dataloader") else "training data"
    return seen.stage


def cause_of(error: BaseException) -> BaseException:
    """The error in the user's own code that caused one of our errors, or the error itself."""
    cause = error.__cause__
    if isinstance(error, PacelineError) and cause is not None:
        return cause_of(cause)
    return error


def _let_go(error: BaseException) -> None:
    """Clears the frames of an error, which keep loader workers alive."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


def told(error: BaseException) -> str:
    """An error as one line: its message, and the line of the user's code that raised it."""
    cause = cause_of(error)
    if isinstance(cause, PacelineError):
        return mask_credentials(str(cause))
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return mask_credentials(f"{type(cause).__name__}: {last}{origin(cause)}")


def _existing(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


@contextmanager
def _scratch_beside(run_dir: Path) -> Iterator[Path]:
    """A temporary folder on the run folder's disk, so that its space and permissions are tested.

    Raises:
        ConfigError: it cannot be created.
    """
    place = _existing(run_dir.absolute().parent)
    try:
        folder = tempfile.TemporaryDirectory(
            prefix=".preflight-", dir=place, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise ConfigError(f"run.dir: nothing can be written in {place}: {error}") from error
    with folder as name:
        yield Path(name)


def _every(recipe: Recipe) -> str | int:
    """When a recipe validates."""
    setting = recipe.setting("validate_every")
    return setting.every if isinstance(setting, ValidationPolicy) else setting
