"""The arguments with which objects were made, as far as they keep them under the same names.

So `nn.Dropout(0.5)` gives `p`, and a dataset that does `self.scale = scale`, or `self._scale`,
gives `scale`: what changes without a recipe that says so is found. A function gives what it has
taken from around its definition.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import inspect
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import PurePath
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from paceline.data.content import digest
from paceline.trainer.abstract import AbstractTrainer
from paceline.trainer.callback import Callback

# The shapes of weights show them.
_SHOWN_BY_WEIGHTS = {
    *("in_features", "out_features", "in1_features", "in2_features", "in_channels"),
    *("out_channels", "num_embeddings", "embedding_dim", "num_features", "normalized_shape"),
    *("input_size", "hidden_size", "embed_dim", "kdim", "vdim", "num_channels", "bias"),
    *("device", "dtype"),
}
# What every rank, or every start, may have its own of.
_FREE = {
    *("num_replicas", "rank", "local_rank", "world_size", "num_shards", "shard", "shard_id"),
    *("epochs", "max_epochs", "num_epochs", "n_epochs", "num_train_epochs", "max_steps"),
    *("device", "devices", "num_workers", "workers", "run_dir", "output_dir", "out_dir"),
    *("save_dir", "log_dir", "exp_dir", "checkpoint_dir", "resume", "run_name", "exp_name"),
    *("log_every", "log_interval", "save_every", "save_interval", "eval_every", "eval_interval"),
    *("verbose", "debug", "progress", "compile"),
}
# Words of a command line (`argparse.Namespace`), which say everything about a run: these may
# change as well.
_OF_COMMANDS = {
    *("command", "config", "config_file", "resume_from", "resume_from_checkpoint", "ckpt", "auto"),
    *("checkpoint", "checkpoint_path", "ckpt_path", "ckpt_dir", "results_dir", "logdir", "out"),
    *("nproc", "num_gpus", "gpu", "gpus", "cpu", "port", "master_port", "master_addr", "backend"),
    *("dist_url", "nodes", "quiet", "log_level", "dry_run", "tensorboard", "wandb"),
    *("wandb_project", "wandb_name", "project", "entity", "tag", "tags", "notes", "test"),
    *("eval_only", "evaluate"),
    *("print_freq", "save_freq", "eval_freq", "keep", "patience", "time_limit", "seed"),
}
# What has arguments that are compared elsewhere, or may change: not looked into wherever it is met.
_APART = (AbstractTrainer, Callback, torch.nn.Module, torch.utils.data.Dataset)
_LONG = 16  # of more numbers a digest is kept
_DEEP = 4
# A model's arguments as they were when it was first seen: placing it changes its modules.
_first_seen: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()
_first_off: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()
UNKNOWN = object()
"""In the place of an argument that cannot be compared, or is not kept."""


def arguments_of(prefix: str, thing: Any) -> dict[str, Any]:
    """The arguments with which an object was made, as far as it keeps them under their names.

    Args:
        prefix: of the keys.
        thing: the object. Arrays and long lists of a dataset are left out: they are its content.
    """
    if inspect.isroutine(thing) or isinstance(thing, partial):
        return flattened(prefix, _taken_by(thing), plain=not isinstance(thing, partial))
    if thing is None or not hasattr(thing, "__dict__"):
        return {}
    held = kept_by(thing, getattr(thing, "_buffers", {}))
    if _is_dataset(thing):
        held = {name: value for name, value in held.items() if not _is_bulk(value)}
    return flattened(prefix, held)


def flattened(
    prefix: str, values: Mapping[str, Any], depth: int = 0, *, plain: bool = False
) -> dict[str, Any]:
    """Values by dotted key; objects in them give their own arguments.

    Args:
        prefix: of the keys.
        values: by name.
        depth: of the objects around them.
        plain: leave objects out, but for those that only hold settings.
    """
    keys: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        key = f"{prefix}.{name}"
        flat = _value(value)
        if flat is not UNKNOWN:
            keys[key] = flat
        elif depth >= _DEEP or isinstance(value, (*_APART, torch.Tensor)):
            continue
        elif isinstance(value, list | tuple) and len(value) <= _LONG:
            items = {str(i): item for i, item in enumerate(value)}
            keys |= flattened(key, items, depth + 1, plain=plain)
        elif isinstance(value, Mapping) and len(value) <= _LONG**2:
            items = {str(k): v for k, v in value.items() if k not in _FREE}
            keys |= flattened(key, items, depth + 1, plain=plain)
        elif inspect.isroutine(value) or isinstance(value, partial | type):
            keys[key] = kind_of(value)
            if not isinstance(value, type):
                keys |= flattened(key, _taken_by(value), depth + 1, plain=True)
        elif _holds_settings(value):
            free = _FREE | _OF_COMMANDS if isinstance(value, Namespace) else _FREE
            held = {k: v for k, v in vars(value).items() if k not in free}
            keys |= flattened(key, held, depth + 1, plain=plain)
        elif hasattr(value, "__dict__") and not plain:
            keys[key] = kind_of(value)
            keys |= flattened(key, kept_by(value), depth + 1)
    return keys


def _holds_settings(value: Any) -> bool:
    """Whether an object is nothing but its attributes: a configuration.

    Paceline's own objects, such as a layout, are left out.
    """
    return (
        type(value) is SimpleNamespace
        or isinstance(value, Namespace)
        or (
            hasattr(value, "__dict__")
            and not type(value).__module__.startswith("paceline.")
            and (is_dataclass(value) or hasattr(type(value), "model_fields"))  # as pydantic's have
        )
    )


def kept_by(thing: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments that an object keeps, by their names.

    Args:
        thing: the object.
        more: what it keeps elsewhere than in its attributes.
    """
    held = {**vars(thing), **(more or {})}
    if isinstance(thing, torch.nn.Module):
        held = {key: value for key, value in held.items() if key not in _OF_EVERY_MODULE}
    found: dict[str, Any] = {}
    for name in names_of(type(thing)) - _FREE:
        for key in (name, f"_{name}"):
            if key in held:
                found.setdefault(name, held[key])
    return found


