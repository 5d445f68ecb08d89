"""Context parallelism: sequences in parts, one on each rank of a group, and attention over all.

Each rank has its part of every sequence, and all heads. For attention the ranks exchange, in one of
two ways:

- all-to-all: each gets whole sequences of some of the heads, and gives them back after (Ulysses;
  Jacobs et al., 2023, https://arxiv.org/abs/2309.14509).
- ring: each keeps its queries, and the keys and values of one rank after the other come by (Liu et
  al., 2023, https://arxiv.org/abs/2310.01889). It is torch's
  `torch.distributed.tensor.experimental.context_parallel`. A rank has an early and a late piece of
  each sequence, so that causal attention is as much work on each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from paceline.data.batches import each_leaf
from paceline.errors import ConfigError, DataError

_entered: Sequences | None = None  # while a batch of parts is computed


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
        ConfigError: the ranks cannot share the heads out evenly, a mask is given for parts, or the
            ring cannot compute it.
    """
    if _entered is None:
        return F.scaled_dot_product_attention(query, key, value, **options)
    _entered.attends = True
    if options.get("attn_mask") is not None:
        raise ConfigError(
            "attention(attn_mask=...) does not exist yet with parallel.context: use is_causal=True."
        )
    if _entered.ring:
        return _by_ring(query, key, value, _entered.mesh, **options)
    return _by_all_to_all(query, key, value, _entered.mesh, **options)


def positions(length: int, device: torch.device | None = None) -> torch.Tensor:
    """Where in the sequence this rank's `length` elements stand: 0 to length - 1 on a single one.

    Args:
        length: elements that are here.
        device: of the indices, int64 [length].
    """
    if _entered is None:
        return torch.arange(length, device=device)
    whole = torch.arange(length * _entered.mesh.size(), device=device)
    return _part(whole, 0, _entered.mesh, _entered.ring)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it would compute now, for whenever it is called: a backward pass, say."""
    now = _entered
    if now is None:
        return function

    def computed(*args: Any, **kwargs: Any) -> Any:
        with _speaking_of(now):
            return function(*args, **kwargs)

    return computed


@contextmanager
def _speaking_of(sequences: Sequences) -> Iterator[None]:
    global _entered
    before, _entered = _entered, sequences
    try:
        yield
    finally:
        _entered = before


class Sequences:
    """While it is entered, `attention` and `positions` speak of parts of sequences.

    Args:
        mesh: the ranks that share a sequence.
        inner: another context, entered within; to be entered within itself too, as this one is.
        ring: whether attention is torch's ring, and parts are cut for it; see `ring_attention`.
        in_stages: whether no rank computes all of a model, so that `check` waits to be called.

    Attributes:
        attends: whether `attention` has been called; if not by its first end, a warning says so.
        checked: whether that was looked at.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        inner: AbstractContextManager[Any],
        *,
        ring: bool = False,
        in_stages: bool = False,
    ) -> None:
        self.mesh = mesh
        self.ring = ring
        self.attends = False
        self.checked = False
        self._in_stages = in_stages
        self._inner = inner
        self._before: list[Sequences | None] = []

    def __enter__(self) -> None:
        global _entered
        self._before.append(_entered)
        _entered = self
        self._inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        global _entered
        _entered = self._before.pop()
        self._inner.__exit__(*raised)
        if not (self.checked or self._in_stages or any(raised)):
            self.check(attends=self.attends)

    def check(self, *, attends: bool) -> None:
        """Warns if a model was computed and has not called `attention`."""
        self.checked = True
        if not attends:
            warnings.warn(
                f"parallel.context={self.mesh.size()}: this model has not called "
                "paceline.parallel.attention. If it attends by other means, each process sees its "
                "own part of a sequence alone.",
                stacklevel=2,
            )


def part_of(batch: Any, mesh: DeviceMesh, *, ring: bool = False) -> Any:
    """This rank's part of a batch: of each tensor [batch, length, ...] its share of the length.

    Args:
        batch: tensors, in lists, tuples and dictionaries; those of fewer dimensions stay whole.
        mesh: the ranks that share a sequence.
        ring: whether parts are cut for torch's ring attention.

    Raises:
        DataError: a length does not divide, or an object holds tensors that cannot be seen.
    """
    pieces = mesh.size() * (2 if ring else 1)

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
        if leaf.shape[1] % pieces:
            each = ", in two pieces each for the ring," if ring else ""
            raise DataError(
                f"parallel.context={mesh.size()}{each} does not divide the second dimension of a "
                f"tensor of shape {tuple(leaf.shape)} in the batch: pad sequences to a multiple of "
                f"{pieces}."
            )
        return _part(leaf, 1, mesh, ring)

    return each_leaf(batch, part)


