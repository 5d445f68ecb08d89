"""Tests that need an accelerator. `make gpu` runs them; without one they are skipped.

`PACELINE_REHEARSE_GPU=1` runs most of them on the CPU, for developers without an accelerator: the
trainer then treats reading a tensor as a wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from paceline import World

AVAILABLE = torch.accelerator.is_available()
REHEARSED = bool(os.environ.get("PACELINE_REHEARSE_GPU")) and not AVAILABLE

if AVAILABLE:
    # torch reads it once per process, at the first matrix product on a CUDA device. If it is not
    # set by then, every later deterministic run in the process fails.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that cannot run here, with the reason."""
    for item in items:
        needs: dict[str, Any] = {}
        for marker in item.iter_markers("gpu"):
            needs = {**marker.kwargs, **needs}
        if item.get_closest_marker("gpu") and (why := why_not(**needs)):
            item.add_marker(pytest.mark.skip(reason=why))


def why_not(kind: str | None = None, devices: int = 1) -> str | None:
    """Why a test cannot run here; None if it can.

    Args:
        kind: of the accelerator that it needs, such as "cuda"; None for any.
        devices: how many it needs.
    """
    if REHEARSED:
        return f"needs {kind.upper()}; rehearsed on the CPU" if kind else None
    if not AVAILABLE:
        return "needs an accelerator: `make gpu` on a machine that has one"
    here = torch.accelerator.current_accelerator()
    if kind not in (None, here and here.type):
        return f"needs {kind.upper()}; the accelerator here is {here}"
    count = torch.accelerator.device_count()
    return f"needs {devices} devices; there is {count}" if count < devices else None


@pytest.fixture(autouse=True)
def _rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    if REHEARSED:
        monkeypatch.setattr(World, "reads_are_free", property(lambda self: False))
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    """No test uses code that another one compiled."""
    yield
    torch.compiler.reset()
