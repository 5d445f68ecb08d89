"""Context parallelism: sequences in parts, one on each rank of a group, and attention over all.

Each rank has its part of every sequence, and all heads. For attention the ranks exchange: each gets
whole sequences of some of the heads, and gives them back after (Ulysses; Jacobs et al., 2023,
https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from paceline.errors import ConfigError, DataError
from paceline.world.batches import each_leaf

_mesh: DeviceMesh | None = None  # of the ranks that share a sequence, while a batch is computed


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` over whole sequences.

    With `Parallel(context=...)` the tensors are this rank's part of each sequence; otherwise the
    call is passed on as it is.

    Args:
        query, key, value: [batch, heads, length, size] of this rank's part.
        options: `is_causal`, `scale`, `dropout_p` or `enable_gqa`, as torch takes them.

    Returns:
        [batch, heads, length, size] of the same part.

    Raises:
        ConfigError: the ranks cannot share the heads out evenly, or a mask is given for parts.
    """
    if _mesh is None:
        return F.scaled_dot_product_attention(query, key, value, **options)
    if options.get("attn_mask") is not None:
        raise ConfigError(
            "attention(attn_mask=...) does not exist yet with parallel.context: use is_causal=True."
        )
    uneven = [t.shape[1] for t in (query, key, value) if t.shape[1] % _mesh.size()]
    if uneven:
        raise ConfigError(
            f"parallel.context={_mesh.size()}: {uneven[0]} heads cannot be shared out evenly."
        )
    q, k, v = (_exchanged(t, 2, 1, _mesh) for t in (query, key, value))
    return _exchanged(F.scaled_dot_product_attention(q, k, v, **options), 1, 2, _mesh)


def positions(length: int, device: torch.device | None = None) -> torch.Tensor:
    """Where in the sequence this rank's `length` elements stand: 0 to length - 1 on a single one.

    Args:
        length: elements that are here.
        device: of the indices, int64 [length].
    """
    rank = 0 if _mesh is None else _mesh.get_local_rank()
    return torch.arange(rank * length, (rank + 1) * length, device=device)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it would compute now, for whenever it is called: a backward pass, say."""
    mesh = _mesh
    if mesh is None:
        return function

    def computed(*args: Any, **kwargs: Any) -> Any:
        with _shared_over(mesh):
            return function(*args, **kwargs)

    return computed


@contextmanager
def _shared_over(mesh: DeviceMesh) -> Iterator[None]:
    global _mesh
    before, _mesh = _mesh, mesh
    try:
        yield
    finally:
        _mesh = before


class Sequences:
    """While it is entered, `attention` and `positions` speak of parts of sequences.

    Args:
        mesh: the ranks that share a sequence.
        inner: another context, entered within; reusable, as this one is.
    """

    def __init__(self, mesh: DeviceMesh, inner: AbstractContextManager[Any]) -> None:
        self._mesh = mesh
        self._inner = inner

    def __enter__(self) -> None:
        global _mesh
        _mesh = self._mesh
        self._inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        global _mesh
        _mesh = None
        self._inner.__exit__(*raised)


def part_of(batch: Any, mesh: DeviceMesh) -> Any:
    """This rank's part of a batch: of each tensor [batch, length, ...] its share of the length.

    Args:
        batch: tensors, in lists, tuples and dictionaries; those of fewer dimensions stay whole.
        mesh: the ranks that share a sequence.

    Raises:
        DataError: a length does not divide, or an object holds tensors that cannot be seen.
    """

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            if hasattr(leaf, "to"):
                raise DataError(
                    f"parallel.context: the parts of a {type(leaf).__name__} are not known: give "
                    "its tensors in a dictionary, list or tuple."
                )
            return leaf
        if leaf.dim() < 2:
            return leaf
        if leaf.shape[1] % mesh.size():
            raise DataError(
                f"parallel.context={mesh.size()} does not divide the second dimension of a tensor "
                f"of shape {tuple(leaf.shape)} in the batch: pad sequences to a multiple of it."
            )
        return leaf.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()

    return each_leaf(batch, part)


def _exchanged(tensor: torch.Tensor, source: int, target: int, mesh: DeviceMesh) -> torch.Tensor:
    """A tensor in parts along `source`, in parts along `target` instead."""
    from torch.distributed.tensor import DTensor, Shard

    spread = DTensor.from_local(tensor.contiguous(), mesh, [Shard(source)], run_check=False)
    return spread.redistribute(placements=[Shard(target)]).to_local()
