"""Export: a run's model as a folder that transformers loads, tokenizer and chat template with it.

Nothing of the run's own code is imported: the model is made from the config that the run has kept
(`pretrained.py`) and the weights of a checkpoint. Before the folder is published it is loaded again
and compared with that model: every weight, and the logits of random tokens.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint.engine import Checkpoint
from paceline.checkpoint.export import (
    EXPORT_DTYPES,
    Weights,
    chosen_weights,
    find_checkpoint,
    read_weights,
)
from paceline.checkpoint.files import Disk
from paceline.checkpoint.publication import hidden, make_durable, publish
from paceline.checkpoint.ranks import describe
from paceline.errors import CheckpointError, ConfigError, counted, nearest, some
from paceline.lm.loading import make_empty_model, read_config, read_model, reading
from paceline.log.secrets import masked
from paceline.reading import names
from paceline.runs import listing
from paceline.trainer.pretrained import FOLDER, TEXTS
from paceline.world.seeding import random_state_kept

SHARD = 4 * 1000**3
"""Bytes of a file at most; more weights are split into several, with an index."""
_WEIGHTS = ".safetensors"
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest logit
_COARSE = 2e-2  # for half precision
_PROBE = (2, 16)  # rows and tokens of the ids whose logits are compared


def export_huggingface(
    run: Path | str,
    to: Path | str | None = None,
    *,
    weights: Weights = "auto",
    checkpoint: str = "latest",
    model: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes a run's model as a folder for `from_pretrained`.

    Args:
        run: a run folder, or a checkpoint in it.
        to: the folder to write, which must not exist or be empty; by default one in the run's
            `exports` folder, where an earlier one is replaced.
        weights: "auto" for the weights that the run validated with, "live" for the trained ones,
            "averaged" for those that a callback kept.
        checkpoint: in a run folder, "latest", "best" or a name such as "step_00000120".
        model: the name of one of several models.
        dtype: "fp32", "bf16" or "fp16" for the weights; None keeps their own.

    Returns:
        The folder.

    Raises:
        ConfigError: an argument is invalid, or the run has kept no config of transformers.
        CheckpointError: there is no such checkpoint, it is damaged or is not of the config's model,
            the folder gives other logits once loaded, or it cannot be written.
        MissingExtraError: transformers is not installed.
    """
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(EXPORT_DTYPES)}.")
    found = find_checkpoint(run, checkpoint)
    weights = chosen_weights(found, weights)
    home = found.path.absolute().parent.parent
    model = _chosen(home, model)
    suffix = ["averaged"] * (weights == "averaged") + ([dtype] if dtype else [])
    folder = _target(home, to, "_".join([model, found.path.name, *suffix]))
    kept = home / FOLDER / model
    state = read_weights(found, weights, None if dtype is None else EXPORT_DTYPES[dtype])
    if model not in state:
        raise CheckpointError(f"{found.path} has no model {model!r}, but {some(state)}.")
    with reading(f"{kept}"):
        config = read_config(str(kept))
    try:
        made = model_of(config, state[model])
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {error}") from None
    disk, new = Disk(), hidden(folder.parent, folder.name, "new")
    try:
        disk.remove(new)  # of an export that was killed
        disk.make_folders(new)
        write_model(made, new)
        for name in names(kept):
            if name.endswith(TEXTS) and not (new / name).exists():
                shutil.copyfile(kept / name, new / name, follow_symlinks=False)
        (new / "README.md").write_text(_card(home, found, weights), encoding="utf-8")
        check_folder(new, made)
        make_durable(new, disk)
        publish(folder.parent, folder.name, disk)
    except BaseException as error:
        with contextlib.suppress(OSError):
            disk.remove(new)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder} could not be written: {describe(error)}") from None
        raise
    return folder


def _chosen(home: Path, model: str | None) -> str:
    """The name of the model to export."""
    there = [name for name in names(home / FOLDER) if not name.startswith(".")]
    if not there:
        raise ConfigError(
            f"{home} keeps no config of transformers ({FOLDER}/): its models are none of "
            "transformers. The format safetensors needs none."
        )
    if model is None and len(there) > 1:
        raise ConfigError(f"{home} has several models: choose one of {', '.join(there)}.")
    if model is not None and model not in there:
        hint = nearest(model, there) or "."
        raise ConfigError(
            f"{home} keeps no config of a model {model!r}{hint} It has: {some(there)}"
        )
    return model or there[0]


