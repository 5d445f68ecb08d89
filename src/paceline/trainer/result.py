"""What a run leaves in Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """The outcome of `Trainer.train`.

    Attributes:
        stopped_by: "epochs", "max_steps", "early stop", "signal SIGTERM", "time limit", ...
        complete: whether training is over; if not, the same call resumes from `checkpoint`.
        final_val_loss: "val/loss" of the last validation, None if there is none.
        metrics: all metrics of the last validation.
        best: the best value of the monitored metric, None without a monitor.
        global_step, epoch: optimizer steps and epochs done.
        checkpoint: the newest checkpoint's folder, None if nothing is written.
    """

    stopped_by: str
    complete: bool
    final_val_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    global_step: int = 0
    epoch: int = 0
    checkpoint: Path | None = None
