"""Replicas: torch's DistributedDataParallel, and what the loop asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from paceline.errors import ConfigError, LossError
from paceline.world.dtensors import local_part

_NONE: frozenset[int] = frozenset()

# Of a module, whoever has registered them.
_HOOKS = [name for name in vars(torch.nn.Module()) if "hooks" in name]


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

    def exchange_without(self, frozen: Set[int]) -> None:
        """Leaves frozen parameters, by their `id`, out of what is exchanged from now on."""
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
        delivered: whether all that it was told in this window has reached that gradient: always.
        whole_way: whether ranks exchange something within the model too, so that the backward pass
            of a loss of zero has to take the whole way.
        placed: the parameters that required gradients as it was made.
        exchanged: the parameters whose gradients it exchanges, in torch's order; none while all of
            them are frozen.
        sparse: the `id` of each whose gradient is sparse.
    """

    called = False
    delivered = True
    whole_way = False
    placed: list[torch.nn.Parameter]
    exchanged: list[torch.nn.Parameter]
    sparse: frozenset[int] = _NONE
    _probes: list[torch.Tensor]
    _factor: torch.Tensor | float | None = None  # of the sentinel's gradients: 1, or NaN
    _verdict: torch.Tensor | None = None  # the sentinel's gradient as it was exchanged
    _handle: Any = None  # of the hook that multiplies
    _exchanges: bool = True  # in the micro-batch at hand
    _ready: list[int] | None = None  # when each gradient last was, in the exchange before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if torch.is_grad_enabled() and self.exchanged:
            vars(self)["called"] = True
            if self.whole_way:
                vars(self).setdefault("_probes", []).extend(probes(outputs))
        return outputs

    def begin(self, *, exchange: bool) -> None:
        """A micro-batch begins; gradients are exchanged in the window's last."""
        state = vars(self)
        if self._exchanges:  # in the last one: a window begins
            state.update(_factor=None, _verdict=None, _ready=None)
        elif exchange:
            state["_ready"] = self.reducer.get_backward_stats()
        state.update(called=False, _exchanges=exchange, _probes=[])
        state["require_backward_grad_sync"] = exchange and bool(self.exchanged)

    @property
    def covered(self) -> frozenset[int]:
        return frozenset(map(id, self.exchanged))

    def exchange_without(self, frozen: Set[int]) -> None:
        """Exchanges the gradients of all but some of its parameters from now on.

        DDP is made anew for it, in all ranks at the same boundary: it would wait for the gradient
        of each parameter, and exchange it, for as long as it lasts.

        Args:
            frozen: the `id` of each parameter that is frozen; others may be among them.
        """
        wanted = [p for p in self.placed if id(p) not in frozen]
        if list(map(id, wanted)) == list(map(id, self.exchanged)):
            return
        state = vars(self)
        if not wanted:  # which DDP refuses
            state.update(exchanged=[], sparse=_NONE)
            return
        kept = {name: state[name] for name in ("training", *_HOOKS)}
        comm_hooks = self._comm_hooks
        for name in ("reducer", "logger"):  # the old reducer's hooks go with it
            state.pop(name)
        with trainable(wanted):
            super().__init__(
                self.module,
                device_ids=self.device_ids,
                process_group=self.process_group,
                init_sync=False,  # the copies are equal
            )
            self.settle()
        state.update(kept)
        for hook, of_hook in comm_hooks:
            self.register_comm_hook(of_hook, hook)

    def settle(self) -> None:
        """Finds what it exchanges, and fixes how; DDP was just made."""
        state = vars(self)
        state.pop("sentinel", None)
        state.update(_factor=None, _verdict=None, _ready=None, _exchanges=True, called=False)
        state["exchanged"] = [p for p in self.module.parameters() if p.requires_grad]
        state["sparse"] = frozenset(sparse_parameters(self.module))
        with hooks_off(self.exchanged):
            _fix_buckets(self)

    @cached_property
    def sentinel(self) -> torch.nn.Parameter:
        dense = [p for p in self.exchanged if id(p) not in self.sparse]
        return min(dense or self.exchanged, key=torch.Tensor.numel)

    def attach(self, poison: torch.Tensor | float) -> None:
        """Has the sentinel's gradient become NaN in this window's exchange if a loss is not finite.

        Args:
            poison: zero, or NaN if the loss is not finite; a number or a scalar.
        """
        state, factor = vars(self), poison + 1
        if self._handle is None:
            state["_handle"] = self.sentinel.register_hook(self._mark)
        state["_factor"] = factor if self._factor is None else self._factor * factor

    def _mark(self, gradient: torch.Tensor) -> torch.Tensor:
        """Before the exchange, and only of a gradient that the loss makes."""
        factor = self._factor
        if isinstance(factor, torch.Tensor):
            factor = factor.to(gradient.dtype)
        return gradient if factor is None else gradient * factor

    def verdict(self) -> torch.Tensor | None:
        """Whether a rank has marked a NaN in this window; None if no gradient can show it."""
        if not self.exchanged:
            return None
        gradient = self.sentinel.grad if self._verdict is None else self._verdict
        return None if gradient is None else ~torch.isfinite(gradient.sum())

    def zero_loss(self) -> torch.Tensor:
        """A loss of zero whose backward pass takes part in the exchange of this micro-batch."""
        zero = zero_loss(self.module.parameters(), self.sparse)
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

    def finish_exchange(self) -> list[torch.nn.Parameter]:
        """Exchanges, as zeros, the gradients that this rank's backward passes did not reach.

        torch waits for all of them; until then it exchanges nothing that shares a bucket with one.

        Returns:
            Those parameters without any gradient in this window.

        Raises:
            RuntimeError: torch does not say which they are.
        """
        if not self.exchanged:
            return []
        missing = self._unreached()
        left_out = [p for p in missing if p.grad is None]
        if missing:
            with trainable(missing), hooks_off(missing):
                zero = zero_loss(missing, self.sparse)
                (zero if self._factor is None else zero * self._factor).backward()
        if self._handle is not None:
            self._handle.remove()
        vars(self).update(_handle=None, _verdict=self.sentinel.grad)
        return left_out

    def _unreached(self) -> list[torch.nn.Parameter]:
        """Nothing but torch's message says which they are: its map of used parameters is kept with
        `find_unused_parameters` alone, which looks at outputs and not at the loss.
        """
        try:
            self.reducer._check_reducer_finalized()
        except RuntimeError as error:
            if (
                named := re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            ) is None:
                raise
            return [self.exchanged[int(index)] for index in named[1].split()]
        begun = self._ready is None or self._ready != self.reducer.get_backward_stats()
        if self.called and (not begun or all(p.grad is None for p in self.exchanged)):
            return self.exchanged  # no loss of this rank has reached it, one of another may have
        return []

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
    placed = [p for p in module.parameters() if p.requires_grad]
    vars(replica).update(whole_way=whole_way, placed=placed)
    replica.settle()
    return replica


