"""Puts a trainer's components in place: checks, devices, compilation, replicas."""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from paceline.checkpoint.state import parameter_names
from paceline.errors import ConfigError, LossError
from paceline.trainer.materialize import Materializer
from paceline.world.context import ring_attention
from paceline.world.dtensors import local_part
from paceline.world.world import World, send

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class Replica(DistributedDataParallel):
    """DDP that answers for the attributes of the module it wraps, and knows if it was called.

    Attributes:
        called: whether the module was called through it, gradients on, in this micro-batch.
        covered: the `id` of each parameter whose gradient it exchanges.
        sentinel: its smallest trainable parameter, whose gradient tells of the others' NaN.
        heard: whether all that it was told in this window has reached that gradient.
        whole_way: whether ranks exchange something within the model too, so that the backward pass
            of a loss of zero has to take the whole way.
    """

    called = False
    heard = True
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

    @cached_property
    def covered(self) -> frozenset[int]:
        return frozenset(id(p) for p in self.module.parameters() if p.requires_grad)

    @cached_property
    def sentinel(self) -> torch.nn.Parameter:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return min(parameters, key=torch.Tensor.numel)

    def tell(self, loss: torch.Tensor, poison: torch.Tensor | float) -> torch.Tensor:
        """Adds zero, or NaN, to a loss, so that it reaches the sentinel whatever the model does."""
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


