"""Export: a checkpoint's weights as plain safetensors files, under the model's own names.

`model.load_state_dict(safetensors.torch.load_file(path))` loads them. Weights that are tied (one
tensor under several names) follow safetensors' own rule: the file holds the tensor once, under the
alphabetically first of its names, and its metadata gives that name for each of the others;
`safetensors.torch.load_model(model, path)` restores the ties.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from paceline.checkpoint import publication
from paceline.checkpoint.codec import DTYPES
from paceline.checkpoint.engine import Checkpoint, recorded_engine
from paceline.checkpoint.files import Disk
from paceline.checkpoint.json_file import read_json
from paceline.checkpoint.native_engine import load_tree
from paceline.checkpoint.policy import NATIVE
from paceline.checkpoint.ranks import describe
from paceline.checkpoint.safetensors_file import Part, header_of, read_header, write_stream
from paceline.errors import CheckpointError, ConfigError, nearest

Weights = Literal["auto", "live", "averaged"]
"""Which weights of a checkpoint.

"live" are the trained ones, "averaged" those that `AveragedWeights`, `SWA` or `ScheduleFree` kept,
and "auto" the weights that the run validated with: the averaged ones if a callback swapped them in.
"""

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WIDE = (torch.float64, *EXPORT_DTYPES.values())
_FILE_NAME = re.compile(r"\w[\w.-]*")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Exported:
    """One file written.

    Attributes:
        path: the file.
        model: the model's name in the trainer.
        weights: "live" or "averaged".
        tensors, bytes: the number of tensors, and the file's size.
        checkpoint: where the weights come from.
    """

    path: Path
    model: str
    weights: str
    tensors: int
    bytes: int
    checkpoint: Checkpoint


def export(
    source: Path | str,
    *,
    to: Path | str | None = None,
    weights: Weights = "auto",
    checkpoint: str = "latest",
    model: str | None = None,
    dtype: str | None = None,
) -> list[Exported]:
    """Writes the weights of a checkpoint, one safetensors file per model.

    The checkpoint is verified first, and each file is written atomically. Nothing that the run
    folder names is imported.

    Args:
        source: a run folder, or a checkpoint in it.
        to: a file ending in `.safetensors`, or a folder; by default the run's `exports` folder.
        weights: "auto" for the weights that the run validated with, "live" for the trained ones,
            "averaged" for those that `AveragedWeights`, `SWA` or `ScheduleFree` kept.
        checkpoint: in a run folder, "latest", "best" or a name such as "step_00000120".
        model: the name of one of several models; None for all.
        dtype: "fp32", "bf16" or "fp16" for the floating-point tensors; None keeps their own.

    Returns:
        The files written.

    Raises:
        ConfigError: an argument is invalid, or the run's checkpoint engine is not the native one.
        CheckpointError: there is no such checkpoint, it is damaged (the message names the intact
            ones) or has no averaged weights, a value is out of the range of `dtype`, or a file
            cannot be written.
    """
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(EXPORT_DTYPES)}.")
    found = find_checkpoint(source, checkpoint)
    weights = chosen_weights(found, weights)
    models = read_weights(found, weights, None if dtype is None else EXPORT_DTYPES[dtype])
    if model is not None:
        if model not in models:
            known = ", ".join(models)
            raise ConfigError(
                f"no model {model!r} there{nearest(model, models) or '.'} It has: {known}."
            )
        models = {model: models[model]}
    elif len(full := {name: tensors for name, tensors in models.items() if tensors}) > 0:
        models = full  # a metric that is an attribute of the trainer has nothing to export
    suffixes = [found.path.name, *(["averaged"] if weights == "averaged" else [])]
    suffixes += [dtype] if dtype else []
    paths = _targets(found, to, list(models), "_".join(suffixes))
    return [
        _write(paths[name], tensors, found, {"model": name, "weights": weights})
        for name, tensors in models.items()
    ]


def find_checkpoint(source: Path | str, which: str = "latest") -> Checkpoint:
    """Finds a checkpoint and verifies all of it. Nothing is moved or changed.

    Args:
        source: a run folder, or a checkpoint in it.
        which: in a run folder, "latest", "best" or a checkpoint's name.

    Raises:
        ConfigError: there is no such checkpoint, or it is not one of the native engine.
        CheckpointError: it is damaged; the message names the intact ones.
    """
    path = Path(source)
    for run in (path, path.parent.parent):
        if (engine := recorded_engine(run)) not in (None, NATIVE):
            raise ConfigError(
                f"{run}: its checkpoints were written by the checkpoint engine {engine!r}. Only "
                f"{NATIVE!r} ones can be read here, without importing an engine's code: in a "
                f"program that has registered it, engine_class({engine!r}).load_tree(path) reads "
                "them."
            )
    if (path / publication.MANIFEST).is_file():
        if which not in ("latest", path.name):
            raise ConfigError(f"{path} is one checkpoint; to choose {which!r}, name the run.")
        return _intact(path, path.parent)
    folder = path / "checkpoints"
    found, broken = publication.scan(folder)
    names = [c.path.name for c in found] + [p.name for p, _ in broken]
    if not names:
        raise ConfigError(_none_in(path))
    if which == "latest":
        name = max(names) if broken else found[-1].path.name
    elif which == "best":
        best = [c.path.name for c in found if c.best]
        if not best:
            raise ConfigError(
                f"{path} has no best checkpoint: nothing was monitored (metric_monitor=...), or "
                f"CheckpointPolicy(save_best=False). There is: {', '.join(sorted(names))}."
            )
        name = best[-1]
    else:
        name = which
        if name not in names:
            raise ConfigError(f"{path} has no checkpoint {which!r}; it has: {', '.join(names)}.")
    return _intact(folder / name, folder)


def _none_in(path: Path) -> str:
    if not path.is_dir():
        return f"{path} does not exist: name a run, or a checkpoint."
    runs = ", ".join(sorted(folder.parent.name for folder in path.glob("*/checkpoints")))
    hint = f"it holds runs, name one of them: {runs}" if runs else "name a run that has saved one"
    return f"{path} holds no checkpoint; {hint}."


def check_weights(weights: str) -> None:
    """Checks a choice of weights.

    Args:
        weights: the choice.

    Raises:
        ConfigError: `weights` is not one of `Weights`.
    """
    if weights not in get_args(Weights):
        raise ConfigError(
            f"weights={weights!r}: choose one of {', '.join(map(repr, get_args(Weights)))}."
        )


def chosen_weights(found: Checkpoint, weights: Weights) -> Literal["live", "averaged"]:
    """ "live" or "averaged", also where "auto" was asked for.

    Args:
        found: an intact checkpoint.
        weights: which of its weights are wanted.

    Raises:
        ConfigError: there are no such weights.
    """
    check_weights(weights)
    if weights != "auto":
        return weights
    state = read_json(found.path / publication.STATE)  # which holds no tensors
    tree = state.get("tree") if isinstance(state, dict) else None
    callbacks = tree.get("callbacks") if isinstance(tree, dict) else None
    kept = callbacks.values() if isinstance(callbacks, dict) else ()
    judged = (isinstance(state, dict) and state.get("validated") is True for state in kept)
    return "averaged" if any(judged) else "live"


def read_weights(
    found: Checkpoint, weights: Weights = "auto", dtype: torch.dtype | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Reads the models' state dictionaries, by model name, into host memory.

    Args:
        found: an intact checkpoint, of any number of ranks.
        weights: which of its weights.
        dtype: for all floating-point tensors; None keeps their own.

    Raises:
        CheckpointError: there are no averaged weights, or an entry is not a tensor or is out of the
            range of `dtype`.
    """
    weights = chosen_weights(found, weights)
    parts = ("models", "callbacks") if weights == "averaged" else ("models",)
    tree = load_tree(found.path, parts=parts)
    models = tree.get("models")
    if not isinstance(models, dict) or not models or not all(map(_is_state, models.values())):
        raise CheckpointError(f"{found.path}: it holds no models' states.")
    average = _average(found, tree.get("callbacks")) if weights == "averaged" else {}
    read = {name: _exported(name, state, average, dtype) for name, state in models.items()}
    unused = set(average) - {f"{name}.{key}" for name, state in models.items() for key in state}
    if unused:
        raise CheckpointError(f"{found.path}: averages of no model: {', '.join(sorted(unused))}.")
    return read


