"""Saving at a boundary, and going back to what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.trainer import placement
from paceline.trainer.resume import window_info

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def save(trainer: Trainer, reasons: list[str], *, best: bool) -> None:
    """Hands the state tree to the saver; waits for the disk if this ends the run."""
    saver = trainer.saver
    assert saver is not None
    trainer.optimization.guard.read()
    if trainer._rewinding:
        return  # a bad step has come to light: back to a checkpoint from before it
    last = bool({"stop", "end"} & set(reasons))
    if reasons == ["stop"] and trainer._saved_at == (trainer.global_step, trainer.progress.pending):
        failed = saver.wait()
        if failed is None:
            return
    placement.share_buffers(trainer)
    tree = trainer.state_dict()
    for hook in trainer.events.on_save_checkpoint:
        hook(tree)
    metrics, window = dict(trainer.progress.metrics), window_info(trainer)
    info = {"reasons": reasons, "metrics": metrics, "window": window}
    # Rows first, in the same transaction: no checkpoint counts on rows that are not on the disk.
    rows = trainer.recorder.sync
    step = trainer.global_step
    saver.save(tree, step, best=best, synchronous=last, info=info, before=rows)
    trainer._saved_at = (trainer.global_step, list(trainer.progress.pending))
    tell(trainer)


def tell(trainer: Trainer) -> None:
    """Prints what the saver has to say, except that all is well."""
    if trainer.saver is not None:
        for event in trainer.saver.poll():
            if event.kind != "saved":
                trainer.say(event.message)


def rewind(trainer: Trainer) -> None:
    """Goes back to the newest checkpoint, with the bad window on the list of those to skip.

    Raises:
        ConfigError: there is no checkpoint yet, or there are replica groups.
    """
    if trainer.replica_groups is not None:
        raise ConfigError("going back to a checkpoint does not exist yet with replica groups.")
    saver, step = trainer.saver, trainer._rewind_step
    assert saver is not None
    saver.wait()
    found = saver.newest()
    if found is None:
        raise ConfigError(
            "on_nonfinite='rewind' has no checkpoint to go back to: save one earlier "
            "(CheckpointPolicy(every_steps=...))."
        )
    tree = saver.load(found.path)
    skips = [*trainer.progress.skips, step]
    trainer.load_state_dict(tree)
    trainer.recorder.load_sinks(tree["rank"])
    trainer.progress.skips = sorted(set(skips) | set(trainer.progress.skips))
    trainer._rewinding = False
    if trainer.progress.pending:
        trainer._boundary()
    trainer.say(f"went back to step {found.step}; step {step + 1} will be skipped.")
    for hook in trainer.events.on_load_checkpoint:
        hook(tree)
