"""The arguments with which objects were made, as far as they keep them under the same names.

So `nn.Dropout(0.5)` gives `p`, and a dataset that does `self.scale = scale` gives `scale`: what
changes without a recipe that says so is found.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import math
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from paceline.data.content import digest

# The shapes of weights show them.
_SHOWN_BY_WEIGHTS = {
    *("in_features", "out_features", "in1_features", "in2_features", "in_channels"),
    *("out_channels", "num_embeddings", "embedding_dim", "num_features", "normalized_shape"),
    *("input_size", "hidden_size", "embed_dim", "kdim", "vdim", "num_channels", "bias"),
    *("device", "dtype"),
}
_LONG = 16  # of more numbers a digest is kept
_DEEP = 4
# A model's arguments as they were when it was first seen: placing it changes its modules.
_first_seen: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()
UNKNOWN = object()
"""In the place of an argument that cannot be compared, or is not kept."""


def arguments_of(prefix: str, thing: Any) -> dict[str, Any]:
    """The arguments with which an object was made, as far as it keeps them under their names.

    Args:
        prefix: of the keys.
        thing: the object. Arrays and long lists of a dataset are left out: they are its content.
    """
    if isinstance(thing, partial):
        values = dict(thing.keywords) | {str(i): v for i, v in enumerate(thing.args)}
        return flattened(prefix, values)
    if thing is None or not hasattr(thing, "__dict__") or inspect.isroutine(thing):
        return {}
    names = names_of(type(thing))
    held = {**vars(thing), **getattr(thing, "_buffers", {})}
    held = {name: held[name] for name in names if name in held}
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
        plain: leave objects out.
    """
    keys: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        key = f"{prefix}.{name}"
        flat = _value(value)
        if flat is not UNKNOWN:
            keys[key] = flat
        elif plain or depth >= _DEEP or isinstance(value, torch.nn.Module | torch.Tensor):
            continue
        elif isinstance(value, list | tuple) and len(value) <= _LONG:
            items = {str(i): item for i, item in enumerate(value)}
            keys |= flattened(key, items, depth + 1)
        elif isinstance(value, Mapping) and len(value) <= _LONG:
            keys |= flattened(key, {str(k): v for k, v in value.items()}, depth + 1)
        elif inspect.isroutine(value) or isinstance(value, partial | type):
            keys[key] = kind_of(value)
        elif hasattr(value, "__dict__") and not _is_dataset(value):
            keys[key] = kind_of(value)
            held = {n: vars(value)[n] for n in names_of(type(value)) if n in vars(value)}
            keys |= flattened(key, held, depth + 1)
    return keys


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
        if isinstance(value, torch.Tensor) and value.is_meta:
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
            for name in names_of(cls) - _SHOWN_BY_WEIGHTS:
                value = _value(vars(module).get(name, UNKNOWN))
                if value is not UNKNOWN:
                    found.setdefault(f"{cls.__name__}.{name}", []).append(value)
        _first_seen[model] = {
            key: values[0] if len(set(map(str, values))) == 1 else _value(values)
            for key, values in sorted(found.items())
        }
    return _first_seen[model]


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
