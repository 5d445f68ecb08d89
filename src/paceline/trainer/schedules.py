"""Learning-rate schedules across a resume: what they are made with, and a changed one's place.

torch's schedulers keep their settings in their state, so that loading it would bring the old ones
back in silence. They are compared instead; a change that is accepted puts the new schedule where
it would stand had it run from the start.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from typing import Any

import torch

# What schedulers write into an optimizer's groups.
_SCHEDULED = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "momentum",
    "betas",
    "base_momentum",
    "max_momentum",
)


def schedule_settings(scheduler: Any) -> dict[str, Any]:
    """The plain arguments a scheduler was made with, as far as its state holds them."""
    arguments = set(inspect.signature(type(scheduler).__init__).parameters)
    arguments -= {"optimizer", "last_epoch", "verbose"}
    found: dict[str, Any] = {}
    for key, value in scheduler.state_dict().items():
        name = key.removeprefix("_")
        if name not in arguments:
            continue
        if name == "schedulers":
            for i, inner in enumerate(getattr(scheduler, key)):
                found |= {f"{i}.{k}": v for k, v in schedule_settings(inner).items()}
        elif isinstance(value, Counter):
            found[name] = str(sorted(value.elements()))
        elif isinstance(value, (list, tuple)):
            found[name] = str(list(value))
        elif isinstance(value, (bool, int, float, str, type(None))):
            found[name] = value
    return found


def takes_metric(scheduler: Any) -> bool:
    """Whether a scheduler steps with a metric, so that its course cannot be computed."""
    takes = inspect.signature(scheduler.step).parameters.get("metrics")
    return takes is not None and takes.default is inspect.Parameter.empty


def replayed(schedulers: list[Any], stored: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Brings one optimizer's new schedulers to where stored ones stand.

    Args:
        schedulers: as constructed, and their optimizer with them.
        stored: the state of each in the checkpoint.

    Returns:
        What they then want in each of the optimizer's groups; None if they cannot be replayed.
    """
    if any(takes_metric(s) or s.last_epoch != 0 for s in schedulers):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps in between
        for scheduler, state in zip(schedulers, stored, strict=True):
            for _ in range(state["last_epoch"]):
                scheduler.step()
    groups = schedulers[0].optimizer.param_groups
    return [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]


def load_schedule(scheduler: Any, stored: dict[str, Any], changed: list[str]) -> None:
    """Loads a scheduler's state, but for the settings in `changed`, which stay as they are."""
    kept = {name: vars(scheduler)[name] for name in changed if name in vars(scheduler)}
    scheduler.load_state_dict(stored)
    vars(scheduler).update(kept)


def put(optimizer: torch.optim.Optimizer, wanted: list[dict[str, Any]]) -> None:
    """Writes what `replayed` gave, after the optimizer's state was loaded."""
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)