def _intact(path: Path, folder: Path) -> Checkpoint:
    try:
        return publication.checkpoint_of(path, publication.verify(path))
    except CheckpointError as error:
        intact = [c.path.name for c in publication.scan(folder)[0] if _is_intact(c.path)]
        there = f"intact: {', '.join(intact)}" if intact else "no intact one is left"
        raise CheckpointError(f"{error}. The checkpoint is damaged; {there}.") from None


def _is_intact(path: Path) -> bool:
    try:
        publication.verify(path)
    except CheckpointError:
        return False
    return True


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(key, str) for key in state)


def _average(found: Checkpoint, callbacks: Any) -> dict[str, torch.Tensor]:
    """The averages, by `model.parameter`, in the state of the callback that kept them."""
    states = callbacks if isinstance(callbacks, dict) else {}
    kept = {
        name: state["average"]
        for name, state in states.items()
        if isinstance(state, dict) and _is_average(state.get("average"))
    }
    if not kept:
        raise CheckpointError(
            f"{found.path} holds no averaged weights: the run had no callback that keeps them "
            "(AveragedWeights, SWA, ScheduleFree). Export the live ones."
        )
    if len(kept) > 1:
        names = ", ".join(kept)
        raise CheckpointError(
            f"{found.path} holds several averages ({names}), not one to export: take the live "
            "weights (weights='live', --weights live)."
        )
    return next(iter(kept.values()))