def _fix_buckets(replica: Replica) -> None:
    """Makes DDP arrange its gradient buckets now, the same way in every process that ever starts.

    DDP rearranges them after its first backward pass, which moves elements between the ranks'
    partial sums: a run wrapped anew in the middle would round differently from one that went on.
    Two backward passes of a zero loss over all parameters, in their order, settle it.
    """
    module, parameters = replica.module, replica.exchanged
    replica.module = _Zero(parameters, replica.sparse)  # no hook of the user's, nothing compiled
    replica.broadcast_buffers = False
    try:
        for _ in range(2):
            replica().backward()
    finally:
        replica.module = module
        replica.broadcast_buffers = True
    for parameter in parameters:
        parameter.grad = None


class _Zero(torch.nn.Module):
    """Computes `zero_loss`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], sparse: Set[int]) -> None:
        super().__init__()
        self._loss = partial(zero_loss, parameters, sparse)

    def forward(self) -> torch.Tensor:
        return self._loss()


def zero_loss(parameters: Iterable[torch.nn.Parameter], sparse: Set[int] = _NONE) -> torch.Tensor:
    """A loss of zero that depends on every parameter: each gets a gradient of zeros.

    Args:
        parameters: those that require no gradient are left out.
        sparse: the `id` of each whose gradient is sparse.
    """
    return torch.stack([times_zero(p, sparse) for p in parameters if p.requires_grad]).sum()


def times_zero(parameter: torch.nn.Parameter, sparse: Set[int]) -> torch.Tensor:
    """Zero, with a gradient of the kind that the parameter's module makes.

    Args:
        parameter: of any shape.
        sparse: the `id` of each parameter whose gradient is sparse.
    """
    if id(parameter) not in sparse:
        return (parameter * 0).sum().float()
    row = torch.zeros(1, dtype=torch.int64, device=parameter.device)
    return (torch.nn.functional.embedding(row, parameter, sparse=True) * 0).sum().float()


def sparse_parameters(module: torch.nn.Module) -> dict[int, str]:
    """The names of the trainable parameters whose gradients are sparse, by their `id`."""
    return {
        id(part.weight): f"{name}.weight".lstrip(".")
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag)
        and part.sparse
        and part.weight.requires_grad
    }


@contextmanager
def trainable(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within it parameters require gradients, also those that were frozen since."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    yield
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None


@contextmanager
def hooks_off(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A context in which the user's hooks on parameters are not called."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    held: list[tuple[Any, str, Any]] = [
        (parameter, name, hooks)
        for parameter in parameters
        for name in names
        if (hooks := getattr(parameter, name))
    ]
    for parameter, name, _ in held:
        setattr(parameter, name, None)
    yield
    for parameter, name, hooks in held:
        setattr(parameter, name, hooks)


def probes(outputs: Any) -> list[torch.Tensor]:
    """One element of each output, copied: the output itself is free to go."""
    return [
        local_part(tensor).reshape(-1)[:1].sum().float()
        for tensor in tensors_in(outputs)
        if tensor.requires_grad
    ]


def tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """The tensors in containers, and in the attributes of objects such as dataclasses.

    Args:
        value: anything.
        depth: how deep objects may lie within one another.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (torch.nn.Module, type)):
            names = getattr(leaf, "__slots__", ())
            slots = [getattr(leaf, n, None) for n in ([names] if isinstance(names, str) else names)]
            for inner in (*getattr(leaf, "__dict__", {}).values(), *slots):
                yield from tensors_in(inner, depth - 1)


def zero_of(probes: list[torch.Tensor]) -> torch.Tensor:
    """A loss of zero whose backward pass goes through all that has made these.

    Raises:
        ConfigError: there are none.
    """
    if not probes:
        raise ConfigError(
            "a rank without samples in this window takes part with the outputs of its model, in "
            "which there is no tensor with a gradient: return tensors, containers or dataclasses."
        )
    return torch.stack([probe * 0 for probe in probes]).nan_to_num(0, 0, 0).sum()
