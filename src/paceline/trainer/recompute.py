"""Activation checkpointing: blocks that keep little of their forward pass and repeat it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from paceline.trainer.blocks import needed_blocks
from paceline.world.context import as_now

_aten = torch.ops.aten
# What costs far more to compute than to keep: matrix products and attention.
_KEPT = [
    operation.default
    for operation in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten.baddbmm,
        _aten._scaled_mm,
        _aten.convolution,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_cudnn_attention,
    )
]


def recompute_blocks(module: torch.nn.Module, name: str, which: str) -> list[torch.nn.Module]:
    """Has each repeated block of a model repeat its forward pass during the backward pass.

    Random numbers are drawn as the first time, so losses and gradients stay bit for bit the same.
    Parameters keep their names.

    Args:
        module: the model, not sharded yet.
        name: its name, for messages.
        which: "full" keeps a block's inputs alone; "selective" its matrix products and attention
            too, so that only what is cheap is repeated.

    Returns:
        The blocks; each has a `forward` of its own in its `__dict__` now.

    Raises:
        ConfigError: the model has no repeated blocks.
    """
    setting = f"parallel.activation_checkpointing={which!r}"
    blocks = needed_blocks(module, name, setting)
    options: dict[str, Any] = {}
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    for block in blocks:
        vars(block)["forward"] = _twice(block.forward, options)
    return blocks


def _twice(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(as_now(forward), *args, use_reentrant=False, **options, **kwargs)

    return computed
