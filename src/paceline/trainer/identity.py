"""What a run is: the settings that a resumed run must find unchanged."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import partial
from typing import Any

import torch

from paceline.trainer.base import TrainerBase
from paceline.trainer.run import Run


def identity_of(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """The settings that a resumed run must find unchanged, by dotted key.

    The models' own names and shapes are compared when their weights are loaded.

    Args:
        trainer: with its components and data.
        run: whose models are placed.
    """
    keys: dict[str, Any] = {
        "seed": run.seed,
        "precision": run.placement.computes_in,
        "loss_fn": _kind(trainer.loss_fn),
        "max_grad_norm": trainer.max_grad_norm,
        **{f"loss_fn.{key}": value for key, value in _arguments(trainer.loss_fn).items()},
    }
    for name, value in trainer.source.identity.items():
        keys[f"data.{name}"] = value
    for name, optimizer in trainer.named_optimizers().items():
        keys[f"{name}.class"] = type(optimizer).__name__
        keys |= {f"{name}.{key}": value for key, value in _plain(optimizer.defaults).items()}
        # Some optimizers count in their groups as well.
        arguments = inspect.signature(type(optimizer)).parameters
        for i, group in enumerate(optimizer.param_groups):
            own = {k: v for k, v in group.items() if k in optimizer.defaults and k in arguments}
            if "initial_lr" in group:
                own["lr"] = group["initial_lr"]
            for key, value in _plain(own).items():
                if keys[f"{name}.{key}"] != value:
                    keys[f"{name}.group{i}.{key}"] = value
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        keys[f"{name}.class"] = type(scheduler).__name__
        keys |= {f"{name}.{key}": value for key, value in _schedule_settings(scheduler).items()}
    return keys


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an optimizer's settings that can be compared."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, torch.Tensor):
            value = value.item()
        if isinstance(value, (bool, int, float, str, type(None))):
            found[key] = value
        elif isinstance(value, (tuple, list)):
            found[key] = str(tuple(value))
    return found


def _schedule_settings(scheduler: Any) -> dict[str, Any]:
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
                found |= {f"{i}.{k}": v for k, v in _schedule_settings(inner).items()}
        elif isinstance(value, Counter):
            found[name] = str(sorted(value.elements()))
        elif isinstance(value, (list, tuple)):
            found[name] = str(list(value))
        elif isinstance(value, (bool, int, float, str, type(None))):
            found[name] = value
    return found


def _kind(thing: Any) -> str | None:
    if thing is None:
        return None
    if isinstance(thing, partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _arguments(thing: Any) -> dict[str, Any]:
    """The plain settings of a loss: attributes of a module, keywords of a partial function."""
    if isinstance(thing, partial):
        return _plain(thing.keywords)
    if not isinstance(thing, torch.nn.Module):
        return {}
    own = {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "training"}
    return _plain(own)
