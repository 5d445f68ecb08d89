"""Prediction: the outputs for each sample once over all ranks, in the loader's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from paceline.data.batches import describe, samples_in
from paceline.data.loader import check_keeps_order, loaders_by_name
from paceline.errors import ConfigError, DataError
from paceline.trainer.base import TrainerBase
from paceline.trainer.error_context import in_validation
from paceline.trainer.run import Run
from paceline.trainer.validation import validating
from paceline.trainer.window import buffers_kept
from paceline.world.seeding import mix, seed_everything, stream

Outputs = dict[str, Any]
"""Outputs by name, "" if they have none: a tensor of [samples, ...] or a list of one a sample."""


class Predictions:
    """What `predict_step` returns, batch by batch, in the loader's order; iterate it once.

    Each item has the outputs of some samples, by name ("" if they have none): tensors of
    [samples, ...] on the CPU, or lists. They are the same on every rank.

    Args:
        trainer: whose `predict_step` it is.
        run: with the models placed and one loader open.

    Raises:
        ConfigError: there is nothing to predict, or not in this way.
    """

    def __init__(self, trainer: TrainerBase, run: Run) -> None:
        if not trainer.validation:
            raise ConfigError(
                "there is nothing to predict: give predict() a loader, or the trainer a "
                "val_dataloader."
            )
        if len(trainer.validation) > 1:
            names = ", ".join(map(repr, trainer.validation))
            raise ConfigError(f"val_dataloader has several loaders ({names}): predict one of them.")
        (loader,) = loaders_by_name(trainer.val_dataloader).values()
        check_keeps_order(loader)
        self._trainer, self._run = trainer, run

    def __iter__(self) -> Iterator[Outputs]:
        with validating(self._trainer, self._run):
            yield from self._batches()

    def together(self) -> Any:
        """The outputs for all samples; by name if they have names."""
        parts: dict[str, list[Any]] = {}
        for outputs in self:
            for name, values in outputs.items():
                parts.setdefault(name, []).append(values)
        whole = {name: _joined(values) for name, values in parts.items()}
        return whole[""] if set(whole) == {""} else whole

    def _batches(self) -> Iterator[Outputs]:
        (data,) = self._trainer.validation.values()
        batches, batch_idx = data.batches(), 0
        names: set[str] = set()
        while True:
            self._run.predicted = batch_idx
            batch = next(batches, None)  # ranks that iterate their own shares may have more
            mine = None if batch is None else self._outputs(*batch, batch_idx)
            everywhere = self._run.world.gather_parts(mine)
            if all(outputs is None for outputs in everywhere):
                return
            for outputs in filter(None, everywhere):
                names = names or set(outputs)
                if set(outputs) != names:
                    raise DataError(
                        f"predict_step returned {_names(outputs)} for batch {batch_idx}, and "
                        f"{_names(names)} before: return the same outputs for each batch."
                    )
                yield outputs
            batch_idx += 1

    def _outputs(self, batch: Any, size: int, batch_idx: int) -> Outputs:
        """This rank's outputs for a batch; none for one that only keeps it in step."""
        trainer, run = self._trainer, self._run
        placement = run.placement
        batch = placement.local_batch(batch)
        if size == 0:
            with buffers_kept(run), trainer.autocast:
                placement.call_again()
            return {}
        placement.calls.clear()
        key = stream(run.seed, "val", run.progress.global_step, run.world.part)
        seed_everything(mix(key, batch_idx))
        samples = size if size > 0 else samples_in(batch)
        try:
            with trainer.autocast:
                returned = trainer.predict_step(batch, batch_idx)
        except Exception as error:
            in_validation(trainer, run, error, batch, batch_idx)
            raise
        outputs = {
            name: _checked(self._whole(value, batch), samples, batch)
            for name, value in _named(returned).items()
        }
        if not outputs:
            raise DataError(f"predict_step returned {returned!r}, without any output.")
        mesh = run.world.context_mesh
        return outputs if mesh is None or mesh.get_local_rank() == 0 else {}

    def _whole(self, value: Any, batch: Any) -> Any:
        """An output with all that other ranks have of it."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, torch.Tensor):
            value = value.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore
            return self._run.placement.whole_output(value, batch)
        return value


def _names(outputs: Iterable[str]) -> str:
    return ", ".join(repr(name) if name else "an unnamed output" for name in sorted(outputs))


def _named(returned: Any) -> Outputs:
    """What `predict_step` returned, by name."""
    if isinstance(returned, Mapping):
        return {str(name): value for name, value in returned.items()}
    if is_dataclass(returned) and not isinstance(returned, type):
        return {each.name: getattr(returned, each.name) for each in fields(returned)}
    if isinstance(returned, tuple) and (names := getattr(returned, "_fields", None)):
        return dict(zip(names, returned, strict=True))
    if isinstance(returned, tuple):
        return {str(i): value for i, value in enumerate(returned)}
    return {"": returned}


def _checked(value: Any, samples: int, batch: Any) -> Any:
    """A tensor on the CPU, or a list, with an entry for each sample.

    Raises:
        DataError: it is neither, or has another number of entries.
    """
    if isinstance(value, torch.Tensor):
        value = value.to("cpu", copy=True)  # which waits for what the ranks still exchange
        count = len(value) if value.dim() else None
    else:
        count = len(value) if isinstance(value, list) else None
    if count != samples:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise DataError(
            f"predict_step returned {found:.80} for a batch of {samples} samples "
            f"({describe(batch)}): it returns a tensor, an array or a list with one entry for each "
            "sample, or several of these by name."
        )
    return value


def _joined(parts: list[Any]) -> Any:
    """The parts as one: a tensor if all are tensors that fit together, else a list."""
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(tensors) == len(parts) and len({part.shape[1:] for part in tensors}) == 1:
        return torch.cat(tensors)
    return [each for part in parts for each in part]
