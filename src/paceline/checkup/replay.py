"""Takes the step of a run that was not finite once more, and names where that began."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.checkpoint.engine import Checkpoint, engine_of
from paceline.checkpoint.policy import NATIVE
from paceline.checkup.nonfinite_origin import Seen, StepIsOver, StepWatch
from paceline.errors import CheckpointError, ConfigError, NonFiniteError, PacelineError, counted
from paceline.log.files import shown
from paceline.log.run_record import read_run
from paceline.recipe.record import RecordRecipe
from paceline.trainer.callback import Callback
from paceline.trainer.nonfinite import kept_failures
from paceline.trainer.resume import kept_global_batch_size
from paceline.trainer.settings import Resume
from paceline.trainer.trainer import Trainer
from paceline.world.environment import refuse_replica_groups
from paceline.world.meeting import agreed_text


@dataclass(frozen=True)
class Replay:
    """What came of a step that was taken once more.

    Attributes:
        run_dir: of the run.
        step: that was not finite, from 1.
        checkpoint: from whose weights it was replayed; None if that was the start of the run.
        from_step: the optimizer steps that these had done.
        ranks: what each rank has seen.
        then_on: the ranks of the run then.
    """

    run_dir: Path
    step: int
    checkpoint: Path | None
    from_step: int
    ranks: tuple[Seen, ...]
    then_on: int

    @property
    def reproduced(self) -> bool:
        """Whether the step is not finite again."""
        return any(seen.is_bad for seen in self.ranks)

    def lines(self) -> list[str]:
        """The report, line by line."""
        count = self.step - 1 - self.from_step
        between = f", after {counted(count, 'step')} trained again" if count else ""
        whence = "the start of the run" if self.checkpoint is None else self.checkpoint.name
        lines = [f"step {self.step} of {shown(self.run_dir)}, from {whence}{between}:"]
        if len(self.ranks) != self.then_on:
            lines.append(
                f"  the run had {counted(self.then_on, 'rank')}, and this {len(self.ranks)}: only "
                f"with --nproc {self.then_on} are its numbers exactly the same."
            )
        if not self.reproduced:
            lines.append(
                "  it is finite this time: with these settings the failure does not occur again."
            )
            return lines
        for seen in self.ranks:
            lines += _lines_of(seen)
        if not any(seen.origin for seen in self.ranks):
            lines.append(
                "  no operation made it of finite numbers: what came in was not finite, or a norm "
                "or a sum over ranks overflowed."
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _lines_of(seen: Seen) -> list[str]:
    """What one rank has seen; nothing if it only got another's NaN with the gradients."""
    lines = [f"  it first became non-finite {seen.origin}"] if seen.origin else []
    lines += [f"  not finite to begin with: {name}" for name in (*seen.weights, *seen.inputs)]
    if seen.losses:
        batch_idx, value = next(iter(seen.losses.items()))
        what = f"loss {value} of batch {batch_idx}"
    elif lines:
        what = f"the loss is finite, the gradient of {seen.gradient} is not"
    else:
        return []
    return [*lines, f"  rank {seen.rank}: {what}; samples {list(seen.samples)}"]


def replay_failure(trainer: Trainer, run_dir: Path | str) -> Replay:
    """Takes the last step of a run that was not finite once more, and finds where that began.

    The run is resumed in a temporary folder from its newest checkpoint before that step, or
    started, and trained up to the step as it was then, since a resume is exact. The step itself
    is watched: compiled code runs eagerly in it, and each result is looked at. Nothing is
    written to the run's folder, and loggers get no rows.

    Args:
        trainer: made as for the run, and not trained yet. It is of no use afterwards.
        run_dir: the run's folder.

    Raises:
        ConfigError: no step of the run was kept as not finite, or the trainer's settings are not
            the run's.
        PacelineError: the run fails or ends before the step.
    """
    refuse_replica_groups("`replay_failure` does")
    run_dir = Path(run_dir).absolute()
    step = last_failure(run_dir)
    record = _record(run_dir)
    found = newest_before(run_dir, step)
    count = step - 1 - (0 if found is None else found.step)
    trainer.say(
        f"replays step {step} of {shown(run_dir)}, after {counted(count, 'step')} of training from "
        f"{'the start' if found is None else found.path.name}."
    )
    rewinds = trainer.on_nonfinite == "rewind"
    skips = [n - 1 for n in kept_failures(run_dir) if rewinds and n < step]
    watch = StepWatch(step, run_dir, skips)
    with trained_again(trainer, run_dir, found, watch):
        try:
            trainer.fit(seed=int(record.get("seed") or 0))
        except StepIsOver:
            pass
        except NonFiniteError as error:
            if not watch.ranks:
                raise error
        if not watch.ranks:
            raise PacelineError(
                f"the replay ended before step {step}, at step {trainer.global_step} "
                f"({trainer.result.stopped_by}): the settings are not those of the run."
            )
    return Replay(
        run_dir,
        step,
        None if found is None else found.path,
        0 if found is None else found.step,
        tuple(watch.ranks),
        int(record.get("world_size") or 1),
    )