def _target(home: Path, to: Path | str | None, name: str) -> Path:
    if to is None:
        if (home / "exports").is_symlink():
            raise ConfigError(f"{home / 'exports'} is a link: name a folder to write.")
        return home / "exports" / name
    folder = Path(to).absolute()
    if folder.suffix == _WEIGHTS:
        raise ConfigError(f"{to}: this format is a folder, not a file.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{to} is not empty: name a new folder.")
    return folder


def model_of(config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A model of transformers with these weights, in their dtypes and without a copy of them.

    Args:
        config: of transformers.
        state: all of the model's weights by name, of any shape, in host memory; tied ones under one
            of their names at least.

    Raises:
        CheckpointError: they are not those of such a model.
    """
    with random_state_kept(), reading("the kept config"):
        made = make_empty_model(config)
    held = made.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in held.items():
        tied.setdefault(id(tensor), []).append(name)
    problems = [f"{name} is of no such model" for name in state if name not in held]
    filled: set[int] = set()
    for own in tied.values():
        given = [name for name in own if name in state]
        if not given:
            problems.append(f"{own[0]} is missing")
            continue
        value, tensor = state[given[0]], held[own[0]]
        if value.shape != tensor.shape:
            shapes = f"{list(value.shape)}, not {list(tensor.shape)}"
            problems.append(f"{own[0]} has the shape {shapes}")
        elif any(not _equal(state[name], value) for name in given[1:]):
            problems.append(f"{' and '.join(given)} differ, and the config ties them")
        else:
            # Weights that are one tensor in the state, but not in the model, part.
            at = value.untyped_storage().data_ptr()
            tensor.data = value.clone() if at in filled else value
            filled.add(at)
    if problems:
        raise CheckpointError(
            f"its weights are not those of a {type(made).__name__}: {some(problems, 4)}."
        )
    return made.eval()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def write_model(model: Any, folder: Path) -> None:
    """Writes a model's weights, config and generation config.

    Args:
        model: of transformers, on the CPU.
        folder: an existing folder.
    """
    with reading(f"{folder}"):
        model.save_pretrained(str(folder), max_shard_size=SHARD)
    for file in folder.glob(f"*{_WEIGHTS}"):  # which safetensors keeps from everybody else
        file.chmod((folder / "config.json").stat().st_mode)


def check_folder(folder: Path, model: Any) -> None:
    """Loads a folder and compares it with the model that was written there.

    Args:
        folder: from `write_model`.
        model: as it was written.

    Raises:
        CheckpointError: a weight or the logits differ.
    """
    with random_state_kept():
        loaded = read_folder(folder).eval()
        ours, theirs = model.state_dict(), loaded.state_dict()
        different = [k for k in ours if k not in theirs or not _equal(ours[k], theirs[k])]
        if different or len(ours) != len(theirs):
            raise CheckpointError(
                f"{folder.name}: loaded again it has other weights: "
                f"{some(different or set(theirs) - set(ours), 4)}. It was not published."
            )
        generator = torch.Generator().manual_seed(0)
        size = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(size, _PROBE, generator=generator)
        with torch.no_grad():
            wanted, logits = (m(ids, use_cache=False).logits.double() for m in (model, loaded))
    gap = (wanted - logits).abs().max().item()
    allowed = _TOLERANCE.get(model.dtype, _COARSE) * wanted.abs().max().item()
    if not gap <= allowed:
        raise CheckpointError(
            f"{folder.name}: loaded again its logits differ by {gap:.2g} (allowed is "
            f"{allowed:.2g}). It was not published."
        )


def read_folder(folder: Path) -> Any:
    """The model in a folder, on the CPU, in the dtype in which it was saved.

    Raises:
        ConfigError: it cannot be read.
    """
    with reading(f"{folder}"):
        model, found = read_model(str(folder), dtype="auto")
        if lacking := found["missing_keys"]:
            raise ConfigError(f"{folder}: it lacks {some(sorted(lacking), 4)}.")
    return model


def _card(home: Path, found: Checkpoint, weights: str) -> str:
    """The model card: where the weights come from. What looks like a credential is masked."""
    run = listing.read(home)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {_plain(home.name)}",
        "",
        f"Trained with Paceline: the {weights} weights of {found.path.name}, after "
        f"{counted(found.step, 'optimizer step')}.",
    ]
    tables = {
        "Metrics": found.info.get("metrics"),
        "Versions": run.record.get("versions"),
        "Recipe": run.recipe,
    }
    for title, values in tables.items():
        if isinstance(values, Mapping) and values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_plain(key)} | {_plain(v)} |" for key, v in masked(values).items()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """A value as text in a line of Markdown."""
    text = " ".join(str(value).split())
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in text)
