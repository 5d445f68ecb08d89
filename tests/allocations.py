"""What torch's CPU allocator handed out, as its profiler saw it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors that `work` held at once, what kernels use inside included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes: list[tuple[int, int]] = []  # time, bytes
    ahead: list[Any] = [*seen.profiler.kineto_results.experimental_event_tree()]  # type: ignore
    while ahead:
        event = ahead.pop()
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        ahead += event.children
    return max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))