@contextmanager
def trained_again(
    trainer: Trainer, run_dir: Path, found: Checkpoint | None, watch: Callback
) -> Iterator[Path]:
    """Within it a trainer resumes a run from a checkpoint in a temporary folder.

    Nothing is written to the run's folder, and loggers get no rows.

    Args:
        trainer: made as for the run. It is of no use afterwards.
        run_dir: the run's folder.
        found: the checkpoint; None to start anew.
        watch: a callback that ends the training.
    """
    with _scratch(run_dir, removes=trainer.world.local_rank == 0) as scratch:
        _prepare(trainer, run_dir, scratch, found, watch)
        yield scratch


def last_failure(run_dir: Path) -> int:
    """The last step of a run that was kept as not finite.

    Args:
        run_dir: the run's folder.

    Raises:
        ConfigError: there is none.
    """
    if failures := kept_failures(run_dir):
        return max(failures)
    record = _record(run_dir)
    ended = f"; it is {record['status']} ({record['stopped_by']})" if record else ""
    raise ConfigError(
        f"{shown(run_dir)} has no failure to replay: a run whose loss or gradient norm is not "
        f"finite keeps nonfinite_step_N_rank_R in its folder{ended}."
    )


def seed_of(run_dir: Path) -> int | None:
    """The seed of a run, if its record says it.

    Args:
        run_dir: the run's folder.
    """
    return _record(run_dir).get("seed")


def _record(run_dir: Path) -> dict[str, Any]:
    try:
        return read_run(run_dir)
    except (OSError, ValueError):
        return {}


def newest_before(run_dir: Path, step: int) -> Checkpoint | None:
    """The newest intact checkpoint from which a step is still to come; nothing is moved.

    Args:
        run_dir: the run's folder.
        step: of the run, from 1.
    """
    engine = engine_of(run_dir)
    for checkpoint in reversed(engine.scan(run_dir / "checkpoints")[0] if engine else []):
        if checkpoint.step < step:
            try:
                return engine.verify(checkpoint.path) if engine else None
            except CheckpointError:
                continue
    return None


def _prepare(
    trainer: Trainer, run_dir: Path, scratch: Path, found: Checkpoint | None, watch: Callback
) -> None:
    """Has a trainer resume the run in a temporary folder, where nothing is kept."""
    if trainer.global_batch_size is None:
        size = kept_global_batch_size(
            run_dir, Resume(), trainer.train_dataloader, trainer.gradient_accumulation_steps
        )
        if size is not None:  # from which the accumulation follows
            trainer.global_batch_size, trainer.gradient_accumulation_steps = size, 1
    for callback in trainer.callbacks:
        if isinstance(callback, RecordRecipe):
            callback.run_dir = scratch / "run"
    trainer.callbacks.append(watch)
    trainer.loggers, trainer.show_progress = [], False
    trainer.run_dir = scratch / "run"
    if found is not None:
        copied = scratch / "checkpoint" / found.path.name
        _show_at(found.path, copied)
        trainer.resume = replace(trainer.resume, mode=str(copied))
    if trainer.on_nonfinite != "skip":  # which may have passed over steps before this one
        trainer.on_nonfinite = "raise"
    policy = trainer.checkpoint_policy
    if policy is not None:  # of another engine it says which reads the checkpoint
        no_more = replace(policy, every_epochs=None, every_steps=None, save_best=False)
        trainer.checkpoint_policy = None if policy.engine == NATIVE else no_more


@contextmanager
def _scratch(run_dir: Path, *, removes: bool) -> Iterator[Path]:
    """A temporary folder, the same on every rank: beside the run's, so that files may be linked."""
    try:
        own = tempfile.mkdtemp(prefix=".replay-", dir=run_dir.parent)
    except OSError:  # of a run that is only to be read
        own = tempfile.mkdtemp(prefix="paceline-replay-")
    agreed = Path(agreed_text(f"replay of {run_dir}", own))
    if agreed != Path(own):
        os.rmdir(own)
    try:
        agreed.mkdir(mode=0o700, exist_ok=True)  # on another machine
        yield agreed
    finally:
        if removes:
            shutil.rmtree(agreed, ignore_errors=True)


def _show_at(path: Path, to: Path) -> None:
    """Shows a checkpoint at another place: a run's own cannot be resumed in another folder.

    Its files are hard links where the file system has them, and copies elsewhere.
    """
    to.parent.mkdir(exist_ok=True)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        target = to / file.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except FileExistsError:  # another rank was first
            pass
        except OSError:
            shutil.copy2(file, target)
