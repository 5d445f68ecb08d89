"""No process outlives the one it works for."""

from __future__ import annotations

import ctypes
import sys


def signal_when_parent_dies(number: int) -> None:
    """Has the kernel signal this process when its parent dies, however that comes about.

    To be exact, when the thread of the parent dies that started this process. Linux only; elsewhere
    it does nothing.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
