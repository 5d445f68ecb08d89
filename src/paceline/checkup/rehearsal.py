"""Observes a few real steps of a run. The loop is the Trainer's own; this only watches."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path

from paceline.checkpoint.comparison import differing
from paceline.checkpoint.state import parameter_names
from paceline.data.batches import describe
from paceline.trainer.callback import Callback
from paceline.world.dtensors import local_part

if TYPE_CHECKING:
    from paceline.data.source import Validation
    from paceline.trainer.trainer import Trainer

# A schedule may begin at a rate of zero; a weight of zero may keep another's gradient at zero.
LOOKED_INTO = 2
TIMED = 3
VALIDATED = 2
ENOUGH_SECONDS = 60.0  # steps that take this long are not timed three times

# The stages of a step in order, which is also the order of the report.
STAGES = (
    "components",
    "training data",
    "forward pass",
    "backward pass",
    "optimizer step",
    "scheduler step",
    "validation",
    "checkpoint",
)


@dataclass(frozen=True)
class LossCall:
    """The first call of the loss function.

    Attributes:
        outputs, targets: shapes.
        indices: whether the targets are integers.
        value: the loss, None if it is not one number.
    """

    outputs: tuple[int, ...]
    targets: tuple[int, ...]
    indices: bool
    value: float | None


@dataclass
class Parameter:
    """The gradients and updates of one trainable parameter in the first steps."""

    arrived: bool = False
    nonzero: bool = False
    finite: bool = True
    moved: bool = False
    change: float | None = None  # of the last step, relative to the size of the weights


@dataclass
class Seen:
    """What the rehearsal observed; a field is empty until its stage of a step has run.

    Attributes:
        stage: the current stage, one of `STAGES`.
        computes_in: the precision.
        batch: the first batch, in words.
        window: samples of the first optimizer step.
        loss: the first step's loss, the mean over its items.
        finite_loss: whether every loss was finite.
        losses: each micro-batch's loss, as it enters the backward pass.
        bad_inputs, same_inputs: tensors of the first batch that hold NaN or infinities, and those
            that are equal in all of its samples.
        call: the first call of the loss function.
        labels: lowest and highest class index that it was given, but for those that it ignores.
        same_outputs: whether the model's last outputs were equal for all samples of a batch.
        parameters: the trainable parameters that an optimizer holds, by name.
        norm: the norm of the first step's gradients, over all optimizers.
        optimizers: the names of the optimizers that took a step.
        rates: the learning rate in each of the first steps, by optimizer.
        seconds: the duration of each step, by its number from 1.
        validation_batches, validation_seconds: the validation batches run, and the time of one.
        metrics: the validation's metrics; None before the validation.
        extra_schedule_step: whether schedulers of interval "epoch" were stepped once to test them.
    """

    stage: str = STAGES[0]
    computes_in: str = ""
    batch: str | None = None
    window: int = 0
    loss: float | None = None
    finite_loss: bool = True
    losses: list[float] = field(default_factory=list)
    bad_inputs: list[str] = field(default_factory=list)
    same_inputs: list[str] = field(default_factory=list)
    call: LossCall | None = None
    labels: tuple[int, int] | None = None
    same_outputs: bool = False
    parameters: dict[str, Parameter] = field(default_factory=dict)
    norm: float | None = None
    optimizers: set[str] = field(default_factory=set)
    rates: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    validation_batches: int = 0
    validation_seconds: float | None = None
    metrics: dict[str, float] | None = None
    extra_schedule_step: bool = False


_NAME = "preflight"


class Rehearsal(Callback):
    """Observes the first steps of a run, then asks it to stop.

    It comes after every other callback, so that their effects are included.

    Attributes:
        seen: the observations.
    """

    priority = 10**9

    def __init__(self) -> None:
        self.name = _NAME
        self.seen = Seen()
        self._names: dict[int, str] = {}
        # A parameter, its tensor, the place of its strongest gradient, and some of its values.
        self._before: list[tuple[Parameter, torch.Tensor, int, Any, torch.Tensor]] = []
        self._squares = 0.0
        self._began = self._stamp = 0.0
        self._unwatch: Callable[[], None] | None = None

    def on_setup(self, trainer: Trainer) -> None:
        """Shortens the validation and wraps the loss function."""
        self.seen.computes_in = trainer.computes_in
        trainer.validation = {
            name: _FirstBatches(data, VALIDATED) for name, data in trainer.validation.items()
        }
        self._unwatch = _watch_loss(trainer, self.seen)
        self._names = parameter_names(trainer.named_models())

    def on_train_start(self, trainer: Trainer) -> None:
        """Enters the next stage: the first batch."""
        self.seen.stage = "training data"
        self._began = self._stamp = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Describes the first batch."""
        self.seen.stage = "forward pass"
        if self.seen.batch is None:
            self.seen.batch = describe(batch)
            _look_at_inputs(batch, self.seen)

    def on_before_backward(self, trainer: Trainer, loss: torch.Tensor) -> None:
        """Records whether the loss is finite: a policy may drop the window after this event."""
        self.seen.stage = "backward pass"
        value = float(loss.detach().sum())
        self.seen.finite_loss &= math.isfinite(value)
        self.seen.losses.append(value)

    def on_train_batch_end(
        self, trainer: Trainer, batch: Any, batch_idx: int, loss: torch.Tensor
    ) -> None:
        """Enters the next stage: another forward pass, or the optimizer step."""
        self.seen.stage = "optimizer step" if trainer.window.is_last else "training data"

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Checks every gradient, and keeps one weight of each parameter to compare."""
        self.seen.stage = "optimizer step"
        if trainer.global_step >= LOOKED_INTO:
            return
        name = trainer.get_name_by_optimizer(optimizer)
        self.seen.optimizers.add(name)
        self.seen.rates.setdefault(name, []).append(trainer.learning_rates[name])
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.requires_grad:
                    self._look(tensor)

    @torch.no_grad()
    def _look(self, tensor: torch.Tensor) -> None:
        parameter = self.seen.parameters.setdefault(self._names[id(tensor)], Parameter())
        if tensor.grad is None:
            return
        gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
        sizes = gradient.abs().reshape(-1)
        parameter.arrived = True
        self._squares += float(sizes.double().square().sum())
        if not bool(torch.isfinite(sizes).all()):
            parameter.finite = False
        elif sizes.numel() and bool(sizes.any()):
            parameter.nonzero = True
            strongest = int(sizes.argmax())
            value = tensor.detach().reshape(-1)[strongest].item()
            self._before.append((parameter, tensor, strongest, value, _some_of(tensor)))

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Compares the weights, takes the time, and ends the rehearsal after enough steps."""
        now, seen, step = time.perf_counter(), self.seen, trainer.global_step
        seen.seconds[step] = now - self._stamp
        for parameter, tensor, place, value, some in self._before:
            parameter.moved |= tensor.detach().reshape(-1)[place].item() != value
            if size := float(some.norm()):
                parameter.change = float((_some_of(tensor) - some).norm()) / size
        self._before.clear()
        if step == 1:
            seen.loss, seen.window = metrics.get("train/loss"), int(trainer.window.samples)
            seen.norm = self._squares**0.5
        enough = step > LOOKED_INTO and now - self._began > ENOUGH_SECONDS
        if enough or step >= LOOKED_INTO + TIMED:
            self._try_schedules(trainer)
            trainer.request_stop("preflight")
        validates = trainer.has_validation and seen.metrics is None
        seen.stage = "validation" if validates else "training data"
        self._stamp = time.perf_counter()

    def _try_schedules(self, trainer: Trainer) -> None:
        """Steps schedulers of interval "epoch" once, if no epoch has ended."""
        if trainer.lr_scheduler_interval == "epoch" and trainer.current_epoch == 0:
            self.seen.stage = "scheduler step"
            self.seen.extra_schedule_step = True
            trainer.optimization.step_schedulers("epoch")

    def on_validation_start(self, trainer: Trainer) -> None:
        """Starts the clock."""
        self.seen.stage = "validation"
        self._stamp = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Takes the time of the latest batch; that of the first one includes starting workers."""
        _wait_for(trainer.device)
        now = time.perf_counter()
        self.seen.validation_seconds = now - self._stamp
        self.seen.validation_batches += 1
        self._stamp = now

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Ends the rehearsal after one validation."""
        self.seen.metrics = metrics
        self.seen.stage = "training data"
        trainer.validate_every = "epoch"
        self._stamp = time.perf_counter()

    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Enters the next stage: the checkpoint."""
        self.seen.stage = "checkpoint"

    def on_teardown(self, trainer: Trainer) -> None:
        """Unwraps the loss function."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None


