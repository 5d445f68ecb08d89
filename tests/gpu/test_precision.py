"""Precisions and compilation on the device: equal to a hand-written loop, exact after a resume."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_runs import Fit, Net, apart, batches, device, digests, fitted, fused_adamw

from paceline.testing import StopAt

pytestmark = pytest.mark.gpu
HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loud(Fit):
    """Its gradients overflow at the scaler's first scale."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * 1000


RUNS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "kind": Loud},
    "fp8": {"precision": "fp8"},
    "compiled": {"precision": "bf16", "compile": True},
    "compiled by blocks": {"precision": "bf16", "compile": "blocks"},
}


def settings_of(run: str) -> dict[str, Any]:
    """A run's settings; skips the test if this machine cannot run it."""
    settings: dict[str, Any] = RUNS[run]
    if settings.get("precision") == "fp8":
        if device().type != "cuda":
            pytest.skip("float8 needs a CUDA device")
        pytest.importorskip("torchao", reason="float8 needs torchao, which is not installed")
        if not torch.version.hip and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("float8 needs compute capability 8.9 or later")
    if "compile" in settings and device().type == "cuda":
        pytest.importorskip("triton", reason="compiling needs Triton, which is not installed")
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            pytest.skip("compiling needs a C compiler, and there is none")
    return settings


def by_hand(precision: str) -> Net:
    """The model after a hand-written loop."""
    here, model, dtype = device(), Net(dropout=0), HALVES[precision]
    model.to(here)
    optimizer = fused_adamw(model.parameters())
    scaler = torch.amp.GradScaler(here.type, enabled=precision == "fp16")
    for _ in range(2):
        for x, y, _ids in batches(shuffle=False):
            with torch.autocast(here.type, dtype) if dtype is not None else nullcontext():
                loss = F.mse_loss(model(x.to(here)), y.to(here))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("precision", HALVES)
def test_a_run_ends_with_the_bits_of_the_loop_written_by_hand(precision: str) -> None:
    ours = fitted(
        model=Net(dropout=0), precision=precision, train_dataloader=batches(shuffle=False)
    )
    torch.use_deterministic_algorithms(True)
    try:
        theirs = by_hand(precision)
    finally:
        torch.use_deterministic_algorithms(False)
    assert digests(ours.model.state_dict()) == digests(theirs.state_dict())


@pytest.mark.parametrize("run", RUNS)
def test_stopped_and_resumed_it_ends_with_the_same_bits(run: str, tmp_path: Path) -> None:
    """Weights, optimizer, a scaler that changes its scale, and rows."""
    settings = settings_of(run)
    whole = fitted(**settings, run_dir=tmp_path / "whole")
    fitted(**settings, run_dir=tmp_path / "stopped", callbacks=[StopAt(5)])
    resumed = fitted(**settings, run_dir=tmp_path / "stopped")
    assert resumed.ended == whole.ended
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("run", "limit"), [("fp8", 0.3), ("compiled", 0.1), ("compiled by blocks", 0.1)]
)
def test_it_ends_where_bf16_does_up_to_its_rounding(run: str, limit: float) -> None:
    """For comparison: bf16 and fp32 end 0.04 apart."""
    model, plain = Net(dropout=0), Net(dropout=0)
    fitted(model=model, **settings_of(run))
    fitted(model=plain, precision="bf16")
    assert apart(plain, model, start=Net()) < limit


class Looking(Fit):
    """Records the classes of its linear layers in training."""

    def on_train_start(self) -> None:
        super().on_train_start()
        layers = self.get_module("model").modules()
        self.kinds = {type(part).__name__ for part in layers if isinstance(part, torch.nn.Linear)}


def test_layers_multiply_in_float8() -> None:
    """All but the head, whose size is no multiple of 16."""
    made: Any = fitted(Looking, **settings_of("fp8"))
    assert made.kinds == {"Float8Linear", "Linear"}


def test_the_fp16_run_has_an_overflow() -> None:
    """Without one its resume would not show that the scale is restored."""
    made: Any = fitted(**RUNS["fp16"])
    assert 0 < made.ended["scaler"]["scale"] < 65536
