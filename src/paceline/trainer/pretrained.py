"""What a run keeps of its models and tokenizer beside the weights, so that it can be exported.

`RUN/pretrained/<model>/` holds the model's config, its generation config, and the tokenizer's files
with the chat template. They are written by the objects' own `save_pretrained`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint.files import Disk
from paceline.checkpoint.publication import hidden, make_durable, publish
from paceline.errors import CheckpointError

FOLDER = "pretrained"
TEXTS = (".json", ".jinja", ".txt", ".model")
"""The endings of the files that belong to a tokenizer or a config."""


def keep_pretrained(
    run_dir: Path, models: Mapping[str, torch.nn.Module], tokenizer: Any = None
) -> None:
    """Writes `RUN/pretrained`, unless it is there: what transformers needs beside the weights.

    Args:
        run_dir: the run's folder.
        models: by name; those without a config of transformers are passed over.
        tokenizer: the trainer's, if it has one.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        for name, model in models.items():
            if is_pretrained(model):
                _keep(run_dir / FOLDER, name, model, tokenizer)
    except (OSError, ValueError) as error:  # the latter from a config's own checks
        raise CheckpointError(f"{run_dir / FOLDER} cannot be written: {error}.") from error


def is_pretrained(model: Any) -> bool:
    """Whether a model has a config of transformers."""
    return callable(getattr(getattr(model, "config", None), "save_pretrained", None))


def saved_config(model: Any) -> Any:
    """A copy of a model's config as it is saved, without what only training changes.

    Args:
        model: of transformers, also one that FSDP2 has sharded.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.use_cache = True
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) == 1:
        config.dtype = dtypes.pop()
    return config


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer's files, its chat template with them; those of others have none.

    Args:
        tokenizer: of transformers, or another object or None, of which nothing is written.
        folder: to write into.
    """
    if callable(save := getattr(tokenizer, "save_pretrained", None)):
        save(str(folder))


def save_configs(model: Any, folder: Path) -> None:
    """Writes a model's config and generation config.

    Args:
        model: of transformers.
        folder: to write into.
    """
    saved_config(model).save_pretrained(str(folder))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(str(folder))


def _keep(folder: Path, name: str, model: torch.nn.Module, tokenizer: Any) -> None:
    if (folder / name).is_dir():
        return
    disk, new = Disk(), hidden(folder, name, "new")
    disk.remove(new)  # of a run that was killed
    disk.make_folders(new)
    save_configs(model, new)
    save_tokenizer(tokenizer, new)
    make_durable(new, disk)
    publish(folder, name, disk)
