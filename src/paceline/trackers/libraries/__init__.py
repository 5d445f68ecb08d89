"""One file for each library. They are imported in the follower's process alone."""

from __future__ import annotations

import importlib

from paceline.trackers.adapter import Adapter

_WHERE = {
    "mlflow": "paceline.trackers.libraries.mlflow_runs:MlflowRun",
    "swanlab": "paceline.trackers.libraries.swanlab_runs:SwanlabRun",
    "trackio": "paceline.trackers.libraries.trackio_runs:TrackioRun",
    "wandb": "paceline.trackers.libraries.wandb_runs:WandbRun",
}


def adapter_class(kind: str) -> type[Adapter]:
    """The adapter of a tracker.

    Args:
        kind: the tracker's name, or "module:Class" of one of a user's own.
    """
    module, _, name = _WHERE.get(kind, kind).partition(":")
    return getattr(importlib.import_module(module), name)