def components(holder: object, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The attributes of `holder` of a kind, by name; a dictionary of them counts by its keys."""
    found: dict[str, Any] = {}
    for name, value in vars(holder).items():
        if name.startswith("_"):
            continue
        if isinstance(value, kind):
            named = {name: value}
        elif isinstance(value, dict) and all(isinstance(v, kind) for v in value.values()):
            named = value
        else:
            continue
        twice = [key for key in named if key in found]
        if twice:
            raise ConfigError(f"two components are called {twice[0]!r}: rename one of them.")
        found.update(named)
    return found


def outermost(modules: dict[str, Any]) -> dict[str, Any]:
    """Without modules that are part of another one, or the same as one before."""
    known = {id(part) for m in modules.values() for part in m.modules() if part is not m}
    found: dict[str, Any] = {}
    for name, module in modules.items():
        if id(module) not in known:
            known.add(id(module))
            found[name] = module
    return found


def place(trainer: Trainer) -> None:
    """Moves every module to the device, compiles it if asked, and spreads it over the ranks."""
    if trainer.parallel.tensor > 1:
        from torch.distributed.tensor.parallel import loss_parallel

        trainer.while_placed.enter_context(loss_parallel())  # of logits whose classes are split
    if trainer.parallel.rings:
        trainer.while_placed.enter_context(ring_attention())
    mine = {id(m): n for n, m in outermost(components(trainer, torch.nn.Module)).items()}
    placed: dict[int, torch.nn.Module] = {}

    def put(module: Any) -> Any:
        if id(module) in mine and id(module) not in placed:
            placed[id(module)] = _placed(trainer, module, mine[id(module)])
        return placed.get(id(module), module)

    for name, value in list(vars(trainer).items()):
        if isinstance(value, torch.nn.Module):
            setattr(trainer, name, put(value))
        elif isinstance(value, dict):
            value.update({key: put(v) for key, v in value.items() if id(v) in mine})


def take_back(trainer: Trainer) -> None:
    """Leaves the user with their own modules, after a run. A spread one stays spread."""
    for name, value in list(vars(trainer).items()):
        if isinstance(value, Replica):
            setattr(trainer, name, value.module)
        elif isinstance(value, dict):
            for key, module in value.items():
                if isinstance(module, Replica):
                    value[key] = module.module
    trainer.while_placed.close()
    if trainer.float8 is not None and not trainer.parallel.is_spread:
        trainer.float8.take_back()
    trainer.recomputed, trainer.compiled, trainer.replicas = [], [], []


def _placed(trainer: Trainer, module: torch.nn.Module, name: str) -> torch.nn.Module:
    if isinstance(module, DistributedDataParallel) and not isinstance(module, Replica):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel already: give the module itself; "
            "parallel=Parallel(...) decides how it is spread."
        )
    materializer = Materializer(module, name, trainer.device, trainer.seed)
    trained = any(p.requires_grad for p in module.parameters())
    staged = trained and trainer.parallel.pipeline > 1
    if not materializer.needed and not staged:
        module.to(trainer.device)
    if trainer.float8 is not None and trained:
        trainer.float8.convert(module, name)
    if trained and trainer.parallel.expert > 1:
        # The exchange of rows breaks graphs, which nothing that is repeated within one may do.
        _compile(trainer, module, name, staged=staged)
        _recompute(trainer, module, name)
    else:
        if trained:
            _recompute(trainer, module, name)
        _compile(trainer, module, name, staged=staged)
    for part in {*trainer.recomputed, *trainer.compiled}:
        trainer.while_placed.callback(vars(part).pop, "forward", None)
    if staged:
        from paceline.trainer.stage_placement import place_stages

        trainer.pipeline = place_stages(trainer, module, name, materializer)
        return module
    if trained and trainer.parallel.is_spread:
        return _spread(trainer, module, name, materializer)
    materializer.all()
    if trainer.world.size == 1:
        return module
    if not trained:
        send(chain(module.parameters(), module.buffers()))  # as DDP does with what it replicates
        return module
    return replicate(trainer, module)


def _recompute(trainer: Trainer, module: torch.nn.Module, name: str) -> None:
    which = trainer.parallel.activation_checkpointing
    if isinstance(which, str):
        from paceline.trainer.recompute import recompute_blocks

        trainer.recomputed += recompute_blocks(module, name, which)


def _compile(trainer: Trainer, module: torch.nn.Module, name: str, *, staged: bool) -> None:
    trained = any(p.requires_grad for p in module.parameters())
    if trainer.compile is True and not (trained and trainer.parallel.is_spread):
        module.compile()
    elif trainer.compile:
        from paceline.trainer.compilation import compile_blocks

        trainer.compiled += compile_blocks(module, name, trainer.compile, staged=staged)


def replicate(trainer: Trainer, module: torch.nn.Module, group: Any = None) -> Replica:
    """Has DDP keep the copies of a module equal, on all ranks or those of a group."""
    device_ids = None if trainer.on_cpu else [trainer.device]
    replica = Replica(module, device_ids=device_ids, process_group=group)
    _settle_buckets(replica)
    vars(replica)["whole_way"] = trainer.parallel.context > 1
    trainer.replicas.append(replica)
    return replica


def _spread(
    trainer: Trainer, module: torch.nn.Module, name: str, materialize: Materializer
) -> torch.nn.Module:
    from paceline.trainer.sharding import Shards, follow

    calls, compute = trainer.validation_calls, trainer.autocast_dtype
    shards = Shards(module, name, trainer.world, calls, compute, materialize)
    follow(trainer.named_optimizers().values(), shards.renewed)
    trainer.replicas.append(shards)
    return module


def _settle_buckets(replica: Replica) -> None:
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


def check_spread(trainer: Trainer, optimizer: torch.optim.Optimizer, covered: Set[int]) -> None:
    """Refuses to step parameters whose gradient is this rank's alone: the ranks would part ways.

    Args:
        trainer: whose models give the names.
        optimizer: about to step.
        covered: the `id` of each parameter that replicas take care of.

    Raises:
        ConfigError: naming them.
    """
    alone = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and id(parameter) not in covered
    ]
    if not alone:
        return
    known = parameter_names(trainer.named_models())
    optimizer_name = trainer.get_name_by_optimizer(optimizer)
    names = [known.get(id(p), f"a parameter of {optimizer_name!r}") for p in alone]
    raise ConfigError(
        f"only this rank has the gradient of {', '.join(names[:8])}"
        f"{f' and {len(names) - 8} more' * (len(names) > 8)}: what is trained was made, or set to "
        "require a gradient, after the models were placed. Make it in configure(); what is to be "
        "trained later starts as trainable, in a group whose lr is 0 until then."
    )


def share_buffers(trainer: Trainer) -> None:
    """Gives every rank rank 0's buffers, as DDP does before the next forward pass anyway.

    Of a model in stages, every copy of a stage gets the first one's.
    """
    if trainer.world.size == 1:
        return
    if trainer.pipeline is not None:
        return trainer.pipeline.share_buffers()
    send(chain.from_iterable(model.buffers() for model in trainer.named_models().values()))


def layout(world: World) -> str:
    """How the models lie over the ranks, as a line of the plan."""
    sizes = ("tensor", "context", "expert", "pipeline")
    tensor, context, expert, stages = (getattr(world.parallel, name) for name in sizes)
    if world.shards == tensor == context == expert == stages == 1:
        return f"replicated over {world.size} ranks by DDP"
    ways = [f"cut into {stages} stages"] * (stages > 1)
    ways += [f"split over {tensor} ranks by its plan"] * (tensor > 1)
    ring = ", with attention by torch's ring" * world.parallel.rings
    ways += [f"given sequences in {context} parts{ring}"] * (context > 1)
    ways += [f"with its experts shared out over {expert} ranks"] * (expert > 1)
    ways += [f"sharded over {world.shards} ranks by FSDP2"] * (world.shards > 1)
    copies = "" if world.copies == 1 else f", in {world.copies} copies"
    return ", ".join(ways) + copies
