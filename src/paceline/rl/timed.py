"""Calls of a user's functions that may hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def within(seconds: float, function: Callable[[], Any], name: str) -> Any:
    """What a function returns, called without gradients in a thread of its own.

    Args:
        seconds: that it may take. One that hangs is left behind; it keeps no process from ending.
        function: without arguments.
        name: of the thread.

    Raises:
        TimeoutError: it took longer.
        Exception: whatever it raises.
    """
    box: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():  # which each thread has of its own
                box.append((function(), None))
        except Exception as error:  # noqa: BLE001 - handed on to who called
            box.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name=name)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"it took longer than {seconds:g} s")
    value, error = box[0]
    if error is not None:
        raise error
    return value
