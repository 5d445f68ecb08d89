"""What torch's CPU allocator handed out, as its profiler saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors that `work` held at once, what kernels use inside included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes: list[tuple[int, int, int]] = []  # time, bytes, address
    ahead: list[Any] = [*seen.profiler.kineto_results.experimental_event_tree()]  # type: ignore
    while ahead:
        event = ahead.pop()
        if event.tag == _EventType.Allocation:
            block = event.extra_fields
            changes.append((event.start_time_ns, block.alloc_size, block.ptr))
        ahead += event.children
    return _most(sorted(changes, key=lambda change: change[0]))


def _most(changes: list[tuple[int, int, int]]) -> int:
    """The largest sum of blocks that are held at once.

    Gloo's threads, which are not watched, let go of some: when an address is given out again, what
    was there before is gone.
    """
    held: dict[int, int] = {}
    total = most = 0
    for _, size, address in changes:
        total -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            total += size
        most = max(most, total)
    return most
