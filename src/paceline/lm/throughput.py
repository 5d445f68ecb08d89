"""TokenThroughput: tokens and operations per second of a language model, in the timing rows."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from paceline.callbacks.throughput import Throughput
from paceline.errors import ConfigError
from paceline.lm.flops import ModelFlops, flops_of

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

# 10^12 operations per second, dense, in bf16, as the makers' data sheets say; the first that fits.
_PEAKS = {
    r"\bG?B200\b": 2250.0,
    r"\bH100 PCIe\b": 756.0,
    r"\bH100 NVL\b": 835.0,
    r"\b(G?H200|H100)\b": 989.4,
    r"\bA100\b": 312.0,
    r"\bA10\b": 125.0,
    r"\bL40S\b": 362.0,
    r"\bL4\b": 121.0,
    r"\bMI300X\b": 1307.4,
}
_HALF = (torch.bfloat16, torch.float16)


class TokenThroughput(Throughput):
    """`Throughput` for language models, without validations; trainers of `paceline.lm` have it.

    Each timing row gets `samples_per_second`, `tokens_per_second` (all, padding included),
    `trained_tokens_per_second`, `step_seconds` and `peak_memory_bytes`; `tflops_per_device`, the
    10^12 operations per second that the mathematics of a device's tokens needs
    (`paceline.lm.flops`); and `mfu`, the part of the device's peak that this is, 0 to 1. A batch is
    counted by the lengths of its `documents`, else of its rows; padding is a document of its own.
    It never waits for the device.

    Args:
        peak_tflops: what the device can do at most, in 10^12 operations per second. Unless given it
            is that of known GPUs in bf16, for models that compute in bf16 or fp16; on others `mfu`
            is left out.

    Raises:
        ConfigError: the peak is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        super().__init__()
        if peak_tflops is not None and not (peak_tflops > 0 and math.isfinite(peak_tflops)):
            raise ConfigError(
                f"TokenThroughput(peak_tflops={peak_tflops}): give a number above 0, in 10^12 "
                "operations per second."
            )
        self.peak_tflops = peak_tflops
        self._flops: ModelFlops | None = None
        self._peak: float | None = None
        self._counted_here = [0, 0]  # tokens and operations of this rank since the last row
        self._everywhere = [0, 0]

    def on_setup(self, trainer: Trainer) -> None:
        """Counts the operations of the model."""
        found = flops_of(trainer.model)
        self._flops = found if isinstance(found, ModelFlops) else None
        if isinstance(found, str):
            trainer.plan.add(f"no TFLOP/s in the timing rows: {found}")

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts the clock; steps before a resume are not counted."""
        super().on_train_start(trainer)
        self._peak = self.peak_tflops or known_peak(trainer)
        self._counted_here = [0, 0]

    def on_train_batch_end(
        self, trainer: Trainer, batch: Any, batch_idx: int, loss: torch.Tensor
    ) -> None:
        """Counts a micro-batch, by its shape and its documents' lengths alone."""
        lengths = lengths_in(batch)
        self._counted_here[0] += sum(lengths)
        if self._flops is not None:
            self._counted_here[1] += self._flops.training(lengths)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Logs the speeds, if there is a row at this step."""
        if metrics:  # on every rank
            parts = trainer.world.gather_parts(self._counted_here)
            self._everywhere = [sum(each) for each in zip(*parts, strict=True)]
            self._counted_here = [0, 0]
        super().on_step_end(trainer, metrics)

    def speeds(
        self, trainer: Trainer, seconds: float, *, samples: int, items: int
    ) -> dict[str, float]:
        """What was done since the last row, per second; as of `Throughput`.

        Args:
            trainer: which did it.
            seconds: since the last row, without validations.
            samples, items: of all ranks in these seconds; items are trained tokens.
        """
        tokens, operations = self._everywhere
        found = {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": items / seconds,
        }
        if self._flops is not None:
            found["tflops_per_device"] = operations / seconds / trainer.world.size / 1e12
            if self._peak is not None:
                found["mfu"] = found["tflops_per_device"] / self._peak
        return found


def lengths_in(batch: Any) -> list[int]:
    """The tokens of each document of a batch, as numbers that no device has to be asked for.

    Args:
        batch: with `input_ids`, [rows, length], and perhaps `documents`, their lengths by row.
    """
    documents = batch.get("documents")
    if documents is None:
        rows, length = batch["input_ids"].shape
        return [length] * rows
    return [length for row in documents for length in row]


def known_peak(trainer: Trainer) -> float | None:
    """The most operations per second of a trainer's device, in 10^12; None if it is not known.

    Args:
        trainer: whose models are placed.
    """
    if trainer.device.type != "cuda":
        return None
    dtypes = {p.dtype for p in trainer.model.parameters()}  # pyright: ignore
    if trainer.precision not in ("bf16", "fp16") and not dtypes <= set(_HALF):
        return None
    name = torch.cuda.get_device_name(trainer.device)
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, name)), None)