class Reload(Callback):
    """Clears the state, lets the run load its checkpoint, and compares.

    Attributes:
        differences: paths in the state tree that were not restored bit by bit; None before.
    """

    priority = 10**9

    def __init__(self) -> None:
        self.name = _NAME  # it replaces that callback
        self.differences: list[str] | None = None

    @torch.no_grad()
    def on_setup(self, trainer: Trainer) -> None:
        """Clears the state that the checkpoint has to restore."""
        for model in trainer.named_models().values():
            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        for optimizer in trainer.named_optimizers().values():
            optimizer.state.clear()

    def on_load_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Compares the checkpoint with the trainer's state."""
        now = trainer.state_dict()
        # Before its first batch a loader may save its position in another form.
        compared = set(state) - {"data", "rank", "horizon"}
        self.differences = [
            path for key in sorted(compared) for path in differing(state[key], now.get(key), key)
        ]

    def on_train_start(self, trainer: Trainer) -> None:
        """Stops the run: nothing is to be trained or saved again."""
        vars(trainer)["checkpoint_policy"] = None  # which the open run has read; it saves no more
        trainer.request_stop("preflight")


class _FirstBatches:
    """The first batches of a validation loader."""

    def __init__(self, validation: Validation, most: int) -> None:
        self._validation, self._most = validation, most
        self.length, self.plan = validation.length, validation.plan

    def batches(self) -> Iterator[tuple[Any, int]]:
        batches: Any = self._validation.batches()
        with closing(batches) if hasattr(batches, "close") else contextlib.nullcontext():
            yield from islice(batches, self._most)

    def close(self) -> None:
        self._validation.close()


