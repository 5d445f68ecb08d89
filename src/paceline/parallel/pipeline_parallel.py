"""Pipeline parallelism: a model's stages on ranks of their own, run by torch's schedules.

The micro-batches of a schedule are those of the window. All ranks of a pipeline read the same ones;
the first stage takes their inputs, the last one their targets, and tells the others the losses.
What a schedule hands around as input and target is the number of a micro-batch, so that batches may
be of any structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils._pytree import tree_leaves, tree_map

from paceline.errors import ConfigError, LossError
from paceline.parallel.context_parallel import Sequences
from paceline.parallel.ddp import Replica, replicate
from paceline.parallel.pipeline_stages import is_given_up
from paceline.world.dtensors import is_dtensor, local_part, reshard, respread, total_norm, whole
from paceline.world.world import World, send

if TYPE_CHECKING:
    from paceline.parallel.fsdp import StageShards

_KEPT = 16  # schedules, each for one number of micro-batches and their shapes


@dataclass(frozen=True)
class _Form:
    """What is to be known of a tensor that another rank holds."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> _Form:
        return _Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def empty(self, device: Any = "meta") -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class _Layers(torch.nn.Module):
    """The layers of a stage, one after the other.

    Args:
        layers: in order.
        take: makes of what the stage is given what its first layer takes.
        context: what they compute in.
        hands_on: whether another stage gets what they compute.
    """

    def __init__(
        self,
        layers: Iterable[torch.nn.Module],
        take: Callable[..., Any],
        context: Callable[[], AbstractContextManager[Any]],
        *,
        hands_on: bool,
    ) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self._take = take
        self._context = context
        self._hands_on = hands_on

    def forward(self, *given: Any) -> Any:
        x = self._take(*given)
        with self._context():
            for layer in self.layers:
                x = layer(x)
        if self._hands_on and any(map(is_dtensor, tree_leaves(x))):
            raise ConfigError(
                f"parallel.pipeline: a stage ends with the {type(self.layers[-1]).__name__}, which "
                "gives a split tensor (DTensor), and the next stage takes plain ones: have its "
                "style of parallel.plan give its local part (use_local_output=True), or the whole."
            )
        return x


class _Apart(torch.nn.Module):
    """Calls a module that is no part of it.

    torch's stages take sharded modules into their own hands, for one schedule an optimizer step,
    and drop what waits for the end of a window of several.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._call = module.__call__

    def forward(self, *given: Any) -> Any:
        return self._call(*given)


class _Stage(PipelineStage):
    """torch's stage, which says which micro-batch begins, and what came of it.

    Attributes:
        begins: is called with the number of each micro-batch before it is computed.
        ends: is called with what was computed.
        added: is called when its gradients have been added.
        exchanges: whether ranks that have the stage exchange gradients in a schedule's last
            backward.
        shards: what they share it as, if they do.
    """

    begins: Callable[[int], None]
    ends: Callable[[Any], None]
    added: Callable[[], None]
    exchanges = True
    shards: StageShards | None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.begins(fwd_chunk_id)
        try:
            outputs = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except RuntimeError as error:
            # torch's own message shows all arguments, and hides what the model said.
            raise (error if error.__cause__ is None else error.__cause__) from None
        self.ends(outputs)
        return outputs

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(*args, **kwargs)
        if self.has_backward:
            self.added()

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        last = last_backward and self.exchanges
        if last and self.shards is not None:
            self.shards.begin(exchange=True)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last)


class StagedWindow(Protocol):
    """The micro-batches of a window, as the schedules ask for them.

    Attributes:
        inputs: of each micro-batch, for the first stage.
    """

    inputs: Sequence[Any]

    def begin(self, j: int) -> None:
        """The stage begins to compute the j-th micro-batch."""
        ...

    def loss_of(self, outputs: Any, j: int) -> torch.Tensor:
        """The mean loss of a micro-batch; called on the last stage.

        Args:
            outputs: of the last stage.
            j: the micro-batch's index in the window.
        """
        ...

    def loss_to_send(self, outputs: Any, j: int) -> torch.Tensor:
        """The loss with which a micro-batch's backward pass begins; called on the last stage.

        Args:
            outputs: of the last stage.
            j: the micro-batch's index in the window.
        """
        ...

    def gradients_added(self) -> None:
        """A micro-batch's gradients are there."""
        ...