_OF_EVERY_MODULE = vars(torch.nn.Module()).keys()


def _taken_by(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function has from around it: of a partial its arguments, of a closure its variables.

    Defaults are among it: `lambda step, n=n: ...` takes `n` by one. Of a bound method it is what
    its owner keeps, unless that is compared by itself, or holds data.
    """
    if isinstance(function, partial):
        given = {str(i): value for i, value in enumerate(function.args)} | dict(function.keywords)
        return _taken_by(function.func) | given
    owner = getattr(function, "__self__", None)
    apart = isinstance(owner, (*_APART, ModuleType)) or hasattr(type(owner), "__getitem__")
    found = kept_by(owner) if hasattr(owner, "__dict__") and not apart else {}
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    for name, cell in zip(
        getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False
    ):
        with contextlib.suppress(ValueError):  # it has no value yet
            found[name] = cell.cell_contents
    if code is not None:
        defaults = getattr(function, "__defaults__", None) or ()
        names = code.co_varnames[: code.co_argcount]
        found |= zip(names[len(names) - len(defaults) :], defaults, strict=True)
        found |= getattr(function, "__kwdefaults__", None) or {}
    return {name: value for name, value in found.items() if name not in _FREE}


def _is_dataset(thing: Any) -> bool:
    return isinstance(thing, torch.utils.data.Dataset)


def _is_bulk(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return True
    return isinstance(value, list | tuple) and (len(value) > _LONG or any(map(_is_bulk, value)))


def _value(value: Any) -> Any:
    """An argument as a checkpoint keeps it; of many numbers a digest."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, PurePath | torch.dtype | np.dtype | np.generic):
        return str(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        if isinstance(value, torch.Tensor) and (value.is_meta or value.requires_grad):
            return UNKNOWN
        return str(value.tolist()) if _count(value) <= _LONG else _short(digest(value))
    if isinstance(value, list | tuple | range | set | frozenset):
        if isinstance(value, range):
            return str(value)
        items = [_value(item) for item in value]
        if any(item is UNKNOWN for item in items):
            return UNKNOWN
        if isinstance(value, set | frozenset):
            items.sort(key=str)
        return str(items) if len(items) <= _LONG else _short(_hash(str(items)))
    return UNKNOWN


def _count(value: torch.Tensor | np.ndarray) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else value.size


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(text: str) -> str:
    return f"sha256 {text[:16]}"


def names_of(cls: type) -> set[str]:
    """The names of the arguments that a class's constructors take."""
    return {name for owner in cls.__mro__ for name in parameters_of(owner)}


def parameters_of(cls: type) -> set[str]:
    """The names of the arguments that a class's own constructor takes."""
    init = vars(cls).get("__init__")
    if not inspect.isfunction(init):
        return set()
    return set(inspect.signature(init).parameters) - {"self"}


def arguments_in_model(model: torch.nn.Module) -> dict[str, Any]:
    """A model's modules, and the arguments that they keep, by class and name, in their order."""
    if model not in _first_seen:
        found: dict[str, list[Any]] = {}
        for module in model.modules():
            cls = type(module)
            found.setdefault("modules", []).append(cls.__name__)
            held = {k: v for k, v in kept_by(module).items() if k not in _SHOWN_BY_WEIGHTS}
            for key, value in flattened(cls.__name__, held, plain=True).items():
                found.setdefault(key, []).append(value)
        _first_seen[model] = {
            key: values[0] if len(set(map(str, values))) == 1 else _value(values)
            for key, values in sorted(found.items())
        }
    return _first_seen[model]


def switched_off(model: torch.nn.Module) -> dict[str, Any]:
    """The parameters that take no gradients, and the modules in eval mode, as a model was given."""
    if model not in _first_off:
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        in_eval = [name or "." for name, module in model.named_modules() if not module.training]
        _first_off[model] = {"frozen": _value(frozen), "eval": _value(in_eval)}
    return _first_off[model]


def kind_of(thing: Any) -> str | None:
    """The full name of a function, or of an object's class; None for None."""
    if thing is None:
        return None
    if isinstance(thing, partial):
        thing = thing.func
    # FSDP2 makes a class of its own for what it shards.
    classes = (c for c in type(thing).__mro__ if not c.__module__.startswith("torch.distributed."))
    named = thing if hasattr(thing, "__qualname__") else next(classes)
    return f"{named.__module__}.{named.__qualname__}"
