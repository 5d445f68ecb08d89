"""Activation checkpointing: blocks that keep little of their forward pass and repeat it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from paceline.parallel.blocks import needed_blocks
from paceline.parallel.context_parallel import as_now

_aten = torch.ops.aten
# What costs far more to compute than to keep: matrix products, attention, rows of other ranks.
_KEPT = [
    operation.default
    for operation in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten.baddbmm,
        _aten._scaled_mm,
        _aten._grouped_mm,
        _aten.convolution,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_cudnn_attention,
        torch.ops._c10d_functional.all_to_all_single,
    )
]


def checkpoint_blocks(module: torch.nn.Module, name: str, which: str) -> list[torch.nn.Module]:
    """Has each repeated block of a model repeat its forward pass during the backward pass.

    Random numbers are drawn as the first time, and buffers that a pass changes, such as running
    statistics, hold again what they held then and are changed once. So losses, gradients and
    buffers stay bit for bit the same. Parameters keep their names.

    Args:
        module: the model, not sharded yet.
        name: its name, for messages.
        which: "full" keeps a block's inputs alone; "selective" its matrix products, attention and
            rows of other ranks too, so that only what is cheap is repeated.

    Returns:
        The blocks; each has a `forward` of its own in its `__dict__` now.

    Raises:
        ConfigError: the model has no repeated blocks.
    """
    setting = f"parallel.activation_checkpointing={which!r}"
    blocks = needed_blocks(module, name, setting)
    options: dict[str, Any] = {}
    if which == "selective":
        options["context_fn"] = _contexts
    for block in blocks:
        vars(block)["forward"] = _twice(block, options)
    return blocks


def _twice(block: torch.nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    forward = block.forward

    def computed(*args: Any, **kwargs: Any) -> Any:
        function = forward
        # A compiled pass repeats values alone: it changes each buffer once, at its end.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            function = _Pass(block, forward)
        return checkpoint(as_now(function), *args, use_reentrant=False, **options, **kwargs)

    return computed


def _contexts() -> tuple[Any, Any]:
    """What keeps, in a block's first pass, and gives back, in the one that repeats it."""
    keeping, giving_back = create_selective_checkpoint_contexts(_KEPT)
    return keeping, _GivingBack(giving_back)


class _GivingBack(TorchDispatchMode):
    """torch's mode, asked for what is kept alone; it counts the rest as well.

    FSDP2 gathers parameters of experts within a block, by other operations the second time.

    Args:
        kept: torch's mode.
    """

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's mode: what is compiled runs as a whole."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT:
            return self._kept.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Pass:
    """One forward pass of a block: its first call is the true one, a later one repeats it.

    Args:
        block: whose pass it is.
        forward: what computes it.
    """

    def __init__(self, block: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._block = block
        self._forward = forward
        self._buffers: dict[str, torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._buffers is None:
            # All of them: some operations, such as batch norm's, change one and tell nobody.
            self._buffers = _copied(dict(self._block.named_buffers()))
            return self._forward(*args, **kwargs)
        with _reparametrize_module(self._block, _copied(self._buffers)):
            return self._forward(*args, **kwargs)


def _copied(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items()}
