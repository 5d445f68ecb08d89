"""P7 on the device: between two rows the host never waits for it.

torch raises on synchronizing operations (`set_sync_debug_mode`), and a profiler trace shows those
that torch does not check.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_runs import Fit, batches, fitted

pytestmark = pytest.mark.gpu(kind="cuda")
FIRST, LAST = 4, 12  # steps after which the watch begins and ends
MARK = "watched steps"


class Watched(Fit):
    """Watched from the end of step FIRST to the end of step LAST, between the windows too.

    Attributes:
        trace: the names of the profiler's events in that time.
    """

    mark: Any = None

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        if self.global_step == FIRST:
            self.profile = torch.profiler.profile()
            self.profile.start()
            self.mark = torch.profiler.record_function(MARK)
            self.mark.__enter__()
            torch.cuda.set_sync_debug_mode("error")
        elif self.global_step == LAST:
            self.end()
            self.trace = within_mark(self.profile)

    def on_teardown(self) -> None:
        self.end()

    def end(self) -> None:
        if self.mark is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.mark.__exit__(None, None, None)
            self.mark = None
            self.profile.stop()


def within_mark(profile: torch.profiler.profile) -> list[str]:
    """Events that began within the mark; after it the profiler itself waits for the device."""
    events = list(profile.events() or ())
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    (span,) = (e.time_range for e in on_host if e.name == MARK)
    return [e.name for e in events if span.start < e.time_range.start < span.end]


def waits(trace: list[str]) -> list[str]:
    """Events in which the host waits for the device."""
    waiting = {"aten::_local_scalar_dense", "cudaMemcpy", "hipMemcpy"}
    parts = "Synchronize", "DtoH", "Pageable"  # copies from unpinned memory may wait
    return [name for name in trace if name in waiting or any(part in name for part in parts)]


def watched(kind: type[Watched] = Watched, **settings: Any) -> list[str]:
    """The trace of a run with pinned batches and without rows."""
    options = {"deterministic": False, "log_every": 1000, **settings}
    made: Any = fitted(kind, train_dataloader=batches(pin_memory=True), **options)
    assert any("LaunchKernel" in name for name in made.trace), "the trace has no kernels"
    return made.trace


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="fp32"),
        pytest.param(
            {"precision": "bf16", "gradient_accumulation_steps": 2, "epochs": 4}, id="bf16"
        ),
        pytest.param({"precision": "fp16"}, id="fp16"),
        pytest.param({"precision": "bf16", "compile": True}, id="compiled"),
        pytest.param({"max_grad_norm": None}, id="not clipped"),
        pytest.param({"gradient_accumulation_steps": 2, "epochs": 4}, id="two batches a step"),
        pytest.param({"bad": (6, 7), "on_nonfinite": "skip"}, id="a bad step"),
    ],
)
def test_nothing_waits_between_rows(settings: dict[str, Any]) -> None:
    assert waits(watched(**settings)) == []


class Reading(Watched):
    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        loss.item()
        return loss


def test_the_watch_sees_a_wait() -> None:
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        watched(Reading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        found = waits(watched(Reading))
    assert found.count("aten::_local_scalar_dense") == LAST - FIRST
    assert len(set(found)) > 1, "the trace has no events of the device"
