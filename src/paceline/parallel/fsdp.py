"""Spread models: torch's FSDP2 and tensor parallelism, and what the loop asks of them.

Under FSDP2 every rank keeps a part of each parameter, its gradient and its optimizer state, and
gathers the parameters of a block when its turn comes. The blocks are the model's repeated parts;
what is left is gathered with the model itself. Split modules (`tensor_parallel.py`) are split
before, and each part is then sharded, or kept equal to its copies; so are experts that are shared
out (`expert_parallel.py`). Where the run computes in a
lower precision, parameters are gathered in it; what is kept, and the sum of gradients, are as
precise as the model was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from paceline.errors import ConfigError, some
from paceline.parallel.blocks import repeated_blocks
from paceline.parallel.ddp import probes, tensors_in, zero_of
from paceline.parallel.expert_parallel import distribute_experts, expert_modules, shard_dimension
from paceline.parallel.pipeline_stages import given_up_kept
from paceline.parallel.tensor_parallel import split_modules
from paceline.world.dtensors import is_dtensor, local_part, reshard
from paceline.world.world import World, send

Call = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


class Shards:
    """A model spread over ranks, seen from the loop: the counterpart of a `Replica`.

    Args:
        module: the model, whole; it is spread in place, which makes its parameters new ones.
        name: the model's name, for messages.
        world: the ranks.
        calls: takes the calls of a validation, together with other models'.
        compute: the dtype in which parameters are gathered; None for their own.
        materialize: gives a part of the model memory, if it has none yet.

    Attributes:
        module: the model.
        called: whether it was called, gradients on, in this micro-batch.
        covered: the `id` of each parameter that is sharded.
        renewed: what became of each parameter, by the `id` of what it was.
        sentinel: a parameter of which each rank has a part, and whose gradient therefore tells each
            of the others' NaN; None if there is none.
        delivered: whether all that it was told in the window of the last verdict has reached that
            gradient.

    Raises:
        ConfigError: the model cannot be spread.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        world: World,
        calls: list[Call],
        compute: torch.dtype | None = None,
        materialize: Callable[[torch.nn.Module], None] = lambda unit: None,
    ) -> None:
        self.module = module
        self.calls = calls
        self.called = False
        self._probes: list[torch.Tensor] = []
        before = dict(module.named_parameters())
        check_unspread(before, name, world)
        units = (*repeated_blocks(module), module)  # which share no parameter, as they are now
        if splits := world.parallel.tensor > 1:
            for unit in units:
                materialize(unit)
            _send_whole(module)
            split_modules(module, name, world)
        self._exchanges = world.parts > 1
        experts = expert_modules(module, name, world) if world.expert_mesh is not None else {}
        for unit in units if self._exchanges else ():
            if not splits:
                materialize(unit)
                _send_whole(unit)
            for key, part in experts.items():
                if any(part is inner for inner in unit.modules()):
                    _shard_experts(part, key, world, compute)
            _check_dtypes(unit, name, module, compute)
            _shard(unit, world, compute)
        self.renewed = {id(before[key]): p for key, p in module.named_parameters()}
        self.covered = frozenset(id(p) for p in module.parameters())
        self.delivered = True
        self._poison: torch.Tensor | float | None = None  # told, and not yet in a gradient
        self._lost = False  # some was not, in this window
        self._gathered: torch.Tensor | None = None  # the sentinel, as the model last computed with
        others = {id(p) for unit in (*units[:-1], *experts.values()) for p in unit.parameters()}
        own = [key for key, p in module.named_parameters() if id(p) not in others]
        self._own = [] if splits else own
        self._watched: Any = None  # the handle of the sentinel's hook
        self._choose_sentinel()
        module.register_forward_pre_hook(self._note_call, with_kwargs=True, prepend=True)
        module.register_forward_hook(self._note_outputs)
        module.register_forward_pre_hook(self._watch_sentinel)  # behind FSDP2's, which gathers

    def _choose_sentinel(self) -> None:
        self._place = _sentinel(self.module, self._own)
        self.sentinel = None if self._place is None else self.module.get_parameter(self._place)

    def exchange_without(self, frozen: Set[int]) -> None:
        """Follows a change of what is frozen; torch exchanges what has a gradient.

        Args:
            frozen: the `id` of each parameter that is frozen; others may be among them.
        """
        _follow_trained(self.module)
        if self._watched is not None:
            self._watched.remove()
        self._watched = self._gathered = None
        self._choose_sentinel()

    def begin(self, *, exchange: bool) -> None:
        """A micro-batch begins; gradients are exchanged in the window's last."""
        self.called = False
        self._probes = []
        self._lost |= self._poison is not None
        self._poison = None
        self.calls.clear()
        if self._exchanges:
            self.module.reshard()  # a hook's call may have gathered weights from before the step
            self.module.set_requires_gradient_sync(exchange)

    def check_exchanged(self) -> None:
        """Nothing to refuse: a sharded parameter that is used without a call is no plain tensor."""

    def attach(self, poison: torch.Tensor | float) -> None:
        """Adds zero, or NaN, to the sentinel's gradient in the next backward pass.

        Args:
            poison: zero, or NaN if the loss is not finite; a number or a scalar.
        """
        self._poison = poison

    def verdict(self) -> torch.Tensor | None:
        """Whether a rank has marked a NaN in this window; None if no gradient can show it.

        A part of a sum that is too large for its type says nothing: only its own rank sees it.
        """
        self.delivered = not self._lost and self._poison is None
        self._lost, self._poison = False, None
        if self.sentinel is None or self.sentinel.grad is None:
            return None
        return local_part(self.sentinel.grad).isnan().any()

    def zero_loss(self) -> torch.Tensor:
        """A loss of zero whose backward pass takes part in the exchange of this micro-batch."""
        return zero_of(self._probes)

    def _note_call(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            send(_kept_buffers(module))  # as DDP does: running statistics are rank 0's
        else:
            self.calls.append((module, args, kwargs))

    def _watch_sentinel(self, module: Any, args: Any) -> None:
        if self._place is None or not torch.is_grad_enabled():
            return
        gathered = module.get_parameter(self._place)
        if gathered is not self._gathered:
            self._watched = gathered.register_hook(self._mark)
            self._gathered = gathered

    def _mark(self, gradient: torch.Tensor) -> torch.Tensor:
        """Before the exchange: one NaN in a gradient becomes that of every rank's part of it."""
        poison, self._poison = self._poison, None
        return gradient + (gradient * 0).sum() + (0.0 if poison is None else poison)

    def _note_outputs(self, module: Any, inputs: Any, outputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.called = True
        self._probes += probes(outputs)


class FrozenShards:
    """A frozen model spread over ranks: gathered block by block for each call, and freed after it.

    It has no gradients, and so is none of `Trainer.replicas`. A loss that reaches a trained model
    through it gathers it once more in the backward pass, which all ranks have to do together.

    Args:
        module: the model, whole; it is spread in place, which makes its parameters new ones.
        name: the model's name, for messages.
        world: the ranks.
        calls: takes the calls of a validation, together with other models'.
        compute: the dtype in which parameters are gathered; None for their own.
        materialize: gives a part of the model memory, if it has none yet.

    Attributes:
        renewed: what became of each parameter, by the `id` of what it was.

    Raises:
        ConfigError: the model cannot be spread.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        world: World,
        calls: list[Call],
        compute: torch.dtype | None,
        materialize: Callable[[torch.nn.Module], None],
    ) -> None:
        self._module = module
        self._calls = calls
        self._probes: list[torch.Tensor] = []
        before = dict(module.named_parameters())
        check_unspread(before, name, world)
        for unit in (*repeated_blocks(module), module):
            materialize(unit)
            _send_whole(unit)
            # torch would leave what is no block's gathered, for a backward pass to come.
            _shard(unit, world, compute, reshard_after_forward=True)
        self.renewed = {id(before[key]): p for key, p in module.named_parameters()}
        module.register_forward_pre_hook(self._note_call, with_kwargs=True, prepend=True)
        module.register_forward_hook(self._note_outputs)  # behind FSDP2's

    @property
    def called(self) -> bool:
        """Whether a loss may reach a trained model through it, in this micro-batch."""
        return bool(self._probes)

    def begin(self) -> None:
        """A micro-batch begins."""
        if self._probes:
            self._probes = []
            _forget_calls(self._module)

    def zero_loss(self) -> torch.Tensor:
        """A loss of zero whose backward pass gathers what that of any other loss would."""
        return zero_of(self._probes)

    def _note_call(self, module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            self._calls.append((module, args, kwargs))

    def _note_outputs(self, module: Any, inputs: Any, outputs: Any) -> None:
        found = probes(outputs) if torch.is_grad_enabled() else []
        self._probes += found
        if not found:
            _forget_calls(module)


class StageShards:
    """A stage spread over the ranks that have it; one of `Trainer.replicas`, as `Shards` are.

    Where it is sharded, its parameters are gathered by the first micro-batch of a window, and stay
    so until gradients are exchanged in the last one's backward pass. In between ranks with samples
    of their own do not wait for each other: they may have other numbers of micro-batches, and take
    them in another order.

    Args:
        stage: what computes the stage; it is spread in place, which makes its parameters new ones.
        model: the whole model, of which it is a part.
        name: the model's name, for messages.
        world: the ranks.
        compute: the dtype in which parameters are gathered; None for their own.

    Attributes:
        covered: the `id` of each parameter of the stage.
        renewed: what became of each parameter, by the `id` of what it was.

    Raises:
        ConfigError: the model cannot be spread.
    """

    called = False  # by a schedule alone, which needs no word of a replica on a NaN
    delivered = True

    def __init__(
        self, stage: Any, model: Any, name: str, world: World, compute: torch.dtype | None
    ) -> None:
        check_unspread(dict(model.named_parameters()), name, world)
        self._stage = stage
        self._model = model
        self._name = name
        self._world = world
        self._compute = compute
        self._splits = world.parallel.tensor > 1
        self._exchanges = world.parts > 1
        self._blocks = repeated_blocks(model)
        self._parts = {id(part) for part in stage.modules()}
        self._before = [dict(stage.named_parameters())]
        self.renewed: dict[int, torch.nn.Parameter] = {}
        self.covered: frozenset[int] = frozenset()

    def take_block(self, block: torch.nn.Module) -> None:
        """Shards a block that has its values, if it is one of the stage's and not split first."""
        if not self._splits:
            self._shard(block)

    def take_all(self) -> None:
        """Splits modules, and shards what is left; the model gets the parameters that came of it.

        To be called when all of the stage has its values.
        """
        if self._splits:
            with given_up_kept(self._model):
                split_modules(self._model, self._name, self._world)
            self._before.append(dict(self._stage.named_parameters()))
            for block in self._blocks:
                self._shard(block)
        self._shard(self._stage)
        for part in self._stage.modules():
            if isinstance(part, FSDPModule):
                # Itself, which is there: what torch takes for the next one may be gone, and ranks
                # with other micro-batches take other ones for it.
                part.set_modules_to_backward_prefetch([part])
        now = dict(self._stage.named_parameters())
        self.renewed = {id(p): now[key] for before in self._before for key, p in before.items()}
        self._before.clear()  # they have the memory of the whole
        self.covered = frozenset(map(id, now.values()))
        for part in self._model.modules():  # another stage's may use them too
            for key, parameter in part._parameters.items():
                if id(parameter) in self.renewed:
                    part._parameters[key] = self.renewed[id(parameter)]

    def begin(self, *, exchange: bool) -> None:
        """A window begins, or the last backward pass of it, in which gradients are exchanged."""
        if not self._exchanges:
            return
        if not exchange:
            _forget_calls(self._stage)  # a stage whose parameters are frozen has no backward pass
        self._stage.set_is_last_backward(exchange)
        self._stage.set_reshard_after_backward(exchange)
        self._stage.set_requires_gradient_sync(exchange)

    def exchange_without(self, frozen: Set[int]) -> None:
        """Follows a change of what is frozen; torch exchanges what has a gradient.

        Args:
            frozen: the `id` of each parameter that is frozen; others may be among them.
        """
        _follow_trained(self._stage)

    def check_exchanged(self) -> None:
        """Nothing to refuse: the schedule makes all calls."""

    def _shard(self, unit: torch.nn.Module) -> None:
        if self._exchanges and id(unit) in self._parts:
            _shard(unit, self._world, self._compute, reshard_after_forward=False)


def _kept_buffers(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The buffers that checkpoints hold, as they are now: a model may assign them anew."""
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                yield buffer


def _follow_trained(module: torch.nn.Module) -> None:
    """Has FSDP2 look anew at which parameters are trained.

    It takes the dtypes in which a block's gradients are summed and kept from its trained
    parameters, once: of a block that is frozen then it would never know them.
    """
    reshard([module])
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                group._init_mp_dtypes()


def _forget_calls(module: Any) -> None:
    """Drops the list of calls that torch keeps until a backward pass ends, and there may be none.

    It is there to gather what the backward pass needs next a little earlier.
    """
    context = module._get_fsdp_state()._comm_ctx
    noted = vars(context).get("post_forward_order", [])  # there from the first call on
    for group in noted:
        group._post_forward_indices.clear()
    noted.clear()


def check_unspread(parameters: dict[str, torch.nn.Parameter], name: str, world: World) -> None:
    """Refuses a model that cannot be spread.

    Args:
        parameters: of the model, by name.
        name: the model's name, for messages.
        world: the ranks.

    Raises:
        ConfigError: it is spread already, or has parameters that cannot be sharded.
    """
    if any(is_dtensor(p) for p in parameters.values()):
        raise ConfigError(
            f"the model {name!r} is spread already, by an earlier run or by yourself: make a new "
            "Trainer with a new model and optimizer. With the run_dir of the earlier run it "
            "resumes that; to train further, give it more epochs or max_steps."
        )
    renews = world.parts * world.parallel.tensor > 1
    hooked = [key for key, p in parameters.items() if _has_hooks(p)] if renews else []
    if hooked:
        names = some([f"{name}.{key}" for key in hooked])
        raise ConfigError(
            f"{names}: has hooks on its gradient, which would not be called: this layout "
            "replaces a model's parameters. Change gradients in "
            "on_before_optimizer_step, or train on replicas (parallel.dp_shard=1, tensor=1)."
        )
    scalars = [key for key, p in parameters.items() if p.dim() == 0]
    frozen = not any(p.requires_grad for p in parameters.values())
    if scalars and world.parts > 1:
        whole = " Or leave frozen models whole, parallel.frozen='replicate'." if frozen else ""
        raise ConfigError(
            f"parallel.dp_shard={world.parallel.dp_shard}: the parameters "
            f"{', '.join(scalars)} of {name!r} have no dimension to shard: give them the "
            f"shape [1].{whole}"
        )


def _has_hooks(parameter: Any) -> bool:
    """Whether there are hooks of the user's on a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def check_hooks(models: Mapping[str, torch.nn.Module]) -> None:
    """Refuses hooks on sharded parameters' gradients that torch never calls.

    Args:
        models: by name, placed.

    Raises:
        ConfigError: there are some, made after the models were placed.
    """
    hooked = [
        f"{name}.{key}"
        for name, model in models.items()
        if isinstance(model, FSDPModule)
        for key, parameter in model.named_parameters()
        if parameter._backward_hooks
    ]
    if hooked:
        raise ConfigError(
            f"{some(hooked)}: torch calls no register_hook of a sharded parameter. Use "
            "register_post_accumulate_grad_hook, or on_before_optimizer_step."
        )


def _check_dtypes(
    unit: torch.nn.Module, name: str, whole: torch.nn.Module, compute: torch.dtype | None
) -> None:
    """Refuses trained parameters of several dtypes in what is gathered at once.

    Raises:
        ConfigError: naming one of each.
    """
    names = {id(p): f"{name}.{key}" for key, p in whole.named_parameters()}
    kinds: dict[torch.dtype, str] = {}
    norms = _norms(unit) if compute is not None else []
    apart = {id(p) for norm in norms for p in norm.parameters()}
    for parameter in unit.parameters():
        if parameter.requires_grad and not is_dtensor(parameter) and id(parameter) not in apart:
            kinds.setdefault(parameter.dtype, names.get(id(parameter), name))
    if len(kinds) > 1:
        said = " and ".join(
            f"{key} is {str(dtype).removeprefix('torch.')}" for dtype, key in kinds.items()
        )
        raise ConfigError(
            f"parallel.dp_shard: {said}, and FSDP2 gathers one dtype at a time: give the model "
            "one dtype (precision='bf16' computes in bfloat16), or train it on replicas."
        )


def _sentinel(module: torch.nn.Module, names: list[str]) -> str | None:
    """The smallest of these trainable parameters of which each rank has a part."""
    sizes: dict[str, int] = {}
    for name in names:
        parameter: Any = module.get_parameter(name)
        [(at, dim)] = [(i, p.dim) for i, p in enumerate(parameter.placements) if p.is_shard()]
        length, ranks = parameter.shape[dim], parameter.device_mesh.size(at)
        everywhere = length and -(-length // -(-length // ranks)) == ranks  # as torch.chunk splits
        if parameter.requires_grad and everywhere:
            sizes[name] = parameter.numel()
    return min(sizes, key=sizes.__getitem__, default=None)


def _send_whole(module: torch.nn.Module) -> None:
    """What is whole yet starts as rank 0's."""
    send(t for t in (*module.parameters(), *module.buffers()) if not is_dtensor(t))


def _shard_experts(
    experts: torch.nn.Module, name: str, world: World, compute: torch.dtype | None
) -> None:
    """Shares experts out, and shards each rank's over the ranks that have the same ones."""
    if isinstance(experts, FSDPModule):
        return  # with the block that they are a part of
    assert world.expert_mesh is not None
    distribute_experts(experts, name, world.expert_mesh["expert"])
    mesh = world.expert_dp_mesh
    assert mesh is not None
    dimension = shard_dimension(experts, name, mesh["dp_shard"].size())
    _shard(experts, world, compute, mesh=mesh, shard_placement_fn=lambda _: Shard(dimension))


def _shard(
    unit: torch.nn.Module, world: World, compute: torch.dtype | None, **options: Any
) -> None:
    """Shards a unit; its batch norms are gathered as they are, as their statistics are."""
    options = {"mesh": world.dp_mesh, **options}
    if world.parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type != "cpu")
    if compute is not None:
        if norms := _norms(unit):
            fully_shard(norms, **options)
        options["mp_policy"] = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32)
    if not isinstance(unit, FSDPModule):
        fully_shard(unit, **options)
        unit.register_forward_hook(_gather_behind_objects)


def _gather_behind_objects(module: Any, inputs: Any, outputs: Any) -> None:
    """Has the backward pass gather, and exchange, behind tensors in which torch does not look.

    It looks into containers and dataclasses; behind others it would exchange nothing, in silence.
    """
    if torch.is_grad_enabled() and not isinstance(outputs, torch.Tensor):
        seen = {id(leaf) for leaf in tree_leaves(outputs)}
        hidden = [tensor for tensor in tensors_in(outputs) if id(tensor) not in seen]
        module._get_fsdp_state()._register_pre_backward_hook(hidden)


def _norms(unit: torch.nn.Module) -> list[torch.nn.Module]:
    """A unit's batch norms, which are gathered apart where a lower precision is."""
    return [
        part
        for part in unit.modules()
        if isinstance(part, _BatchNorm) and part.affine and not isinstance(part, FSDPModule)
    ]


def call_again(calls: list[Call]) -> None:
    """Makes the same calls once more: the other ranks' calls of sharded models wait for ours."""
    for module, args, kwargs in (made := calls.copy()):
        module(*args, **kwargs)
    calls[:] = made


def follow(optimizers: Iterable[torch.optim.Optimizer], renewed: dict[int, Any]) -> None:
    """Replaces optimizers' parameters by the sharded ones.

    Args:
        optimizers: the optimizers, which are changed.
        renewed: the new parameters by the `id` of the old ones.

    Raises:
        ConfigError: an optimizer has already taken steps.
    """
    for optimizer in optimizers:
        if any(id(p) in renewed for p in optimizer.state):
            raise ConfigError(
                f"the {type(optimizer).__name__} has taken steps before its model was sharded: "
                "give a new one, or resume from a checkpoint."
            )
        for group in optimizer.param_groups:
            # In place: some optimizers hold on to the list.
            group["params"][:] = [renewed.get(id(p), p) for p in group["params"]]
