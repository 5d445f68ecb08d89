"""The cases of P3: what a run is made of, what it keeps, and when two runs are the same.

Data are in double precision, so "the same" means to 1e-10, a thousandth of what float32 could tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from paceline.trainer.callback import Callback
from paceline.world.dtensors import whole

TOLERANCE = 1e-10
SIZES = (97, 1, 3, 8)  # samples; batch sizes are 10, 5 and 2 or so, which divide none of it


@dataclass(frozen=True)
class Case:
    """One run. `rows` of data in batches of `batch`; `tokens` counts items by a mask."""

    rows: int = 97
    batch: int = 10
    accumulation: int = 1
    tokens: bool = False
    model: str = "plain"
    precision: str = "fp32"
    epochs: int = 2
    shuffle: bool = True


def data(rows: int, shift: int = 0) -> TensorDataset:
    """(inputs, targets, mask, index); many rows have no item in their mask, the first ten above
    all, and the others up to 5."""
    generator = torch.Generator().manual_seed(5 + shift)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    length = torch.randint(0, 6, (rows,), generator=generator)
    length[:10] = 0
    mask = torch.arange(5) < length[:, None]
    return TensorDataset(x, y, mask, torch.arange(rows))


class Keep(Callback):
    """Keeps rows, validations, and the buffers after each window."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.validations: list[dict[str, float]] = []
        self.buffers: list[list[torch.Tensor]] = []
        self.stood_in: list[bool] = []
        self.parameters: list[torch.Tensor] = []

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.rows.append(dict(metrics))
        self.buffers.append([b.clone() for b in trainer.model.buffers()])
        self.stood_in.append(trainer.window.stand_in)

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.validations.append(dict(metrics))

    def on_train_end(self, trainer: Any) -> None:
        models = trainer.named_models().values()
        self.parameters = [
            whole(p).detach().clone() for m in models for p in m.parameters() if not p.is_meta
        ]


def assert_same(one: Any, other: Any, what: Any = "") -> None:
    """Two runs' losses, norms, metrics, counts and parameters are equal to the tolerance."""
    for key in ("rows", "validations"):
        assert len(one[key]) == len(other[key]), (what, key)
        for a, b in zip(one[key], other[key], strict=True):
            assert a == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE), (what, key)
    for a, b in zip(one["parameters"], other["parameters"], strict=True):
        torch.testing.assert_close(
            a, b, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{what} {m}"
        )


CASES = [
    Case(rows, batch, accumulation, tokens)
    for rows in SIZES
    for batch, accumulation in ((10, 1), (5, 3))
    for tokens in (False, True)
]
SOME = [case for case in CASES if case.rows in (97, 3)]
# Of samples in batches of 10, and of tokens in windows: for layouts that meet others.
FEW = [replace(case, epochs=1) for case in SOME if case.tokens == (case.accumulation > 1)]