def _is_average(state: Any) -> bool:
    return _is_state(state) and all(isinstance(mean, torch.Tensor) for mean in state.values())


def _exported(
    model: str,
    state: Mapping[str, Any],
    average: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """A model's state with averages in place of its parameters, converted; ties are kept."""
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{model}.{key} is a {kind}; only tensors can be exported.")
    # By identity, so that tied weights are averaged under all of their names.
    averaged = [key for key in state if f"{model}.{key}" in average]
    values: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in state.values()}
    values |= {id(state[key]): average[f"{model}.{key}"] for key in averaged}
    made: dict[int, torch.Tensor] = {}
    for key, tensor in state.items():
        if id(tensor) not in made:
            value = values[id(tensor)]
            if value.shape != tensor.shape:
                raise CheckpointError(f"{model}.{key}: its average has another shape.")
            wanted = dtype if dtype is not None and tensor.dtype in _WIDE else tensor.dtype
            made[id(tensor)] = _converted(value, wanted, f"{model}.{key}")
    return {key: made[id(tensor)] for key, tensor in state.items()}


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in another dtype.

    Raises:
        CheckpointError: a finite value is out of its range and would become infinite.
    """
    converted = tensor.to(dtype)
    if converted is not tensor and bool((converted.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise CheckpointError(
            f"{name} holds values up to {largest:.3g}, and {str(dtype).removeprefix('torch.')} "
            f"ends at {torch.finfo(dtype).max:.3g}: choose bf16 or fp32."
        )
    return converted


def _targets(
    found: Checkpoint, to: Path | str | None, models: list[str], suffix: str
) -> dict[str, Path]:
    """The file of each model."""
    if to is not None and str(to).endswith(_SUFFIX):
        if len(models) > 1:
            raise ConfigError(
                f"{to} is one file and the run has several models ({', '.join(models)}): choose "
                "one of them, or name a folder."
            )
        return {models[0]: Path(to)}
    folder = _exports_of(found) if to is None else Path(to)
    for name in models:
        if not _FILE_NAME.fullmatch(name):
            raise ConfigError(f"the model's name {name!r} is no file name; name a file to write.")
    return {name: folder / f"{name}_{suffix}{_SUFFIX}" for name in models}


def _exports_of(found: Checkpoint) -> Path:
    checkpoints = found.path.parent if found.path.parent.name else found.path.absolute().parent
    folder = checkpoints.parent / "exports"
    if checkpoints.name != "checkpoints" or folder.is_symlink():
        raise ConfigError(f"{found.path} has no run folder to export to: name a file or folder.")
    return folder


def _write(
    path: Path, tensors: Mapping[str, torch.Tensor], found: Checkpoint, facts: dict[str, str]
) -> Exported:
    """Writes a file under a hidden name, reads its header back, and renames it."""
    first: dict[int, str] = {}
    for name in sorted(tensors):
        first.setdefault(id(tensors[name]), name)
    tied = {n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n}
    kept = {n: tensors[n].contiguous() for n in tensors if n not in tied}
    for name, tensor in kept.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors cannot hold.")
    # Wide items first, so that every tensor in the file is aligned to its own size.
    order = sorted(kept, key=lambda name: (-kept[name].dtype.itemsize, name))
    parts = [Part(n, kept[n].dtype, tuple(kept[n].shape), ()) for n in order]
    header = header_of(parts, {**tied, **_told(found), **facts})
    disk, hidden = Disk(), path.with_name(f".{path.name}.new")
    try:
        disk.make_folders(path.parent)
        disk.remove(hidden)
        written = write_stream(disk, hidden, header, (kept[name] for name in order))
        read = {name: (entry.dtype, entry.shape) for name, entry in read_header(hidden).items()}
        if read != {part.name: (part.dtype, part.shape) for part in parts}:
            raise CheckpointError(f"{path}: its header reads back differently.")
        disk.rename(hidden, path)
        disk.fsync_folder(path.parent)
    except OSError as error:
        _remove(disk, hidden)
        raise CheckpointError(f"{path} could not be written: {describe(error)}") from None
    except BaseException:
        _remove(disk, hidden)
        raise
    return Exported(path, facts["model"], facts["weights"], len(kept), written.bytes, found)


def _remove(disk: Disk, path: Path) -> None:
    try:
        disk.remove(path)
    except OSError:
        return


def _told(found: Checkpoint) -> dict[str, str]:
    """The file's metadata: which run and checkpoint it comes from."""
    run = found.path.absolute().parent.parent
    return {
        "format": "pt",
        "run": "/".join(run.parts[-2:]),
        "checkpoint": found.path.name,
        "step": str(found.step),
        "metrics": json.dumps(found.info.get("metrics", {}), default=str),
        "paceline": publication.read_manifest(found.path).paceline,
    }
