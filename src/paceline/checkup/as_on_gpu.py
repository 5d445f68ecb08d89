"""What torch does differently on a GPU than on a CPU, as far as it affects memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
_IN_FLOAT32 = frozenset(
    [
        "__pow__",
        "__rdiv__",
        "__rpow__",
        "__rtruediv__",
        "acos",
        "asin",
        "binary_cross_entropy_with_logits",
        "cosh",
        "cosine_embedding_loss",
        "cdist",
        "cosine_similarity",
        "cross_entropy",
        "cumprod",
        "cumsum",
        "dist",
        "erfinv",
        "exp",
        "expm1",
        "group_norm",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "layer_norm",
        "log",
        "log10",
        "log_softmax",
        "log1p",
        "log2",
        "margin_ranking_loss",
        "mse_loss",
        "multilabel_margin_loss",
        "multi_margin_loss",
        "nll_loss",
        "norm",
        "normalize",
        "pdist",
        "poisson_nll_loss",
        "pow",
        "prod",
        "reciprocal",
        "rsqrt",
        "sinh",
        "smooth_l1_loss",
        "soft_margin_loss",
        "softmax",
        "softmin",
        "softplus",
        "sum",
        "renorm",
        "tan",
        "triplet_margin_loss",
    ]
)
_HALVES = (torch.bfloat16, torch.float16)


class AutocastAsOnGpu(TorchFunctionMode):
    """Under autocast, computes in float32 the operations that autocast does so on a GPU.

    A CPU's autocast leaves some of them, such as softmax and layer norms, in the lower precision.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _in_float32, (args, kwargs))
        return func(*args, **kwargs)


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor


@contextmanager
def exchanged_as_on_gpu() -> Iterator[None]:
    """Makes DTensors change their sharding dimension with an all-to-all, as on a GPU.

    Gloo, and so torch on a CPU, has no all-to-all: there each rank all-gathers the whole tensor.
    """
    placements: Any = importlib.import_module("torch.distributed.tensor.placement_types")
    on_cpu = placements.shard_dim_alltoall

    def exchange(tensor: Any, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int) -> Any:
        group = mesh.get_group(mesh_dim).group_name
        return torch.ops._dtensor.shard_dim_alltoall(tensor, gather_dim, shard_dim, group)

    placements.shard_dim_alltoall = exchange
    try:
        yield
    finally:
        placements.shard_dim_alltoall = on_cpu


def update_all_at_once(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer choose between its implementations as torch does on a GPU.

    See `torch.optim.optimizer._default_to_fused_or_foreach`.
    """
    for group in optimizer.param_groups:
        told = group.get("foreach", False) is not None or group.get("fused")
        if not told and not group.get("differentiable"):
            group["foreach"] = True
