"""torch's ring attention on CPUs: all of its code, with a CPU's kernel in a GPU's place.

What decides between kernels on a GPU is left out. From there on it is torch's own: how the ring's
operations are dispatched and differentiated, what each step computes, sends and adds up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

_aten = torch.ops.aten
_kept: list[Any] = []


def emulate(*, exact: bool = False) -> None:
    """Has this process, a rank that is about to end, take its CPU for a device with a ring.

    Args:
        exact: adds up in the precision of the tensors; the ring does so in float32.
    """
    from torch.distributed.tensor.experimental._attention import _cp_options

    from paceline.parallel import context_parallel

    context_parallel.why_no_ring = lambda device: None
    _cp_options.convert_to_f32 = not exact
    _kept.append(kernels := torch.library.Library("aten", "IMPL"))
    kernels.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    kernels.impl("_scaled_dot_product_flash_attention_backward", _flash_backward, "CPU")
    torch.nn.functional.scaled_dot_product_attention = _as_on_gpu


_on_cpu = torch.nn.functional.scaled_dot_product_attention


def _as_on_gpu(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
    if not isinstance(query, DTensor):
        return _on_cpu(query, key, value, **options)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.math_sdp_enabled()
    return _aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]


def _flash(
    query: Any,
    key: Any,
    value: Any,
    dropout: float = 0.0,
    is_causal: bool = False,
    debug: bool = False,
    **scale: Any,
) -> tuple[Any, ...]:
    out, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, is_causal, **scale
    )
    seed, unused = torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    lengths = None, None, query.shape[2], key.shape[2]
    return out, sums, *lengths, seed, unused, unused.new_empty(0)


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any,
    starts: Any, key_starts: Any, length: int, key_length: int,
    dropout: float, is_causal: bool, seed: Any, unused: Any, **scale: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, sums, dropout, is_causal, **scale
    )
