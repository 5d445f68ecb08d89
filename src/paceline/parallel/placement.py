"""Placement: how a run's models lie on its devices and ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from paceline.checkpoint.state import parameter_names
from paceline.data.batches import to_device
from paceline.errors import ConfigError, DataError, some
from paceline.log.plan import Plan
from paceline.parallel.compile_blocks import memory_budget
from paceline.parallel.context_parallel import Sequences, part_of, ring_attention, whole_of
from paceline.parallel.ddp import Replica, Synchronizer, replicate, sparse_parameters, zero_loss
from paceline.parallel.float8 import Float8Layers, float8_layers
from paceline.parallel.materialize import Materializer
from paceline.parallel.outline import keep_outlines
from paceline.world.dtensors import total_norm
from paceline.world.world import World, send

if TYPE_CHECKING:
    from paceline.parallel.fsdp import FrozenShards
    from paceline.parallel.pipeline_parallel import Pipeline

_AUTOCAST = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What autocast computes in, and sharded weights are gathered in; None for no autocast."""
    return _AUTOCAST[precision]


class Autocast:
    """torch's autocast, which may be entered within itself, too.

    A validation step has entered it when a model in stages does.

    Args:
        device: the kind of device, such as "cuda".
        dtype: what matrix products compute in.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._entered: list[torch.autocast] = []

    def __enter__(self) -> None:
        self._entered.append(torch.autocast(self._device, dtype=self._dtype))
        self._entered[-1].__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)


class Placement:
    """Places a run's models, and knows how they lie.

    Args:
        world: the ranks.
        seed: of the run, from which models on the meta device draw their values.
        precision: "fp32", "bf16", "fp16" or "fp8".
        plan: takes what is decided.

    Attributes:
        replicas: what synchronizes each trained model over ranks.
        frozen: the frozen models that are sharded.
        pipeline: runs the stages of the model that is cut into some, else None.
        float8: the linear layers that multiply in float8, else None.
        compiled: the blocks that are compiled one by one.
        recomputed: the blocks that repeat their forward pass in the backward pass.
        calls: the calls of spread models in a validation's batch, in order.
        autocast: the context in which losses are computed.
        takes_batches_as_read: whether a batch needs neither moving nor splitting.
    """

    def __init__(self, world: World, *, seed: int, precision: str, plan: Plan) -> None:
        self._world = world
        self._parallel = world.parallel
        self._device = world.device
        self._seed = seed
        self._precision = precision
        self._plan = plan
        self._undo = ExitStack()
        self._compile: bool | Literal["blocks"] = False
        self.replicas: list[Synchronizer] = []
        self.frozen: list[FrozenShards] = []
        self.pipeline: Pipeline | None = None
        self.float8: Float8Layers | None = None
        self.compiled: list[torch.nn.Module] = []
        self.recomputed: list[torch.nn.Module] = []
        self.calls: list[Any] = []
        self.autocast: AbstractContextManager[Any] = nullcontext()
        on_cpu = self._device.type == "cpu"
        self.takes_batches_as_read = on_cpu and self._parallel.context == 1

    @property
    def computes_in(self) -> str:
        """The run's precision: what was asked for, or what this device has in its place."""
        return "bf16" if self._precision == "fp8" and self.float8 is None else self._precision

    def place(
        self,
        models: Mapping[str, torch.nn.Module],
        optimizers: Collection[torch.optim.Optimizer],
        *,
        compile: bool | Literal["blocks"] = False,
    ) -> dict[int, torch.nn.Module]:
        """Moves models to the device, compiles them if asked, and spreads them over the ranks.

        Args:
            models: by name; none is a part of another.
            optimizers: which get the parameters that sharding makes.
            compile: as `Trainer(compile=...)`.

        Returns:
            What takes each model's place, by the `id` of the model.

        Raises:
            ConfigError: a model cannot be placed so.
        """
        self._compile = compile
        if self._parallel.partitions_state:
            _check_apart(models)
            if not self._world.on_paper:  # where nothing is evaluated
                keep_outlines(models.values())
        self._enter_contexts()
        self.float8 = float8_layers(self._precision, self._world, self._plan)
        placed = {id(m): self._placed(m, name, optimizers) for name, m in models.items()}
        if (dtype := autocast_dtype(self._precision)) is not None:
            self.autocast = Autocast(self._device.type, dtype)
        if (mesh := self._world.context_mesh) is not None:
            self.autocast = Sequences(
                mesh,
                self.autocast,
                ring=self._parallel.rings,
                in_stages=self.pipeline is not None,
            )
        if self.pipeline is not None:
            self.pipeline.autocast = self.autocast
        return placed

    def close(self) -> None:
        """Undoes what models do not need after a run. A spread one stays spread."""
        self._undo.close()
        if self.float8 is not None and not self._parallel.partitions_state:
            self.float8.take_back()
        self.recomputed, self.compiled, self.replicas, self.frozen = [], [], [], []
        self.pipeline = None

    def _enter_contexts(self) -> None:
        """What has to hold for backward passes too, and so for as long as models are placed."""
        budget = self._parallel.activation_checkpointing
        if isinstance(budget, float):
            self._undo.enter_context(memory_budget(budget))
            self._plan.add(
                f"keeps {budget:.0%} of the activations that it would, and computes the rest twice",
                "parallel.activation_checkpointing",
            )
        if self._parallel.tensor > 1:
            from torch.distributed.tensor.parallel import loss_parallel

            self._undo.enter_context(loss_parallel())  # of logits whose classes are split
        if self._parallel.rings:
            self._undo.enter_context(ring_attention())

    def _placed(
        self,
        module: torch.nn.Module,
        name: str,
        optimizers: Collection[torch.optim.Optimizer],
    ) -> torch.nn.Module:
        if isinstance(module, DistributedDataParallel) and not isinstance(module, Replica):
            raise ConfigError(
                "the model is wrapped in DistributedDataParallel already: give the module itself; "
                "parallel=Parallel(...) decides how it is spread."
            )
        if self._world.size > 1:
            _check_buffers(module, name)
        materializer = Materializer(module, name, self._device, self._seed)
        trained = any(p.requires_grad for p in module.parameters())
        staged = trained and self._parallel.pipeline > 1
        sharded = self._parallel.partitions_state if trained else self._shards_frozen(module, name)
        if trained and self._parallel.partitions_state and (sparse := sparse_parameters(module)):
            names = some([f"{name}.{key}" for key in sparse.values()])
            raise ConfigError(
                f"{names}: an Embedding with sparse=True has sparse gradients, which torch "
                "exchanges between replicas only: leave sparse=True out, or do not shard, split or "
                "cut the model."
            )
        if not materializer.needed and not staged:
            module.to(self._device)
        if self.float8 is not None and trained:
            self.float8.convert(module, name)
        if trained and self._parallel.expert > 1:
            # The exchange of rows breaks graphs, which nothing that is repeated within one may do.
            self._compile_blocks(module, name, sharded=sharded, staged=staged)
            self._checkpoint_blocks(module, name)
        else:
            if trained:
                self._checkpoint_blocks(module, name)
            self._compile_blocks(module, name, sharded=sharded, staged=staged)
        for part in {*self.recomputed, *self.compiled}:
            self._undo.callback(vars(part).pop, "forward", None)
        if staged:
            return self._cut(module, name, materializer, optimizers)
        if sharded:
            return self._shard(module, name, materializer, optimizers, trained=trained)
        materializer.all()
        if self._world.size == 1:
            return module
        if not trained:
            send(chain(module.parameters(), module.buffers()))  # as DDP does with what it copies
            return module
        replica = replicate(module, self._device, whole_way=self._parallel.context > 1)
        self.replicas.append(replica)
        return replica

    def _checkpoint_blocks(self, module: torch.nn.Module, name: str) -> None:
        which = self._parallel.activation_checkpointing
        if isinstance(which, str):
            from paceline.parallel.activation_checkpointing import checkpoint_blocks

            self.recomputed += checkpoint_blocks(module, name, which)

    def _shards_frozen(self, module: torch.nn.Module, name: str) -> bool:
        """Whether a frozen model is sharded as trained ones are; says so in the plan."""
        parallel = self._parallel
        if not parallel.partitions_state or next(module.parameters(), None) is None:
            return False
        if parallel.dp_shard > 1 and parallel.pipeline == 1 and parallel.frozen == "shard":
            line = f"shards the frozen {name} over {self._world.shards} ranks, too"
            self._plan.add(line, "parallel.frozen")
            return True
        asked = parallel.dp_shard > 1 and parallel.frozen == "replicate"
        why = "frozen" if asked else "pipeline" if parallel.pipeline > 1 else "dp_shard"
        self._plan.add(f"keeps the frozen {name} whole on each rank", f"parallel.{why}")
        return False

    def _compile_blocks(
        self, module: torch.nn.Module, name: str, *, sharded: bool, staged: bool
    ) -> None:
        if self._compile is True and not sharded:
            module.compile()
        elif self._compile:
            from paceline.parallel.compile_blocks import compile_blocks

            self.compiled += compile_blocks(module, name, self._compile, staged=staged)

    def _shard(
        self,
        module: torch.nn.Module,
        name: str,
        materialize: Materializer,
        optimizers: Iterable[torch.optim.Optimizer],
        *,
        trained: bool,
    ) -> torch.nn.Module:
        from paceline.parallel.fsdp import FrozenShards, Shards, follow

        compute = autocast_dtype(self._precision)
        kind = Shards if trained else FrozenShards
        shards = kind(module, name, self._world, self.calls, compute, materialize)
        follow(optimizers, shards.renewed)
        if isinstance(shards, Shards):
            self.replicas.append(shards)
        else:
            self.frozen.append(shards)
        return module

    def _cut(
        self,
        module: torch.nn.Module,
        name: str,
        materialize: Materializer,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> torch.nn.Module:
        from paceline.parallel.fsdp import follow
        from paceline.parallel.pipeline_placement import place_stages

        if self.pipeline is not None:
            raise ConfigError(
                "parallel.pipeline: several trained models do not exist yet beside it."
            )
        kept_whole = [*self.recomputed, *self.compiled]
        compute = autocast_dtype(self._precision)
        staged = place_stages(module, name, materialize, self._world, compute, kept_whole)
        self._undo.callback(staged.put_back)
        self.pipeline = staged.pipeline
        if self._parallel.calls_together:
            self.pipeline.calls = self.calls
        self.replicas += staged.replicas
        follow(optimizers, staged.renewed)
        for line in staged.plan:
            self._plan.add(line, "parallel.pipeline")
        return module

    # What the loop asks

    @property
    def covered(self) -> Set[int]:
        """The `id` of each parameter whose gradient replicas take care of."""
        return frozenset().union(*(replica.covered for replica in self.replicas))

    def exchange_without(self, frozen: Set[int]) -> None:
        """Leaves frozen parameters out of what the ranks exchange; all ranks do at one boundary.

        Args:
            frozen: the `id` of each parameter that is frozen for a while.
        """
        for replica in self.replicas:
            replica.exchange_without(frozen)

    def local_batch(self, batch: Any) -> Any:
        """What this rank computes of a batch, on its device."""
        if self.takes_batches_as_read:
            return batch
        if self._world.context_mesh is not None:
            batch = part_of(batch, self._world.context_mesh, ring=self._parallel.rings)
        return batch if self._device.type == "cpu" else to_device(batch, self._device)

    def whole_output(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        """An output for all positions of the samples, of which this rank may have a part alone.

        Args:
            output: of this rank.
            batch: which `local_batch` gave for it.

        Raises:
            DataError: sequences lie in parts, and the output is not one for each position.
        """
        mesh = self._world.context_mesh
        if mesh is None:
            return output
        leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
        lengths = {leaf.shape[1] for leaf in leaves if leaf.dim() > 1}
        if output.dim() < 2 or output.shape[1] not in lengths:
            raise DataError(
                f"parallel.context={mesh.size()}: an output of shape {tuple(output.shape)} is not "
                "one for each position, [samples, positions, ...]: predict without it. A "
                "checkpoint is read in any layout."
            )
        return whole_of(output, mesh, ring=self._parallel.rings)

    def norm_of(self, gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """The 2-norm of gradients as one vector, over all ranks that have a part of them."""
        return (
            total_norm(gradients) if self.pipeline is None else self.pipeline.total_norm(gradients)
        )

    def zero_loss(self, models: Mapping[str, torch.nn.Module]) -> torch.Tensor:
        """A loss of zero that takes part in all that the ranks exchange in its backward pass.

        Args:
            models: which get gradients of zeros if no rank waits for theirs.
        """
        called: list[Any] = [replica for replica in self.replicas if replica.called]
        losses = [each.zero_loss() for each in (*called, *self.frozen) if each.called]
        if not called:
            sparse = set().union(*map(sparse_parameters, models.values()))
            parameters = (p for model in models.values() for p in model.parameters())
            losses.append(zero_loss(parameters, sparse))
        return torch.stack(losses).sum()

    def share_buffers(self, models: Mapping[str, torch.nn.Module]) -> None:
        """Gives every rank rank 0's buffers, as DDP does before the next forward pass anyway.

        Of a model in stages, every copy of a stage gets the first one's.

        Args:
            models: by name.
        """
        if self._world.size == 1:
            return
        if self.pipeline is not None:
            return self.pipeline.share_buffers()
        send(chain.from_iterable(model.buffers() for model in models.values()))

    @contextmanager
    def unsynchronized(self) -> Iterator[None]:
        """Within it no replica synchronizes: ranks may have unequal numbers of batches."""
        replicas = [replica for replica in self.replicas if isinstance(replica, Replica)]
        for replica in replicas:
            replica.require_forward_param_sync = replica.require_backward_grad_sync = False
        try:
            yield
        finally:
            for replica in replicas:
                replica.require_forward_param_sync = True

    def check_hooks(self, models: Mapping[str, torch.nn.Module]) -> None:
        """Refuses hooks on parameters that this layout would never call.

        Args:
            models: by name, placed.

        Raises:
            ConfigError: naming the parameters.
        """
        if self._parallel.partitions_state:
            from paceline.parallel.fsdp import check_hooks

            check_hooks(models)

    def call_again(self) -> None:
        """Calls the models as the validation batch before did, where other ranks wait for it."""
        if self._parallel.calls_together:
            from paceline.parallel.fsdp import call_again

            call_again(self.calls)

    def lines(self) -> Iterator[tuple[str, str]]:
        """How the models are placed: lines of the plan, each with its setting."""
        if self.float8 is not None:
            yield str(self.float8), "precision"
        if self._world.size > 1:
            yield layout(self._world), "parallel"
        if self._parallel.calls_together and (dtype := autocast_dtype(self._precision)):
            kind = str(dtype).removeprefix("torch.")
            yield f"gathers weights in {kind}, sums their gradients in float32", "precision"
        if self._parallel.cpu_offload:
            yield "keeps weights in host memory, and steps there", "parallel.cpu_offload"
        if self.compiled:
            but = ", but for their experts" if self._parallel.expert > 1 else ""
            yield f"compiles {len(self.compiled)} blocks one by one{but}", "compile"
        if self.recomputed:
            line = f"{len(self.recomputed)} blocks compute their forward pass twice"
            yield line, "parallel.activation_checkpointing"


def _check_apart(models: Mapping[str, torch.nn.Module]) -> None:
    """Refuses parameters that two models share: where they are replaced, each gets its own.

    Raises:
        ConfigError: naming them.
    """
    owners: dict[int, str] = {}
    for name, model in models.items():
        own = {id(p): f"{name}.{key}" for key, p in model.named_parameters()}
        if shared := [f"{owners[key]} = {path}" for key, path in own.items() if key in owners]:
            raise ConfigError(
                f"two models share parameters ({some(shared)}), which this layout would make two: "
                "put both into one module, whose forward computes what both do, or train on "
                "replicas (parallel.dp_shard=1, tensor=1, expert=1, pipeline=1)."
            )
        owners |= own


def _check_buffers(module: torch.nn.Module, name: str) -> None:
    """Refuses buffers whose elements share memory: no rank can be sent another's.

    Raises:
        ConfigError: naming them.
    """
    expanded = [
        f"{name}.{key}"
        for key, buffer in module.named_buffers()
        if any(n > 1 and step == 0 for n, step in zip(buffer.shape, _strides(buffer), strict=False))
    ]
    if expanded:
        raise ConfigError(
            f"{some(expanded)}: a buffer that was expanded: its elements share memory, and ranks "
            "cannot be sent into it. Register expand(...).clone()."
        )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def check_synchronized(
    optimizer: torch.optim.Optimizer,
    name: str,
    covered: Set[int],
    models: Mapping[str, torch.nn.Module],
) -> None:
    """Raises if gradients were not synchronized: ranks would diverge.

    Args:
        optimizer: about to step.
        name: its name.
        covered: the `id` of each parameter that replicas take care of.
        models: by name, for the parameters' names.

    Raises:
        ConfigError: naming those whose gradient is this rank's alone.
    """
    alone = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and id(parameter) not in covered
    ]
    if not alone:
        return
    known = parameter_names(models)
    names = [known.get(id(p), f"a parameter of {name!r}") for p in alone]
    raise ConfigError(
        f"only this rank has the gradient of {some(names)}: what is trained was made, or "
        "set to require a gradient, after the models were placed. Make it in configure(); "
        "what is to be trained later starts as trainable, frozen until then by the callback Freeze."
    )


def layout(world: World) -> str:
    """How the models lie over the ranks, as a line of the plan."""
    parallel = world.parallel
    ways: list[str] = []
    if parallel.pipeline > 1:
        ways.append(f"cut into {parallel.pipeline} stages")
    if parallel.tensor > 1:
        ways.append(f"split over {parallel.tensor} ranks by its plan")
    if parallel.context > 1:
        ring = ", with attention by torch's ring" if parallel.rings else ""
        ways.append(f"given sequences in {parallel.context} parts{ring}")
    if parallel.expert > 1:
        ways.append(f"with its experts shared out over {parallel.expert} ranks")
    if world.shards > 1:
        ways.append(f"sharded over {world.shards} ranks by FSDP2")
    if not ways:
        return f"replicated over {world.size} ranks by DDP"
    copies = "" if world.copies == 1 else f", in {world.copies} copies"
    return ", ".join(ways) + copies
