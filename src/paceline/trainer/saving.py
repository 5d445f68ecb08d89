"""Saving at a boundary, and going back to what was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline.errors import CheckpointError, ConfigError
from paceline.trainer.base import TrainerBase
from paceline.trainer.names import unique_names
from paceline.trainer.nonfinite import kept_failures
from paceline.trainer.proof import prove_what_is_new
from paceline.trainer.ranks_alike import check_state_alike
from paceline.trainer.resume import window_info
from paceline.trainer.run import Run


def save(trainer: TrainerBase, run: Run, reasons: list[str], *, best: bool) -> None:
    """Hands the state tree to the saver; waits for the disk if this ends the run.

    Args:
        trainer: whose state it is.
        run: between two windows.
        reasons: why, for the manifest; "stop" and "end" end the run.
        best: whether this is the best checkpoint so far.
    """
    saver, progress = run.saver, run.progress
    assert saver is not None
    trainer.optimization.guard.read()
    if run.rewinding:
        return  # a bad step has come to light: back to a checkpoint from before it
    last = bool({"stop", "end"} & set(reasons))
    step = progress.global_step
    here = (step, progress.pending)
    if reasons == ["stop"] and run.saved_at == here and wait_for_saves(run) is None:
        return
    run.placement.share_buffers(trainer.named_models())
    prove_what_is_new(trainer, run)
    tree = trainer.state_dict()
    for hook in run.events.on_save_checkpoint:
        hook(tree)
    _check_alike(trainer, run, tree)
    window = window_info(
        trainer.source, trainer.train_dataloader, trainer.gradient_accumulation_steps
    )
    metrics = dict(progress.metrics)
    info = {"reasons": reasons, "metrics": metrics, "window": window, "run_id": run.id}
    monitor = trainer.metric_monitor
    if monitor is not None and progress.validated_at == step:
        info["score"] = monitor.score(metrics)
    # Rows first, in the same transaction: no checkpoint counts on rows that are not on the disk.
    rows = trainer.recorder.sync
    wait_for_saves(run)  # while the checkpoint before is still there
    if run.world.is_main and run.settings.run_dir is not None:
        saver.failed_step = max(kept_failures(run.settings.run_dir), default=None)
    run.saves_in_flight += 1
    saver.save(tree, step, best=best, synchronous=last, info=info, before=rows)
    run.saved_at = (step, list(progress.pending))
    report(run)


def _check_alike(trainer: TrainerBase, run: Run, tree: Mapping[str, Any]) -> None:
    """Checks that what the user's objects give is the same on every rank."""
    if run.world.size > 1:
        owners = {"callbacks": unique_names(trainer.callbacks), "objects": trainer.named_objects()}
        states = {
            f"{kind}.{name}": (owner, tree[kind][name])
            for kind, named in owners.items()
            for name, owner in named.items()
            if name in tree[kind]
        }
        check_state_alike(run, states)


def report(run: Run) -> None:
    """Fires `on_checkpoint` for what is published, and prints what else the saver reports."""
    if run.saver is None:
        return
    for notice in run.saver.poll():
        run.saves_in_flight -= notice.kind in ("saved", "failed")
        if notice.kind != "saved":
            run.world.say(notice.message)
            continue
        for hook in run.events.on_checkpoint:
            hook(notice.path, notice.step, notice.best)


def wait_for_saves(run: Run) -> CheckpointError | None:
    """Finishes the save in flight and reports it; returns why the latest failed, or None."""
    if run.saver is None:
        return None
    failed = run.saver.wait()
    report(run)
    return failed


def rewind(trainer: TrainerBase, run: Run, boundary: Callable[[], None]) -> None:
    """Goes back to the newest checkpoint, with the bad window on the list of those to skip.

    Args:
        trainer: whose state goes back.
        run: with the step to skip.
        boundary: does what was pending when the checkpoint was saved.

    Raises:
        ConfigError: there is no checkpoint yet, or there are replica groups.
    """
    if run.groups is not None:
        raise ConfigError("going back to a checkpoint does not exist yet with replica groups.")
    saver, step = run.saver, run.rewind_step
    assert saver is not None
    wait_for_saves(run)
    found = saver.newest()
    if found is None:
        raise ConfigError(
            "on_nonfinite='rewind' has no checkpoint to go back to: save one earlier "
            "(CheckpointPolicy(every_steps=...))."
        )
    tree = saver.load(found.path)
    skips = [*run.progress.skips, step]
    trainer.load_state_dict(tree)
    trainer.recorder.load_sinks(tree["rank"])
    run.progress.skips = sorted(set(skips) | set(run.progress.skips))
    run.rewinding = False
    if run.progress.pending:
        boundary()
    trainer.say(f"went back to step {found.step}; step {step + 1} will be skipped.")
    for hook in run.events.on_load_checkpoint:
        hook(tree)
