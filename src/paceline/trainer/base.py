"""What every Trainer has around its loop: named components, counters, logging, read-only facts."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint import Checkpoints
from paceline.data.source import Source, Validation
from paceline.log.lock import FolderLock
from paceline.log.plan import Plan
from paceline.log.provenance import RunRecord
from paceline.trainer.abstract import AbstractTrainer
from paceline.trainer.blocks import outermost
from paceline.trainer.ddp import unwrap
from paceline.trainer.events import Events, Hooks
from paceline.trainer.float8 import Float8Layers
from paceline.trainer.optimization import Optimization
from paceline.trainer.placement import components
from paceline.trainer.progress import Progress
from paceline.trainer.recorder import Recorder
from paceline.trainer.result import Result
from paceline.trainer.settings import Resume
from paceline.trainer.stop import StopAgreement
from paceline.trainer.window import Window, count_first_dimension
from paceline.world.layout import Parallel
from paceline.world.world import World

_AUTOCAST = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}

if TYPE_CHECKING:
    from paceline.trainer.pipeline import Pipeline
    from paceline.trainer.replica_groups import ReplicaGroups


def ending_its_run(train: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a `train()` of the user's own, whose loop over `windows()` opened the run.

    A `for` does not tell its generator of an exception in its body; the run has to hear of it.
    """

    @wraps(train)
    def wrapped(self: TrainerBase, *args: Any, **kwargs: Any) -> Any:
        if self._open:
            return train(self, *args, **kwargs)
        self._asked_seed, self._own_loop = kwargs.get("seed"), None
        try:
            outcome = train(self, *args, **kwargs)
            if self._own_loop is not None:
                self._own_loop.close()
        except BaseException as error:
            if self._own_loop is not None:
                self._own_loop.throw(error)
            raise
        finally:
            self._asked_seed = self._own_loop = None
        return getattr(self, "result", None) if outcome is None else outcome

    return wrapped


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


