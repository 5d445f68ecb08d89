"""What training changes on objects beside their state: rates, counters, switches.

A hook may set `dropout.p` or `trainer.max_grad_norm`, a model may count its calls. torch saves none
of it, so that a run resumed in mid-epoch would continue with the values of the start. Numbers,
strings and None of models and the loss come back, on each rank its own. Of an object that has
changed anything else as well (a cache, a list, a hook) nothing does, since its parts would not fit
each other: the plan names it, and what has changed on a callback or the Trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from paceline.trainer.base import TrainerBase
from paceline.trainer.callback import Callback
from paceline.trainer.names import unique_names
from paceline.trainer.settings import READ_ALWAYS

_SETTINGS = [name for name in READ_ALWAYS if name != "metric_monitor"]
_PLAIN = (bool, int, float, str, type(None))
_OF_EVERY_MODULE = {*vars(torch.nn.Module()), "training", "train"}
_MOST = 100  # tensors of a container that are looked at

OF_THE_RUN = "the run"  # the name under which the Trainer's settings are kept

Seen = dict[str, dict[str, Any]]


def attributes_of(trainer: TrainerBase) -> Seen:
    """The attributes of a run's objects, by object and name, as they are now."""
    return {name: seen for name, _, seen, _ in _holders(trainer)}


def changed_since(start: Seen, trainer: TrainerBase) -> tuple[Seen, list[str]]:
    """What differs from a run's start.

    Args:
        start: what `attributes_of` gave then.
        trainer: whose objects they are.

    Returns:
        The values then and now of what can be given back, by object and attribute; and what cannot.
    """
    changed: Seen = {}
    lost: list[str] = []
    for name, _, now, given_back in _holders(trainer):
        before = start.get(name, now)
        differing = [key for key in now if key not in before or before[key] != now[key]]
        if not differing:
            continue
        if given_back and all(isinstance(now[key], _PLAIN) for key in differing):
            changed[name] = {key: [before.get(key), now[key]] for key in differing}
        else:
            lost.append(f"{', '.join(differing)} of {name}")
    return changed, lost


def give_back(start: Seen, trainer: TrainerBase, changed: Mapping[str, Any]) -> None:
    """Sets what a run had changed, unless it is another value at this run's start.

    What this run itself has changed since, and was not changed then, is as at its start again.

    Args:
        start: what `attributes_of` gave at this run's start.
        trainer: whose objects they are.
        changed: as `changed_since` gave it.
    """
    since, _ = changed_since(start, trainer)
    for name, thing, _, _ in _holders(trainer):
        at_start = start.get(name, {})
        for key in since.get(name, {}).keys() & at_start.keys() - changed.get(name, {}).keys():
            setattr(thing, key, at_start[key])
        for key, (before, now) in changed.get(name, {}).items():
            if at_start.get(key) == before:
                setattr(thing, key, now)


def _holders(trainer: TrainerBase) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Each object's name, the object, its attributes, and whether they are given back."""
    yield OF_THE_RUN, trainer, {name: getattr(trainer, name) for name in _SETTINGS}, True
    known = TrainerBase.__annotations__
    own = {k: v for k, v in vars(trainer).items() if k not in known and isinstance(v, _PLAIN)}
    own = {key: value for key, value in own.items() if key[0] != "_"}
    own["loss_fn"] = _mark(trainer.loss_fn)
    yield "trainer", trainer, own, False
    loss_fn, models = trainer.loss_fn, dict(trainer.named_models())
    if isinstance(loss_fn, torch.nn.Module):
        models = {"loss_fn": loss_fn, **models}
    elif hasattr(loss_fn, "__dict__") and not inspect.isroutine(loss_fn):
        yield "loss_fn", loss_fn, _marked(vars(loss_fn)), True
    for name, model in models.items():
        for path, module in model.named_modules():
            yield f"{name}.{path}" if path else name, module, _of_module(module), True
    for name, callback in unique_names(trainer.callbacks).items():
        ours = type(callback).__module__.startswith("paceline.")
        if not ours and type(callback).state_dict is Callback.state_dict:
            yield f"callbacks.{name}", callback, _marked(vars(callback)), False


def _of_module(module: torch.nn.Module) -> dict[str, Any]:
    classes = (cls.__module__ for cls in type(module).__mro__)  # FSDP2 makes one of its own
    private = not next(m for m in classes if not m.startswith("torch.distributed.")).startswith(
        "torch."
    )
    held = {
        key: value
        for key, value in vars(module).items()
        if key not in _OF_EVERY_MODULE and (private or key[0] != "_")
    }
    held |= {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    held["forward hooks"] = [*module._forward_hooks, *module._forward_pre_hooks]
    return _marked(held)


def _marked(held: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _mark(value) for key, value in held.items()}


def _mark(value: Any) -> Any:
    """A plain value; of any other what shows that it has changed."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, torch.nn.Module):
        return id(value), [_mark(p) for p in value.parameters()]
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.size <= _MOST else b""
    if isinstance(value, list | tuple | dict | set):
        items = list(value.values() if isinstance(value, dict) else value)[:_MOST]
        return len(value), [_mark(each) for each in items if isinstance(each, torch.Tensor)]
    return (id(value),)
