"""Persistent host buffers: a copy of the state to write while training continues."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from paceline.checkpoint.safetensors_file import raw_bytes
from paceline.world.dtensors import local_part, placed_like

_Piece = tuple[np.ndarray, np.ndarray]
_PIECE = 8 << 20


class Staging:
    """Host memory for one copy of the state, allocated at the first save and reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies the tensors; when this returns, the originals may change."""
        staged, buffers = {}, {}
        waits: torch.device | None = None
        pieces: list[_Piece] = []
        for name, tensor in tensors.items():
            local = local_part(tensor)
            on_device = local.device.type != "cpu"
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                # Pinned memory lets the device copy while the host proceeds to the next tensor.
                buffer = torch.empty(
                    local.shape, dtype=local.dtype, pin_memory=on_device and local.numel() > 0
                )
            if on_device or not local.is_contiguous():
                buffer.copy_(local, non_blocking=on_device)
                waits = local.device if on_device else waits
            else:
                pieces += _pieces(buffer, local)
            buffers[name] = buffer
            staged[name] = placed_like(buffer, tensor)
        _copy_pieces(pieces)
        if waits is not None:
            torch.accelerator.synchronize(waits)
        self._buffers = buffers
        return staged

    def release(self) -> None:
        self._buffers = {}


def _pieces(buffer: torch.Tensor, local: torch.Tensor) -> list[_Piece]:
    """Pairs of target and source bytes, small enough to be spread over threads."""
    if local.numel() == 0:
        return []
    target, source = (np.frombuffer(raw_bytes(t), np.uint8) for t in (buffer, local))
    starts = range(0, len(source), _PIECE)
    return [(target[at : at + _PIECE], source[at : at + _PIECE]) for at in starts]


def _copy_pieces(pieces: list[_Piece]) -> None:
    """Copies host memory in a few threads that synchronise once.

    Torch's own copy synchronises its threads, spinning, after every tensor: on a machine whose
    cores are busy (loader workers) that is ten times slower.
    """
    # numpy releases the interpreter's lock while it copies.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "staging") as pool:
        for _ in pool.map(lambda piece: np.copyto(*piece), pieces):
            pass