class Pipeline:
    """The stages of a model, run by torch's schedules.

    Args:
        model: the whole model, of which other stages' parts are on the meta device.
        name: its name.
        layers: those of this rank's stage.
        world: the ranks.

    Attributes:
        module: what computes this rank's stage.
        shared: parameters that other stages have too, each with the group of those stages' ranks
            and whether this rank speaks for it.
        autocast: the context in which layers are computed.
        calls: takes the model's calls, where other ranks wait for them; else None.
        is_first, is_last: whether this rank has the first stage, the last one.
    """

    shared: Sequence[tuple[torch.nn.Parameter, Any, bool]] = ()

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        layers: Iterable[torch.nn.Module],
        world: World,
    ) -> None:
        assert world.mesh is not None
        self._world = world
        self._device = world.device
        self._model = model
        self._name = name
        self._stages = world.parallel.pipeline
        self.index = world.stage
        self.is_first, self.is_last = self.index == 0, self.index == self._stages - 1
        self._group = world.mesh["pipeline"].get_group()
        self._norm_dtype = reduce(torch.promote_types, {p.dtype for p in model.parameters()})
        self.autocast: AbstractContextManager[Any] = nullcontext()
        self.calls: list[Any] | None = None
        self.module = _Layers(layers, self._taken, lambda: self.autocast, hands_on=not self.is_last)
        self._replica: torch.nn.Module | None = None
        self._shards: StageShards | None = None
        self._schedules: dict[Any, tuple[Any, _Stage]] = {}
        # Of the schedule at hand:
        self._window: StagedWindow | None = None
        self._numbers: Sequence[int] = ()  # its micro-batches, by their number in the window
        self._inputs: Sequence[Any] = ()
        self._outputs: Any = None
        self._at: int | None = None  # the micro-batch computed; None while torch asks for shapes
        self._measured: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers, as they were then

    def replicate(self) -> Replica | None:
        """Has DDP keep the copies of this stage equal; returns what does, if there are any."""
        mesh = self._world.dp_mesh
        if mesh is None or not any(p.requires_grad for p in self.module.parameters()):
            return None
        whole_way = self._world.parallel.context > 1
        group = mesh.get_group()
        self._replica = replicate(self.module, self._device, whole_way=whole_way, group=group)
        return self._replica

    def share(self, shards: StageShards) -> None:
        """Has the ranks that have this stage share it."""
        self._shards = shards

    # A window

    def train(self, window: StagedWindow, numbers: Sequence[int]) -> None:
        """Adds the gradients of micro-batches, in schedules of those whose shapes are equal.

        Args:
            window: the micro-batches, and what becomes of each.
            numbers: which of them to take.
        """
        self._window = window
        runs = [list(run) for _, run in groupby(numbers, lambda j: _shapes(window.inputs[j]))]
        for run in runs:
            schedule, stage = self._schedule(run, _shapes(window.inputs[run[0]]))
            stage.exchanges = run is runs[-1]
            self._numbers, self._at = run, None
            self._inputs = [window.inputs[j] for j in run]
            counted = torch.arange(len(run))
            given = (counted,) if self.is_first else ()
            target = counted if self.is_last else None
            schedule.step(*given, target=target, return_outputs=False)
            self._inputs, self._outputs = (), None
        self._window = None
        reshard([self.module])
        for parameter, group, _ in self.shared:
            if parameter.grad is not None:
                parameter.grad = respread(parameter.grad, parameter)
                dist.all_reduce(local_part(parameter.grad), group=group)

    def broadcast_from_last(self, tensor: torch.Tensor) -> None:
        """Gives every stage the last one's values, in place."""
        dist.broadcast(tensor, group=self._group, group_src=self._stages - 1)

    def check_attention(self) -> None:
        """Warns once if sequences are in parts and no stage has called `attention`."""
        sequences = self.autocast
        if isinstance(sequences, Sequences) and not sequences.checked:
            sequences.check(attends=self._world.any(sequences.attends))

    def _loss(self, outputs: Any, number: torch.Tensor) -> torch.Tensor:
        window = self._window
        assert window is not None
        if self._at is None:  # torch asks for shapes, of the schedule's first micro-batch
            return window.loss_of(outputs, self._numbers[int(number)])
        return window.loss_to_send(outputs, self._at)

    # A call of the model

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The whole model's outputs, on every rank of the pipeline; takes the place of its own.

        Args:
            inputs: what the model's first layer takes, in one argument.
            named: refused.

        Raises:
            LossError: gradients are on.
            ConfigError: it is called with anything but one argument.
        """
        if torch.is_grad_enabled():
            raise LossError(
                "with parallel.pipeline the schedule trains the model: call it under "
                "torch.no_grad() only."
            )
        if named or len(inputs) != 1:
            raise ConfigError("with parallel.pipeline a model is called with its inputs alone.")
        if self.calls is not None:
            self.calls.append((self._model, inputs, {}))
        schedule, _ = self._schedule(None, _shapes(inputs[0]))
        self._numbers, self._inputs, self._at = (), inputs, None
        schedule.step(*((torch.arange(1),) if self.is_first else ()), return_outputs=False)
        outputs, self._inputs, self._outputs = self._outputs, (), None
        reshard([self.module])
        return self._broadcast(outputs)

    def _broadcast(self, outputs: Any) -> Any:
        """The last stage's outputs, on every rank."""
        last = self._stages - 1
        if self.is_last:
            outputs = tree_map(lambda leaf: whole(leaf).contiguous(), outputs)
        box = [tree_map(_Form.of, outputs) if self.is_last else None]
        dist.broadcast_object_list(box, group=self._group, group_src=last)
        if not self.is_last:
            outputs = tree_map(lambda form: form.empty(self._device), box[0])
        for leaf in tree_leaves(outputs):
            dist.broadcast(leaf, group=self._group, group_src=last)
        return outputs

    # Schedules

    def _schedule(self, numbers: list[int] | None, shapes: Any) -> tuple[Any, _Stage]:
        """A schedule for micro-batches of these shapes: torch's stages settle theirs once.

        Args:
            numbers: the micro-batches; None to compute the outputs of one alone.
            shapes: of the inputs of each of them.
        """
        trained = sum(p.requires_grad for p in self._model.parameters())
        key = (None if numbers is None else len(numbers), shapes, trained)
        if key not in self._schedules:
            if len(self._schedules) == _KEPT:
                self._schedules.clear()
            self._schedules[key] = self._make_schedule(numbers)
        return self._schedules[key]

    def _make_schedule(self, numbers: list[int] | None) -> tuple[Any, _Stage]:
        module: torch.nn.Module = self.module if self._shards is None else _Apart(self.module)
        if numbers is not None and self._replica is not None:
            module = self._replica
        stage = _Stage(module, self.index, self._stages, self._device, group=self._group)
        stage.begins, stage.ends, stage.added = self._begin, self._keep, self._added
        stage.shards = self._shards
        if numbers is None:
            return ScheduleGPipe(stage, 1), stage
        # 1F1B keeps fewer activations, and wants a micro-batch for each stage at least.
        kind = Schedule1F1B if len(numbers) >= self._stages else ScheduleGPipe
        return kind(stage, len(numbers), self._loss, scale_grads=False), stage

    def _taken(self, *given: Any) -> Any:
        """What the first layer takes: inputs by their number, or what the stage before has sent."""
        if self._at is None and torch.is_grad_enabled():
            self._measured = [(b, b.clone()) for b in self.module.buffers()]
        if self.is_first:
            return self._inputs[int(given[0])]
        (x,) = given if len(given) == 1 else (given,)
        return x

    def _begin(self, number: int) -> None:
        with torch.no_grad():
            for buffer, value in self._measured:
                buffer.copy_(value)
        self._measured = []
        if not self._numbers:
            return
        assert self._window is not None
        self._at = self._numbers[number]
        self._window.begin(self._at)

    def _keep(self, outputs: Any) -> None:
        if self.is_last and not self._numbers:
            self._outputs = outputs

    def _added(self) -> None:
        if self._window is not None:
            self._window.gradients_added()

    # What the stages agree on

    def total_norm(
        self,
        gradients: Iterable[torch.Tensor | None],
        norm_of: Callable[[Iterable[torch.Tensor | None]], torch.Tensor] = total_norm,
    ) -> torch.Tensor:
        """The 2-norm of the gradients of all stages as one vector.

        Args:
            gradients: of this rank's stage; None for a parameter without one.
            norm_of: takes the norm of one stage's.

        Returns:
            The norm, a tensor of no dimensions, the same on every stage.
        """
        others = {id(p.grad) for p, _, speaks in self.shared if not speaks}
        norm = norm_of(g for g in gradients if g is not None and id(g) not in others)
        square = norm.to(self._device, torch.float64).square()
        dist.all_reduce(square, group=self._group)
        # On a stage without gradients nothing tells the type that the others' norms have.
        return square.sqrt().to(self._norm_dtype)

    def share_buffers(self) -> None:
        """Gives every copy of a stage the first one's buffers."""
        mesh: Any = self._world.mesh
        for name in reversed(mesh.mesh_dim_names):
            if name != "pipeline":
                send(self.module.buffers(), mesh.get_group(name))

    def complete(self, states: dict[str, dict[str, Any]]) -> None:
        """Adds to optimizers' states what other stages have of them, on the meta device.

        Args:
            states: by the optimizers' names, as `optimizer_state` gives them; changed in place.
                Every rank calls this.
        """
        parameters = dict(self._model.named_parameters())
        elsewhere = {f"{self._name}.{key}" for key, p in parameters.items() if is_given_up(p)}
        for state in states.values():
            mine = {key: v for key, v in state["state"].items() if key not in elsewhere}
            forms = {key: _emptied(values) for key, values in mine.items()}
            known: dict[str, Any] = {}
            for theirs in self._world.all_gather_object(forms):
                known = {key: _restored(form) for key, form in theirs.items()} | known
            known |= mine
            order = (key for group in state["groups"] for key in group["params"])
            state["state"] = {key: known[key] for key in order if key in known}


def _shapes(inputs: Any) -> tuple[Any, ...]:
    leaves = tree_leaves(inputs)
    return tuple((*t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in leaves)


def _emptied(values: Any) -> Any:
    """A parameter's optimizer state, to tell others of: of a tensor its form alone."""
    if not isinstance(values, dict):
        return values
    return {key: _Form.of(v) if isinstance(v, torch.Tensor) else v for key, v in values.items()}


def _restored(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: v.empty() if isinstance(v, _Form) else v for key, v in values.items()}