class TrainerBase(Hooks, AbstractTrainer):
    """The parts of a Trainer that are not its loop.

    Attributes:
        progress: the counters of the run.
        plan: what was decided without being asked, line by line.
        events: who listens to what.
        window: the window at hand.
    """

    train_dataloader: Any = None
    val_dataloader: Any = None
    check_gradients: bool = False  # take each step's gradient norm, to refuse one not finite

    precision: str
    parallel: Parallel
    callbacks: list[Any]
    checkpoint_policy: Any
    run_dir: Path | None
    resume: Resume
    max_steps: int | None
    epoch_length: int | None
    gradient_accumulation_steps: int
    global_batch_size: int | None
    lr_scheduler: Any
    loss_fn: Any

    # made when a run starts
    events: Events
    source: Source
    validation: Validation | None
    optimization: Optimization
    recorder: Recorder
    stop_agreement: StopAgreement
    saver: Checkpoints | None
    record: RunRecord
    folder_lock: FolderLock
    window: Window
    model_key: int
    replicas: list[Any]
    replica_groups: ReplicaGroups | None = None  # of torchft, one of which this process is
    pipeline: Pipeline | None = None  # what runs the model's stages, if it is cut into some
    validation_calls: list[Any]
    float8: Float8Layers | None = None
    recomputed: list[torch.nn.Module]
    compiled: list[torch.nn.Module]
    while_placed: ExitStack  # what holds while models are in place
    on_cpu: bool
    counts_items: bool
    identity: dict[str, Any]
    result: Result

    def __init__(self) -> None:
        self.progress = Progress()
        self.plan = Plan()
        self.seed = 0
        self.batch_items: Any = None  # items of the batch at hand, the weight of what is logged
        self.muted = False  # a stand-in is running: nothing is logged
        self._open = False  # a run is under way
        self._stopped = False  # the run stops before training is over
        self._rewinding = False
        self._validating = False
        self._trained = False  # this process has something to train
        self._rewind_step = -1
        self._settled = False  # between two windows with nothing pending: state may be saved
        self._asked_saves: list[str] = []  # reasons of checkpoints asked for elsewhere
        self._saved_at: Any = None  # (step, pending) of the last checkpoint
        self._sinks_state: Any = None
        self._restore_determinism: Any = None
        self._epochs: int | None = None
        self._asked_seed: int | None = None  # of an overridden train(seed=...)
        self._own_loop: Generator[Window] | None = None  # that of an overridden train()
        super().__init__()

    # Counters

    @property
    def global_step(self) -> int:
        """Optimizer steps (windows) done."""
        return self.progress.global_step

    @global_step.setter
    def global_step(self, value: int) -> None:
        self.progress.global_step = value

    @property
    def current_epoch(self) -> int:
        """Epochs done."""
        return self.progress.epoch

    @current_epoch.setter
    def current_epoch(self, value: int) -> None:
        self.progress.epoch = value

    @abstractmethod
    def is_overridden(self, name: str) -> bool:
        """Whether a method of the Trainer's is overridden, on the class or on the instance."""

    # Read-only facts

    @cached_property
    def world(self) -> World:
        """This process's place among the others, and its device."""
        return World(self.parallel)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.world.device

    @property
    def computes_in(self) -> str:
        """The run's precision: what was asked for, or what stands in for it on this device."""
        return "bf16" if self.precision == "fp8" and self.float8 is None else self.precision

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast computes in, and sharded weights are gathered in; None for no autocast."""
        return _AUTOCAST[self.precision]

    @property
    def epochs(self) -> int | None:
        """Epochs in the run, None if only `max_steps` bounds it."""
        return self._epochs

    @property
    def train_batches(self) -> int | None:
        """Micro-batches of this rank in an epoch, None if only the data's end will tell."""
        return self.source.micro_batches

    @property
    def training_horizon(self) -> int | None:
        """Optimizer steps in the whole run, None if only the data's end will tell."""
        per_epoch = self.source.windows_per_epoch
        steps = None if per_epoch is None or self.epochs is None else per_epoch * self.epochs
        return min((n for n in (steps, self.max_steps) if n is not None), default=None)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up, if the scheduler says so; else 0."""
        return int(getattr(self.lr_scheduler, "warmup_steps", 0))

    @property
    def checkpoint_objects(self) -> Any:
        """Further objects with `state_dict` and `load_state_dict` to save, by name or as a list."""
        return {}

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do in this process."""
        return self._stopped or self.progress.ended_by is not None

    @property
    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each optimizer's first group."""
        return {name: float(o.param_groups[0]["lr"]) for name, o in self.named_optimizers().items()}

    # Components, by the attribute that holds them

    def named_models(self) -> dict[str, torch.nn.Module]:
        """The user's modules by name: those assigned to attributes, a stateful loss_fn included."""
        found = outermost(components(self, torch.nn.Module))
        if found.get("loss_fn") is not None and not found["loss_fn"].state_dict():
            del found["loss_fn"]
        return {name: unwrap(model) for name, model in found.items()}

    def named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by name."""
        return components(self, torch.optim.Optimizer)

    def named_schedulers(self) -> dict[str, Any]:
        """The learning-rate schedulers by name."""
        return components(self, torch.optim.lr_scheduler.LRScheduler)

    def named_objects(self) -> dict[str, Any]:
        """`checkpoint_objects` by name; those given as a list by their class's."""
        objects = self.checkpoint_objects
        if isinstance(objects, Mapping):
            return dict(objects)
        named: dict[str, Any] = {}
        for thing in objects:
            base = name = type(thing).__name__
            count = 1
            while name in named:
                count += 1
                name = f"{base}_{count}"
            named[name] = thing
        return named

    def get_module(self, fqn: str) -> torch.nn.Module:
        """The module at a dotted path that begins with a model's name.

        Raises:
            AttributeError: naming the part that is missing.
        """
        first, _, rest = fqn.partition(".")
        models = self.named_models()
        if first not in models:
            raise AttributeError(f"no model {first!r}; there is: {', '.join(models) or 'none'}")
        return models[first].get_submodule(rest)

    # Logging and asking

    def count_items(self, batch: Any) -> Any:
        """Items in a batch, the weight of its mean loss: a number, or a tensor on the device.

        Override it where items are not samples, e.g. label tokens. A batch without items counts
        for nothing. An accelerator is not asked whether a batch has any: there its loss has to be
        finite, as a sum divided by `max(count, 1)` is.
        """
        return count_first_dimension(batch)

    def log(self, name: str, value: Any, weight: Any = None) -> None:
        """Logs a value; a row or a validation shows the mean over all items of all ranks.

        Args:
            name: of the metric.
            value: a number or a tensor of one element; nothing waits for its device.
            weight: items the value is a mean over; in a step the batch's items unless given.

        Raises:
            MetricError: the value is no number, or every row has something by that name.
        """
        if self.muted:
            return
        if weight is None:
            weight = 1.0 if self.batch_items is None else self.batch_items
        recorder = self.recorder
        recorder.add(recorder.val if self._validating else recorder.train, name, value, weight)

    def log_loss(self, loss: torch.Tensor) -> None:
        """Logs a micro-batch's loss as "train/loss", if anybody looks at rows."""
        if self.recorder.wanted and not self.muted:
            self.recorder.train.add("train/loss", loss, self.batch_items)

    def log_timing(self, name: str, value: float) -> None:
        """Adds a measurement (speed, memory) to the next row of timing.jsonl."""
        self.recorder.add_timing(name, value)

    def note_gradient_norm(self, norm: torch.Tensor) -> None:
        """Lets a gradient norm taken elsewhere count for `on_nonfinite`."""
        self.optimization.note_norm(norm)

    def request_stop(self, reason: str) -> None:
        """Asks for a stop at the next boundary that all ranks agree on, with a checkpoint."""
        self.stop_agreement.request(reason)

    def request_rewind(self, step: int) -> None:
        """Asks to go back to the newest checkpoint and skip the window of `step` from then on.

        On several ranks each of them has to ask, in the same window.
        """
        self._rewinding, self._rewind_step = True, step

    def say(self, text: str) -> None:
        """Prints a line about the run, on rank 0."""
        if self.world.is_main:
            print(f"paceline: {text}", file=sys.stderr, flush=True)
