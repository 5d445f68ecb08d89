"""Forked children, such as loader workers, finalize nothing of their parent's."""

from __future__ import annotations

import functools
import gc
import os


@functools.cache
def spare_parents_garbage() -> None:
    """Keeps children that are forked from now on from collecting what was their parent's.

    A process group that nobody holds any more waits for garbage collection. A child that collects
    it waits for ever: the group's destructor joins threads, which a child does not have.
    """
    if not hasattr(os, "register_at_fork"):
        return  # this system does not fork
    enabled = True

    def before() -> None:
        nonlocal enabled
        enabled = gc.isenabled()
        gc.disable()

    def in_parent() -> None:
        if enabled:
            gc.enable()

    def in_child() -> None:
        gc.freeze()
        in_parent()

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)
