"""Names -> classes, for recipes (`type: name`) and for the parts the Trainer adds by itself.

The tables below give import paths, so that a class is imported only when it is used and this module
depends on nothing: `KINDS` lists what there are names for, `_SHIPPED` the names that ship with
Paceline. `register` adds a user's own classes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from paceline.errors import ConfigError, nearest

__all__ = ["lookup", "names", "register"]

T = TypeVar("T")

# Kind -> "module:Class", the base class of what is registered; "" for functions. To add a kind, add
# a line.
KINDS: dict[str, str] = {
    "trainer": "paceline.trainer.trainer:Trainer",
    "model": "torch.nn:Module",
    "optimizer": "torch.optim:Optimizer",
    "lr_scheduler": "torch.optim.lr_scheduler:LRScheduler",
    "loss_fn": "torch.nn:Module",
    "dataloader": "torch.utils.data:DataLoader",
    "dataset": "torch.utils.data:Dataset",
    "sampler": "torch.utils.data:Sampler",
    "collate_fn": "",
    "callback": "paceline.trainer.callback:Callback",
    "logger": "paceline.log.sinks:Sink",
    "checkpoint_engine": "paceline.checkpoint.engine:CheckpointEngine",
}

_SHIPPED: dict[str, dict[str, str]] = {
    "trainer": {
        "trainer": "paceline.trainer.trainer:Trainer",
    },
    "callback": {
        "progress": "paceline.callbacks.progress:Progress",
        "averaged_weights": "paceline.callbacks.averaged_weights:AveragedWeights",
        "early_stopping": "paceline.callbacks.early_stopping:EarlyStopping",
        "freeze": "paceline.callbacks.freeze:Freeze",
        "gradient_explosion": "paceline.callbacks.gradient_explosion:GradientExplosion",
        "gradient_monitor": "paceline.callbacks.gradient_monitor:GradientMonitor",
        "learning_rate": "paceline.callbacks.learning_rate:LearningRate",
        "loss_prediction": "paceline.callbacks.loss_prediction:LossPrediction",
        "overfit_detection": "paceline.callbacks.overfit_detection:OverfitDetection",
        "profiler": "paceline.callbacks.profiler:Profiler",
        "schedule_free": "paceline.callbacks.schedule_free:ScheduleFree",
        "swa": "paceline.callbacks.swa:SWA",
        "throughput": "paceline.callbacks.throughput:Throughput",
        "time_limit": "paceline.callbacks.time_limit:TimeLimit",
        "update_ratio": "paceline.callbacks.update_ratio:UpdateRatio",
    },
    "checkpoint_engine": {
        "native": "paceline.checkpoint.native_engine:NativeEngine",
    },
    "lr_scheduler": {
        "warmup_cosine": "paceline.recipe.schedules:WarmupCosine",
    },
    "logger": {
        "jsonl": "paceline.log.sinks:JsonlSink",
        "tensorboard": "paceline.log.tensorboard:TensorBoard",
    },
}
_registered: dict[str, dict[str, Any]] = {}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Makes a class or function known to recipes as `type: name` in slots of `kind`.

    Registering the same class again (a reloaded module, a notebook cell run twice) replaces it.

    Args:
        kind: one of `KINDS`, such as "callback".
        name: as recipes write it.

    Returns:
        A decorator that returns what it is given.

    Raises:
        ConfigError: there is no such kind, or the name is taken by another class.
    """
    _check_kind(kind)

    def add(target: T) -> T:
        held = _registered.get(kind, {}).get(name)
        if held is not None and getattr(held, "__qualname__", None) != getattr(
            target, "__qualname__", None
        ):
            raise ConfigError(f"the {kind} name {name!r} is already registered for {held!r}")
        _registered.setdefault(kind, {})[name] = target
        return target

    return add


def names(kind: str) -> list[str]:
    """Every name that `lookup` knows for `kind`, sorted.

    Raises:
        ConfigError: there is no such kind.
    """
    _check_kind(kind)
    return sorted({*_SHIPPED.get(kind, {}), *_registered.get(kind, {})})


def lookup(kind: str, name: str) -> Any:
    """The class or function registered as `name`.

    Args:
        kind: one of `KINDS`, such as "callback".
        name: as recipes write it.

    Raises:
        ConfigError: no such kind or name; the nearest known one is suggested.
    """
    known = names(kind)
    if name not in known:
        there_is = f" Known: {', '.join(known)}" if known else ""
        raise ConfigError(
            f"no {kind} is registered as {name!r}{nearest(name, known) or '.'}{there_is}"
        )
    if name in _registered.get(kind, {}):
        return _registered[kind][name]
    module, _, attribute = _SHIPPED[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Afterwards the names mean what they meant before."""
    before = {kind: dict(named) for kind, named in _registered.items()}
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"nothing can be registered as {kind!r}{nearest(kind, KINDS) or '.'} "
            f"Kinds: {', '.join(KINDS)}"
        )