def why_no_ring(device: torch.device) -> str | None:
    """Why torch's ring attention cannot be had here; None if it can."""
    from torch.distributed.tensor.experimental import _attention

    if device.type != "cuda":
        return f"torch's ring attention has no {device.type.upper()} kernel"
    if not hasattr(_attention, "_enable_context_parallel_dispatcher"):
        return f"torch {torch.__version__} is too old for its ring attention"
    return None


@contextmanager
def ring_attention() -> Iterator[None]:
    """While it is entered, torch computes attention of sequences in parts by its ring.

    It holds for backward passes too, and so for longer than `Sequences`.
    """
    from torch.distributed.tensor.experimental import _attention as torchs

    options = torchs._cp_options
    before, options.enable_load_balance = options.enable_load_balance, True
    torchs._enable_context_parallel_dispatcher()
    try:
        yield
    finally:
        torchs._disable_context_parallel_dispatcher()
        options.enable_load_balance = before


def _part(tensor: torch.Tensor, dim: int, mesh: DeviceMesh, ring: bool) -> torch.Tensor:
    """This rank's share; for the ring an early and a late piece, which make as much work on each.

    It is the order of torch's `_HeadTailLoadBalancer`.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    if not ring:
        return tensor.chunk(size, dim)[rank].contiguous()
    pieces = tensor.chunk(2 * size, dim)
    return torch.cat([pieces[rank], pieces[-1 - rank]], dim)


def whole_of(part: torch.Tensor, mesh: DeviceMesh, *, ring: bool = False) -> torch.Tensor:
    """Sequences from the parts that `part_of` made, on each rank that has one.

    Args:
        part: [samples, this rank's positions, ...].
        mesh: the ranks that share a sequence.
        ring: whether the parts are cut for torch's ring attention.

    Returns:
        [samples, positions, ...], in their order.
    """
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(part.contiguous(), mesh, [Shard(1)], run_check=False).full_tensor()
    if not ring:
        return whole
    pieces = whole.chunk(2 * mesh.size(), 1)
    return torch.cat([*pieces[::2], *reversed(pieces[1::2])], 1)


def _by_all_to_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mesh: DeviceMesh, **options: Any
) -> torch.Tensor:
    uneven = [t.shape[1] for t in (query, key, value) if t.shape[1] % mesh.size()]
    if uneven:
        raise ConfigError(
            f"parallel.context={mesh.size()}: {uneven[0]} heads cannot be shared out evenly."
        )
    q, k, v = (_exchanged(t, 2, 1, mesh) for t in (query, key, value))
    return _exchanged(F.scaled_dot_product_attention(q, k, v, **options), 1, 2, mesh)


def _exchanged(tensor: torch.Tensor, source: int, target: int, mesh: DeviceMesh) -> torch.Tensor:
    """A tensor in parts along `source`, in parts along `target` instead."""
    from torch.distributed.tensor import DTensor, Shard

    spread = DTensor.from_local(tensor.contiguous(), mesh, [Shard(source)], run_check=False)
    return spread.redistribute(placements=[Shard(target)]).to_local()


def _by_ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mesh: DeviceMesh, **options: Any
) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not options.pop("is_causal", False):
        _refuse("is_causal=False", "its parts are cut for causal attention")
    if options.pop("dropout_p", 0.0):
        _refuse("dropout_p=...", "its backward pass does not know what each step has dropped")
    if options.pop("enable_gqa", False):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    q, k, v = (
        DTensor.from_local(t, mesh, [Shard(2)], run_check=False) for t in (query, key, value)
    )
    # The other kernel, torch's MATH, takes parts for what follows one another in the sequence.
    fused = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    with sdpa_kernel([*fused]):
        out: Any = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    return out.to_local()


def _refuse(argument: str, why: str) -> None:
    raise ConfigError(
        f"attention({argument}) does not exist with parallel.context_attention='ring': {why}; "
        "'all_to_all' has it."
    )
