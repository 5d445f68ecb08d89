"""Replicas: torch's DistributedDataParallel, and what the loop asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from paceline.errors import LossError
from paceline.world.dtensors import local_part


class Synchronizer(Protocol):
    """Keeps one model's copies equal, or its parts together: a `Replica`, `Shards`, `StageShards`.

    Attributes:
        called: whether the model was called through it, gradients on, in this micro-batch.
        covered: the `id` of each parameter whose gradient it synchronizes.
        delivered: whether each NaN that it was told of in this window has reached the other ranks.
    """

    called: bool
    delivered: bool

    @property
    def covered(self) -> Set[int]:
        """See above."""
        ...

    def begin(self, *, exchange: bool) -> None:
        """A micro-batch begins; gradients are synchronized in the window's last."""
        ...

    def check_exchanged(self) -> None:
        """Raises LossError if gradients were not synchronized."""
        ...


class Replica(DistributedDataParallel):
    """DDP that answers for the attributes of the module it wraps, and knows if it was called.

    Attributes:
        called: whether the module was called through it, gradients on, in this micro-batch.
        covered: the `id` of each parameter whose gradient it exchanges.
        sentinel: its smallest trainable parameter, whose gradient tells of the others' NaN.
        delivered: whether all that it was told in this window has reached that gradient.
        whole_way: whether ranks exchange something within the model too, so that the backward pass
            of a loss of zero has to take the whole way.
    """

    called = False
    delivered = True
    whole_way = False
    _probes: list[torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if torch.is_grad_enabled():
            vars(self)["called"] = True
            if self.whole_way:
                vars(self).setdefault("_probes", []).extend(probes(outputs))
        return outputs

    def begin(self, *, exchange: bool) -> None:
        """A micro-batch begins; gradients are exchanged in the window's last."""
        vars(self).update(called=False, require_backward_grad_sync=exchange, _probes=[])

    @property
    def covered(self) -> frozenset[int]:
        return frozenset(id(p) for p in self.module.parameters() if p.requires_grad)

    @cached_property
    def sentinel(self) -> torch.nn.Parameter:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return min(parameters, key=torch.Tensor.numel)

    def attach(self, loss: torch.Tensor, poison: torch.Tensor | float) -> torch.Tensor:
        """Adds zero, or NaN, to a loss, so that the sentinel gets it as its gradient.

        Args:
            loss: a scalar.
            poison: zero, or NaN if the loss is not finite; a number or a scalar.
        """
        return loss + (self.sentinel * poison).sum()

    def verdict(self) -> torch.Tensor | None:
        """Whether a rank has told of a NaN in this window; None if no gradient can tell."""
        gradient = self.sentinel.grad
        return None if gradient is None else ~torch.isfinite(gradient.sum())

    def zero_loss(self) -> torch.Tensor:
        """A loss of zero whose backward pass takes part in the exchange of this micro-batch."""
        zero = zero_loss(self.module.parameters())
        return zero + zero_of(self._probes) if self.whole_way else zero

    def check_exchanged(self) -> None:
        """Refuses gradients that every rank keeps to itself.

        Raises:
            LossError: there are some, but the module was not called, so DDP exchanged none.
        """
        if self.called or all(p.grad is None for p in self.module.parameters()):
            return
        raise LossError(
            f"{type(self.module).__name__} has gradients that the ranks did not exchange: its "
            "parameters or methods were used without calling it, in the last micro-batch of the "
            "window at least. On several ranks call the model itself, self.model(...), and put "
            "the computation into its forward()."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The user's module, without a Replica around it."""
    return model.module if isinstance(model, Replica) else model


def replicate(
    module: torch.nn.Module, device: torch.device, *, whole_way: bool, group: Any = None
) -> Replica:
    """Has DDP keep the copies of a module equal, on all ranks or those of a group.

    Args:
        module: with equal values on all of them.
        device: where it is.
        whole_way: whether ranks exchange something within the model too; see `Replica`.
        group: the process group; None for all ranks.
    """
    device_ids = None if device.type == "cpu" else [device]
    replica = Replica(module, device_ids=device_ids, process_group=group)
    _fix_buckets(replica)
    vars(replica)["whole_way"] = whole_way
    return replica


def _fix_buckets(replica: Replica) -> None:
    """Makes DDP arrange its gradient buckets now, the same way in every process that ever starts.

    DDP rearranges them after its first backward pass, which moves elements between the ranks'
    partial sums: a run wrapped anew in the middle would round differently from one that went on.
    Two backward passes of a zero loss over all parameters, in their order, settle it.
    """
    module = replica.module
    parameters = [p for p in module.parameters() if p.requires_grad]
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    own = vars(module).get("forward")
    module.forward = partial(zero_loss, parameters)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for _ in range(2):
            replica().backward()
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    for parameter in parameters:
        parameter.grad = None
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)


def zero_loss(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """A loss of zero that depends on every parameter: each gets a gradient of zeros."""
    return torch.stack([(p * 0).sum().float() for p in parameters if p.requires_grad]).sum()


def probes(outputs: Any) -> list[torch.Tensor]:
    """One element of each output, copied: the output itself is free to go."""
    return [
        local_part(leaf).reshape(-1)[:1].sum().float()
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]


def zero_of(probes: list[torch.Tensor]) -> torch.Tensor:
    """A loss of zero whose backward pass goes through all that has made these."""
    return torch.stack([probe * 0 for probe in probes]).nan_to_num(0, 0, 0).sum()
