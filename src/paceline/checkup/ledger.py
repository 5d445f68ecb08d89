"""A ledger of memory: every storage of a fake tensor, from its allocation to its release.

A fake tensor (torch's `FakeTensorMode`) has a shape, a dtype and a storage with a size, but no
memory. The memory that a run would take is the sum of its fake storages.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from paceline.world.dtensors import is_dtensor

_READ = torch.ops.aten._local_scalar_dense.default
_PASSING = {  # the argument of FSDP2's operations that is copied from the host, or to it
    "fsdp::all_gather_copy_in": 0,
    "c10d::_reduce_scatter_base_": 0,
}


@dataclass
class _Block:
    """A storage: its current size in bytes, its kind, and whether it is in the host's memory."""

    size: int
    kind: str
    on_host: bool = False


@dataclass(frozen=True)
class Peak:
    """The peak of the device's memory.

    Attributes:
        total: the peak in bytes.
        moment: the stage at which it occurs.
        parts: bytes by kind at that moment.
        most: the most bytes of each kind at any moment.
        on_host: the peak of all kinds together in the host's memory, which the others exclude.
    """

    total: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    on_host: int = 0


class Ledger(TorchDispatchMode):
    """Records the memory of fake tensors while it is entered (inside of their FakeTensorMode).

    A storage counts as an activation if gradients are enabled when it is allocated, else as
    temporary, until `hold` sets its kind; that may be later, since the sums are computed at the
    end. Torch's own `MemTracker` follows one module and one optimizer through their hooks; this
    needs neither, so it supports any training step.

    Reading a value (`.item()`, `if mask.any():`) gives 1, since a fake tensor has no values.

    Args:
        fake: the mode whose tensors count.
        offloads: whether sharded tensors are in the host's memory, and on the device only while
            they are all-gathered or reduced.

    Attributes:
        moment: the current stage, for `Peak.moment`.
        on_host: whether the current stage allocates in the host's memory.
    """

    ACTIVATIONS, TEMPORARY, GATHERED = "activations", "temporary", "gathered parameters"

    def __init__(self, fake: FakeTensorMode, *, offloads: bool = False) -> None:
        super().__init__()
        self.fake = fake
        self.moment = ""
        self.on_host = False
        self.offloads = offloads
        self._blocks: dict[int, tuple[Any, _Block]] = {}  # of live storages, by id
        # (block, change in bytes, stage, on the device although it belongs to the host)
        self._events: list[tuple[_Block, int, str, bool]] = []
        self._resize: Any = None

    def hold(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Sets the kind of tensors, from their allocation on.

        Args:
            kind: the kind.
            tensors: of any shape; those that are not fake are ignored.
        """
        for tensor in tensors:
            part: Any = tensor._local_tensor if is_dtensor(tensor) else tensor  # pyright: ignore
            if self.counts(part):
                block = self._block_of(part, kind)
                block.kind, block.on_host = kind, self.offloads and is_dtensor(tensor)

    def reserve(self, kind: str, size: int) -> None:
        """Adds a permanent block, for memory that torch keeps outside of tensors.

        Args:
            kind: the kind.
            size: in bytes.
        """
        self._note(_Block(size, kind), size)

    def peak(self) -> Peak:
        """The largest sum, and its parts."""
        total, most_total, moment = 0, 0, ""
        now: dict[str, int] = {}
        most: dict[str, int] = {}
        parts: dict[str, int] = {}
        for block, change, when, passing in self._events:
            if block.on_host != passing:
                continue
            total += change
            now[block.kind] = now.get(block.kind, 0) + change
            most[block.kind] = max(most.get(block.kind, 0), now[block.kind])
            if total > most_total:
                most_total, moment, parts = total, when, dict(now)
        return Peak(most_total, moment, parts, most, self._most_on_host())

    def _most_on_host(self) -> int:
        there = (change for block, change, _, passing in self._events if block.on_host > passing)
        return max(accumulate(there), default=0)

    def __enter__(self) -> Ledger:
        """Also patches `resize_`, which FSDP2 calls on gathered storages without a dispatch."""
        self._resize = resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if (found := self._blocks.get(id(storage))) is not None:
                block = found[1]
                change, block.size, block.kind = size - block.size, size, self.GATHERED
                self._note(block, change)
            return result

        torch.UntypedStorage.resize_ = noted  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor first dispatches to its local part
        if func is _READ and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        made = func(*args, **(kwargs or {}))
        if self.offloads and (which := _PASSING.get(func._schema.name)) is not None:
            self._pass(args[which])
        kind = self.ACTIVATIONS if torch.is_grad_enabled() else self.TEMPORARY
        for leaf in tree_leaves(made):
            if self.counts(leaf):
                self._block_of(leaf, kind)
        return made

    def _pass(self, tensors: Any) -> None:
        """Counts host tensors on the device for the duration of a copy."""
        blocks = [self._block_of(t, self.TEMPORARY) for t in tree_leaves(tensors) if self.counts(t)]
        self._events += [(block, block.size, self.moment, True) for block in blocks]
        self._events += [(block, -block.size, self.moment, True) for block in blocks]

    def counts(self, thing: Any) -> bool:
        """Whether it is a tensor of this mode; DTensor uses a mode of its own to compute shapes."""
        return type(thing) is FakeTensor and thing.fake_mode is self.fake

    def _block_of(self, tensor: torch.Tensor, kind: str) -> _Block:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._blocks:
            return self._blocks[key][1]
        block = _Block(storage.nbytes(), kind, self.on_host)

        def gone(_: Any) -> None:
            del self._blocks[key]
            self._note(block, -block.size)

        self._blocks[key] = weakref.ref(storage, gone), block
        self._note(block, block.size)
        return block

    def _note(self, block: _Block, change: int) -> None:
        self._events.append((block, change, self.moment, False))


def _one(dtype: torch.dtype) -> complex | bool:
    if dtype.is_complex:
        return 1 + 0j
    return 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 1
