"""Trackers: copies of a run's rows in Weights & Biases, MLflow, SwanLab or trackio.

A tracker follows the files of the run folder from a process of its own: training neither waits for
it nor runs any of its code, and what could not be sent is sent later (`paceline sync`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.trackers.tracker import MLflow, SwanLab, Tracker, Trackio, Wandb
else:
    _MODULE = "paceline.trackers.tracker"
    __getattr__, __dir__ = lazily(
        __name__,
        dict.fromkeys(("MLflow", "SwanLab", "Tracker", "Trackio", "Wandb"), _MODULE),
    )

__all__ = ["MLflow", "SwanLab", "Tracker", "Trackio", "Wandb"]
