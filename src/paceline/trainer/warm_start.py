"""Warm start: a new run from the weights of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from paceline.checkpoint import CheckpointEngine, engine_class
from paceline.checkpoint.engine import engine_of
from paceline.checkpoint.policy import NATIVE
from paceline.checkpoint.safetensors_file import read_metadata
from paceline.checkpoint.state import load_tensors
from paceline.errors import CheckpointError, some


def load_weights(
    models: Mapping[str, torch.nn.Module], path: Path, say: Callable[[str], None]
) -> None:
    """Loads model weights alone, by name; says what was loaded, missing and unexpected.

    Args:
        models: by name, which get them.
        path: a native checkpoint, a run's folder, or an exported safetensors file.
        say: prints a line.

    Raises:
        CheckpointError: nothing there, damaged, or no name fits.
        ConfigError: nothing here has registered the engine that wrote the run's checkpoints.
    """
    source, stored = _weights_at(models, path, say)
    loaded, missing, unexpected = 0, [], []
    for name, model in models.items():
        here, there = model.state_dict(keep_vars=True), stored.get(name, {})
        fits = {k: v for k, v in there.items() if k in here and _shape(v) == _shape(here[k])}
        loaded += len(fits)
        tied = {
            id(here[k]) for k in fits if _shape(here[k]) is not None
        }  # an exported file has tied weights under one name
        missing += [f"{name}.{k}" for k in here if k not in fits and id(here[k]) not in tied]
        unexpected += [f"{name}.{k}" for k in there if k not in fits]
        load_tensors(model, fits)
    if not loaded:
        raise CheckpointError(
            f"init_from={path}: no tensor there fits this trainer's models: it has "
            f"{some(unexpected, 4)}, and they have {some(missing, 4)}. Give weights whose names "
            "and shapes are the models'."
        )
    say(
        f"weights from {source}: {loaded} tensors loaded; missing: {', '.join(missing) or 'none'}; "
        f"unexpected: {', '.join(unexpected) or 'none'}."
    )


def _shape(value: Any) -> Any:
    """The shape of a tensor; None for what else a module may keep."""
    return value.shape if isinstance(value, torch.Tensor) else None


def _weights_at(
    models: Mapping[str, torch.nn.Module], path: Path, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """Where the weights are found, and the models' states by name."""
    if path.is_file():
        named = read_metadata(path).get("model")
        name = named if named is not None and named in models else next(iter(models))
        return path, {name: load_file(path)}
    engine = engine_of(path) or engine_class(NATIVE)
    checkpoint = _checkpoint_in(path, engine, say)
    return checkpoint, engine.load_tree(checkpoint, ("models",))["models"]


def _checkpoint_in(path: Path, engine: type[CheckpointEngine], say: Callable[[str], None]) -> Path:
    """A native checkpoint, or the newest intact one of a run's folder; nothing is moved there."""
    if (path / "manifest.json").exists():
        engine.verify(path)
        return path
    found, broken = engine.scan(path / "checkpoints")
    for _, error in broken:
        say(f"init_from: {error}; another checkpoint is looked for.")
    for checkpoint in reversed(found):
        try:
            engine.verify(checkpoint.path)
        except CheckpointError as error:
            say(f"init_from: {error}; an older checkpoint is looked for.")
        else:
            return checkpoint.path
    raise CheckpointError(
        f"init_from={path} is neither a checkpoint nor a run with one nor a safetensors file."
    )
