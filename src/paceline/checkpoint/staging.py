"""Kept host buffers: a copy of the state to write while training goes on."""

from __future__ import annotations

import torch

from paceline.checkpoint.codec import is_dtensor, local_part


class Staging:
    """Host memory for one copy of the state, made at the first save and used again at each."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies the tensors; when this returns, the originals may change."""
        staged, buffers = {}, {}
        waits: torch.device | None = None
        for name, tensor in tensors.items():
            local = local_part(tensor)
            on_device = local.device.type != "cpu"
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                # Pinned memory lets the device copy while the host goes on to the next tensor.
                buffer = torch.empty(
                    local.shape, dtype=local.dtype, pin_memory=on_device and local.numel() > 0
                )
            buffer.copy_(local, non_blocking=on_device)
            waits = local.device if on_device else waits
            buffers[name] = buffer
            staged[name] = _like(tensor, buffer)
        if waits is not None:
            torch.accelerator.synchronize(waits)
        self._buffers = buffers
        return staged

    def release(self) -> None:
        self._buffers = {}


def _like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    if not is_dtensor(tensor):
        return buffer
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    # from_local would move the buffer to the mesh's device; only the placement is wanted.
    return DTensor(buffer, tensor._spec, requires_grad=False)
