"""What a run leaves in Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paceline.log.csv_table import lines


@dataclass(frozen=True)
class Result:
    """The outcome of `Trainer.train`.

    Attributes:
        stopped_by: "epochs", "max_steps", "early stop", "pruned", "signal SIGTERM", "time limit" or
            another reason.
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
    _rows: Callable[[], Iterable[Mapping[str, Any]]] = field(
        default=tuple, repr=False, compare=False
    )

    @cached_property
    def history(self) -> dict[str, list[Any]]:
        """All rows of the run as columns by name, with an entry for each step that has a row.

        NaN stands where a column has no value, so that
        `plt.plot(history["step"], history["val/loss"], "o")` draws what there is. Of a run in a
        folder they are those of metrics.jsonl; without one, those of this process, on rank 0.
        """
        table = list(lines(self._rows()))
        names = dict.fromkeys(name for line in table for name in line)
        return {name: [line.get(name, math.nan) for line in table] for name in names}
