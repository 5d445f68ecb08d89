"""Ranks that were given other settings, components or data than each other, found at the start.

They would wait for each other for ever, or train different models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from paceline.checkpoint import encode
from paceline.data.loader import loaders_by_name
from paceline.errors import ConfigError, StateError, some
from paceline.trainer.arguments import arguments_in_model, kind_of
from paceline.trainer.base import TrainerBase
from paceline.trainer.run import Run
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World

_SHOWN = 5  # differences in a message
_SETTINGS = (
    "epochs",
    "max_steps",
    "epoch_length",
    "gradient_accumulation_steps",
    "global_batch_size",
    "lr_scheduler_interval",
    "max_grad_norm",
    "check_gradients",
    "precision",
    "compile",
    "deterministic",
    "validate_every",
    "early_stop",
    "on_nonfinite",
    "log_every",
)
_OVERRIDDEN = ("train", "epoch", "step", "evaluate", "count_items", "checkpoint")


def check_settings_alike(trainer: TrainerBase, run: Run) -> None:
    """Raises ConfigError, on every rank, if the settings of a run differ between ranks.

    Args:
        trainer: with the settings of this rank.
        run: whose ranks have met.
    """
    monitor = trainer.metric_monitor
    _check_alike(
        run.world,
        {
            **{name: getattr(trainer, name) for name in _SETTINGS},
            "train(seed=...)": run.seed,
            "checkpoint": trainer.checkpoint_policy,
            "resume": (trainer.resume.mode, trainer.resume.init_from),
            "metric_monitor": monitor and (monitor.metric_name, monitor.mode),
            "Trainer": type(trainer).__qualname__,
            "overrides": [name for name in _OVERRIDDEN if trainer.is_overridden(name)],
        },
    )


def check_data_alike(trainer: TrainerBase, run: Run) -> None:
    """The same for the loaders, before they are opened.

    Args:
        trainer: with the loaders of this rank.
        run: whose ranks have met.
    """
    loaders = {
        "val_dataloader" + ("" if name is None else f"[{name!r}]"): loader
        for name, loader in loaders_by_name(trainer.val_dataloader).items()
    }
    _check_alike(
        run.world,
        {
            "train_dataloader": _described(trainer.train_dataloader),
            "val_dataloader": None if trainer.val_dataloader is None else "given",
            **{name: _described(loader) for name, loader in loaders.items()},
        },
    )


def check_components_alike(trainer: TrainerBase, run: Run) -> None:
    """The same for models, optimizers and schedulers, before they are placed.

    Args:
        trainer: with the components of this rank.
        run: whose ranks have met.
    """
    found: dict[str, Any] = {}
    for name, model in trainer.named_models().items():
        found[name] = type(model).__qualname__
        for key, p in model.named_parameters():
            found[f"{name}.{key}"] = (tuple(p.shape), str(p.dtype), p.requires_grad)
        for key, buffer in model.named_buffers():
            found[f"{name}.{key}"] = (tuple(buffer.shape), str(buffer.dtype))
    for name, optimizer in trainer.named_optimizers().items():
        found[name] = type(optimizer).__qualname__
        for i, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                found[f"{name}.param_groups[{i}].{key}"] = len(value) if key == "params" else value
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        found[name] = type(scheduler).__qualname__
    found["loss_fn"] = kind_of(trainer.loss_fn)
    for name, thing in {"loss_fn": trainer.loss_fn, **trainer.named_models()}.items():
        if isinstance(thing, torch.nn.Module):
            # A switch may be the first rank's alone, as for what prints.
            arguments = arguments_in_model(thing).items()
            found |= {f"{name}, {k}": v for k, v in arguments if not isinstance(v, bool)}
            found[f"{name}, in eval mode"] = [k for k, m in thing.named_modules() if not m.training]
    _check_alike(run.world, found)


def check_contents_alike(contents: Mapping[str, str], run: Run) -> None:
    """The same for what the data are, as far as ranks have looked.

    Args:
        contents: a hash of each loader's samples.
        run: whose ranks have met.
    """
    everywhere = run.world.all_gather_object(contents)
    known = [key for key in sorted(contents) if all(key in one for one in everywhere)]
    _check_alike(run.world, {key: contents[key] for key in known})


def _described(loader: Any) -> Any:
    """What all ranks' loaders have in common; those that are no DataLoader may have their own."""
    if not isinstance(loader, DataLoader):
        return type(loader).__qualname__
    kept = [type(loader).__qualname__, f"batch_size={loader.batch_size}"]
    kept += [f"drop_last={loader.drop_last}", type(loader.sampler).__qualname__]
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return ", ".join(kept)
    return ", ".join([*kept, f"{len(loader.dataset)} samples"])  # pyright: ignore[reportArgumentType]


def _check_alike(world: World, given: Mapping[str, Any]) -> None:
    if world.size == 1:
        return
    said = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in given.items()}
    digests = world.all_gather_object(hashlib.sha256(repr(said).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    everywhere = world.all_gather_object(said if world.rank in (0, other) else None)
    first, second = everywhere[0], everywhere[other]
    lines = [
        f"{name}: {first.get(name, 'not there')} on rank 0, "
        f"{second.get(name, 'not there')} on rank {other}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise ConfigError(
        "the ranks of a run are given the same settings, data and components, and these differ:"
        + "".join(f"\n  {line}" for line in lines[:_SHOWN])
        + more
    )


def check_state_alike(run: Run, states: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuses state of the user's objects of which a checkpoint would keep one rank's for all.

    Args:
        run: whose ranks these are.
        states: each object and its state, by the state's path in the tree.

    Raises:
        StateError: on every rank; some differ.
    """
    if run.world.size == 1 or run.placement.pipeline is not None:
        return
    found: dict[str, str] = {}
    for path, (owner, state) in states.items():
        if type(owner).__module__.startswith("paceline."):
            continue
        tensors, skeleton = encode(state, tuple(path.split(".", 1)))
        found[path] = hashlib.sha256(repr(skeleton).encode()).hexdigest()
        for name, tensor in tensors.items():
            if not is_dtensor(tensor):
                found[name.replace("/", ".")] = _summary(tensor)
    everywhere = run.world.all_gather_object(found)
    differing = {
        path: rank
        for rank, other in enumerate(everywhere)
        for path in {**everywhere[0], **other}
        if everywhere[0].get(path) != other.get(path)
    }
    if differing:
        paths = sorted(differing)
        raise StateError(
            f"{some(paths)}: differs between rank 0 and rank {differing[paths[0]]}, and a "
            "checkpoint keeps one rank's for all. What differs by rank is saved in "
            'on_save_checkpoint, under state["rank"][str(trainer.world.rank)], and read from there '
            "in on_load_checkpoint."
        )


def _summary(tensor: torch.Tensor) -> str:
    """What tells different tensors apart: a hash, or on a device, without a copy, sums of bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.device.type == "cpu":
        digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        return f"{tensor.dtype} {tuple(tensor.shape)} {digest}"
    whole = data[: len(data) // 8 * 8].view(-1, 8).sum(0, dtype=torch.int64)
    return f"{tensor.dtype} {tuple(tensor.shape)} {whole.tolist()}"