def options_of(loss_fn: Any) -> Mapping[str, Any]:
    """A loss function's options by name: the keywords of a `partial`, a module's attributes.

    Args:
        loss_fn: the trainer's.
    """
    return getattr(loss_fn, "keywords", getattr(loss_fn, "__dict__", {}))


def _watch_loss(trainer: Trainer, seen: Seen) -> Callable[[], None]:
    """Records the first call of `trainer.loss_fn`; returns a function that unwraps it."""
    loss_fn = trainer.loss_fn
    if loss_fn is None:
        return lambda: None

    def look(args: Any, kwargs: Any) -> None:
        """Before the call, which labels beyond the classes would end."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if len(tensors) < 2:
            return
        outputs, targets = tensors[:2]
        seen.same_outputs = _same_for_all(outputs)
        if seen.call is None and not targets.is_floating_point() and not targets.is_complex():
            kept = targets[targets != options_of(loss_fn).get("ignore_index", -100)]
            seen.labels = (int(kept.min()), int(kept.max())) if kept.numel() else None
            seen.call = LossCall(tuple(outputs.shape), tuple(targets.shape), True, None)

    def note(args: Any, kwargs: Any, value: Any) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        if (seen.call is None or seen.call.value is None) and len(tensors) >= 2:
            outputs, targets = tensors[:2]
            single = isinstance(value, torch.Tensor) and value.numel() == 1
            indices = not (targets.is_floating_point() or targets.is_complex())
            seen.call = LossCall(
                tuple(outputs.shape), tuple(targets.shape), indices,
                value.item() if single else None,
            )  # fmt: skip

    if isinstance(loss_fn, torch.nn.Module):
        hooks = (
            loss_fn.register_forward_pre_hook(
                lambda _, args, kwargs: look(args, kwargs), with_kwargs=True
            ),
            loss_fn.register_forward_hook(
                lambda _, args, kwargs, value: note(args, kwargs, value), with_kwargs=True
            ),
        )

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    @functools.wraps(loss_fn)
    def watched(*args: Any, **kwargs: Any) -> Any:
        look(args, kwargs)
        value = loss_fn(*args, **kwargs)
        note(args, kwargs, value)
        return value

    trainer.loss_fn = watched

    def unwatch() -> None:
        trainer.loss_fn = loss_fn

    return unwatch


_SAMPLED = 1000  # values of a parameter whose change is measured


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    """Some of a parameter's values, evenly spread, in float32."""
    values = local_part(tensor.detach()).reshape(-1)
    return values[:: max(1, values.numel() // _SAMPLED)].float().clone()


def _look_at_inputs(batch: Any, seen: Seen) -> None:
    """Notes the tensors of a batch that hold no numbers, or the same in each sample."""
    for path, tensor in tree_leaves_with_path(batch):
        if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel()):
            continue
        name = f"batch{keystr(path)}"
        if not bool(torch.isfinite(tensor).all()):
            seen.bad_inputs.append(name)
        elif _same_for_all(tensor):
            seen.same_inputs.append(name)


def _same_for_all(tensor: torch.Tensor) -> bool:
    """Whether several samples have the same values, the first dimension being the samples."""
    if tensor.dim() == 0 or tensor.shape[0] < 2:
        return False
    values = tensor.detach().float()
    largest = float(values.abs().max())
    return float((values - values[:1]).abs().max()) <= 1e-6 * largest


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
