"""Makes a process exit with its parent."""

from __future__ import annotations

import ctypes
import sys


def signal_when_parent_dies(number: int) -> None:
    """Makes the kernel signal this process when its parent dies, for whatever reason.

    To be exact, when the parent's thread dies that started this process. Linux only; elsewhere it
    does nothing.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
