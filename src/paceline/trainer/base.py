"""What every Trainer has around its loop: named components, counters, logging, read-only facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from paceline.data.batches import count_first_dimension
from paceline.data.source import Source, Validation, windows_in
from paceline.errors import ConfigError, some
from paceline.log.plan import Plan
from paceline.parallel.blocks import outermost
from paceline.parallel.ddp import Replica, Synchronizer, unwrap
from paceline.parallel.placement import Placement
from paceline.registry import register_named
from paceline.trainer.abstract import AbstractTrainer
from paceline.trainer.callback import Callback
from paceline.trainer.elsewhere import NoSuchName, OtherNames, logs
from paceline.trainer.events import Hooks
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.names import class_name, unique_names
from paceline.trainer.optimization import Optimization
from paceline.trainer.progress import Progress
from paceline.trainer.recorder import Recorder
from paceline.trainer.replica_groups import ReplicaGroups
from paceline.trainer.result import Result
from paceline.trainer.run import Run
from paceline.trainer.settings import READ_ALWAYS, Resume, read_already, whole_seed
from paceline.trainer.slots import TRAINER_SLOTS, slots_of
from paceline.trainer.stop import StopAgreement, behind_boundary
from paceline.trainer.window import Window
from paceline.world.layout import Parallel
from paceline.world.world import World

if TYPE_CHECKING:
    from paceline.parallel.pipeline_parallel import Pipeline

# What a trainer knows of the run that is open, or was.
_OF_A_RUN = (
    *("progress", "plan", "result", "seed", "source", "validation", "optimization", "recorder"),
    *("replica_groups", "_ended"),
)


_COMPONENTS = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    Callback,
)
_OWN_STATE = ("progress", "replica_groups")  # of the Trainer's


class _NotOpen:
    """In place of a part of a run, before there is one."""

    def __getattr__(self, name: str) -> Any:
        raise NoSuchName(
            "this works within a run: call it from a hook, a step or a train() of yours."
        )


_NOT_OPEN: Any = _NotOpen()


def ending_its_run(train: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a `train()` of the user's own, whose loop over `windows()` opened the run.

    A `for` does not pass an exception in its body to its generator, and the run has to end with it.
    """

    @wraps(train)
    def wrapped(self: TrainerBase, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:
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


class TrainerBase(Hooks, AbstractTrainer, OtherNames):
    """The parts of a Trainer that are not its loop.

    Attributes:
        progress: the counters of the run.
        plan: what was decided without being asked, line by line.
        autocast: the context in which losses are computed.
        source: the training data of a run, opened at its start.
        validation: the validation data of a run by their names; a single loader's is None.
        optimization, recorder: the parts of a run, made at its start.
        window: the window at hand.
        replica_groups: the replica groups of torchft, one of which this process is.
        result: what the last run came to.
        resolved_recipe: the recipe as plain data, with its credentials masked; None for a trainer
            built in Python.
        recipe_identity: the arguments of the components that a recipe describes, by section and
            dotted key; None for a trainer built in Python.
        recipe_targets: the classes and functions that it names.
        recipe_seed: the seed of runs that are given none; None for a trainer built in Python.
    """

    # Recipe sections and the base classes of what they hold; a subclass adds its own (slots.py).
    slots: ClassVar[dict[str, type]] = TRAINER_SLOTS

    _run: Run | None = None  # while one is open
    train_dataloader: Any = None
    val_dataloader: Any = None
    check_gradients: bool = False  # take each step's gradient norm, to refuse one not finite
    resolved_recipe: Mapping[str, Any] | None = None
    recipe_identity: Mapping[str, Mapping[str, Any]] | None = None
    recipe_targets: tuple[Any, ...] = ()
    recipe_seed: int | None = None

    model: Any
    optimizer: Any
    lr_scheduler: Any
    loss_fn: Any
    max_steps: int | None
    epoch_length: int | None
    gradient_accumulation_steps: int
    global_batch_size: int | None
    lr_scheduler_interval: str
    max_grad_norm: float | None
    precision: str
    compile: bool | Literal["blocks"]
    deterministic: bool
    validate_every: str | int
    max_val_batches: int | None = None
    metric_monitor: MetricMonitor | None
    early_stop: int | None
    on_nonfinite: str
    checkpoint_policy: Any
    parallel: Parallel
    callbacks: list[Any]
    loggers: Any
    show_progress: bool
    log_every: int | None
    run_dir: Path | None
    resume: Resume

    plan: Plan
    source: Source
    validation: Mapping[str | None, Validation]
    optimization: Optimization = _NOT_OPEN
    recorder: Recorder = _NOT_OPEN
    window: Window
    result: Result

    def __init__(self) -> None:
        self.progress = Progress()
        self.plan = Plan()
        self.validation = {}
        self.seed = 0
        self.autocast: AbstractContextManager[Any] = nullcontext()
        self.replica_groups: ReplicaGroups | None = None
        self._run = None
        self._ended: Run | None = None  # the last one, of which `state_dict` may still be asked
        self._lent: Path | None = None  # another checkpoint, whose weights the models have
        self._configured = False  # whether `configure` has been called
        self._epochs: int | None = None
        self._asked_seed: int | None = None  # of an overridden train(seed=...)
        self._own_loop: Generator[Window] | None = None  # that of an overridden train()
        super().__init__()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        slots_of(cls)  # raises for a slot that cannot be
        register_named("trainer", cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if "progress" not in vars(self):  # of a dataclass, whose fields come before its constructor
            vars(self)[name] = value
            return
        run = vars(self).get("_run")
        if run is not None and name in run.fixed:
            raise read_already(name)
        if run is None:
            super().__setattr__(name, value)
            return
        before = getattr(self, name, None) if name in READ_ALWAYS else None
        super().__setattr__(name, value)
        if name in READ_ALWAYS:
            try:
                run.take_settings()
            except ConfigError:
                super().__setattr__(name, before)
                raise
        if isinstance(value, (torch.nn.Module, dict)):
            run.load_waiting(value if isinstance(value, dict) else {name: value})
        elif name in run.waiting_objects and hasattr(value, "load_state_dict"):
            value.load_state_dict(run.waiting_objects.pop(name))

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

    @property
    def local_batches(self) -> int:
        """Batches this process has trained on since it started."""
        return self.progress.local_batches

    @local_batches.setter
    def local_batches(self, value: int) -> None:
        self.progress.local_batches = value

    # What the Trainer itself has, as far as the parts of a run call it

    @abstractmethod
    def step(self, window: Window) -> None:
        """Takes one optimizer step on a window's micro-batches."""

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The mean loss over a batch's items.

        Args:
            batch: on the device.
            batch_idx: its index in the epoch, on this rank.
        """

    @abstractmethod
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs what a validation measures.

        Args:
            batch: on the device.
            batch_idx: its index in the validation, on this rank.
        """

    @abstractmethod
    def get_val_metrics(self) -> dict[str, Any]:
        """A validation's metrics beyond those logged."""

    @abstractmethod
    def evaluate(self) -> dict[str, float] | None:
        """Validates."""

    @abstractmethod
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """A batch's outputs, one for each sample.

        Args:
            batch: on the device.
            batch_idx: its index on this rank.
        """

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
        """The open run's precision: what was asked for, or what this device has in its place."""
        return self._at_hand.placement.computes_in

    @property
    def epochs(self) -> int | None:
        """Epochs in the run, None if only `max_steps` bounds it."""
        return self._epochs

    @property
    def train_batches(self) -> int | None:
        """Micro-batches of this rank in an epoch, None if only the data's end will tell.

        Raises:
            ConfigError: no run has opened the data yet.
        """
        return self._opened().micro_batches

    @property
    def training_horizon(self) -> int | None:
        """Optimizer steps in the whole run, None if only the data's end will tell.

        A sampler's passes are counted one by one; what else has a length is taken at its word.
        Known from `configure()` on. Reading it there opens the data: assign the loaders before.

        Raises:
            ConfigError: no run has opened the data yet.
        """
        return windows_in(self._opened(), self.epochs, self.max_steps)

    def _opened(self) -> Source:
        if self._run is not None:
            self._run.open_data()
        if not hasattr(self, "source"):
            raise ConfigError(
                "the length of the run is known once it has opened its data: read it in "
                "configure(), or later."
            )
        return self.source

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up, if the scheduler says so; else 0."""
        return int(getattr(self.lr_scheduler, "warmup_steps", 0))

    @property
    def checkpoint_objects(self) -> Any:
        """Further objects with `state_dict` and `load_state_dict` to save, by name or as a list."""
        return {}

    def run_identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged, of one's own; compared as `trainer.<key>`.

        Numbers, strings, None or lists of them, the same on every rank. Datasets, samplers, losses
        and other objects may have this method as well (`paceline.HasRunIdentity`).
        """
        return {}

    @property
    def has_validation(self) -> bool:
        """Whether there is something to validate with: a loader, or an overridden `evaluate`.

        None with `ValidationPolicy(max_batches=0)`.
        """
        given = self.val_dataloader is not None or self.is_overridden("evaluate")
        return given and self.max_val_batches != 0

    @property
    def val_name(self) -> str | None:
        """The name of the validation loader at hand; None if it is the only one, or there is none.

        For a `validation_step` or a hook that treats the loaders differently.
        """
        return None if self._run is None else self._run.val_name

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do in this process."""
        return self.progress.ended_by is not None if self._run is None else self._run.is_over

    @property
    def muted(self) -> bool:
        """Whether this micro-batch only keeps the rank in step with the others, and weighs nothing.

        Nothing is logged of it. What a step counts on its own account leaves it out as well.
        """
        return self._run is not None and self._run.muted

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
        """`checkpoint_objects` by name, and other attributes that have a state of their own.

        Those given as a list have their class's names. What begins with an underscore, and what
        yields data, is left out.
        """
        given = self.checkpoint_objects
        objects = dict(given) if isinstance(given, Mapping) else unique_names(given, class_name)
        known = {id(thing) for thing in objects.values()}
        for name, value in vars(self).items():
            kept = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
            if (
                kept
                and name[0] != "_"
                and name not in TrainerBase.__annotations__
                and name not in _OWN_STATE
                and not isinstance(value, (*_COMPONENTS, type))
                and not hasattr(value, "__iter__")
                and id(value) not in known
            ):
                objects.setdefault(name, value)
        return objects

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

    # The parts of the open run

    def _open_run(self, seed: int | None, *, trains: bool = True) -> Run:
        """Makes the run that begins; `_drop_run` is its end.

        Args:
            seed: of every random stream; None for that of an overridden `train(seed=...)`, else of
                the recipe, else 0.
            trains: whether it is one that a stop file stops.
        """
        asked = (seed, self._asked_seed, self.recipe_seed)
        self.seed = whole_seed(next((one for one in asked if one is not None), None))
        if self.run_dir is not None:
            self.run_dir = Path(self.run_dir).absolute()  # wherever the process goes meanwhile
        self.plan = type(self.plan)()
        self._lent = None if trains else self._lent
        self.progress = Progress()
        self.result = Result(stopped_by="nothing yet", complete=False)
        self.validation = {}
        if self.world.parallel != self.parallel:  # another layout has been set since it was made
            del self.world
        world, plan = self.world, self.plan
        stop_file = self.run_dir / "STOP" if self.run_dir is not None and trains else None
        self._run = Run(
            settings=self,
            components=self,
            world=world,
            seed=self.seed,
            progress=self.progress,
            plan=plan,
            placement=Placement(world, seed=self.seed, precision=self.precision, plan=plan),
            stop=StopAgreement(world, stop_file),
        )
        self.recorder = Recorder(self._run, [])
        return self._run

    def _drop_run(self) -> None:
        """The run is over: `state_dict` may still ask for its state, and nothing else."""
        self._ended, self._run = self._run, None
        self._configured = True
        self.autocast = nullcontext()

    @contextmanager
    def _run_aside(self) -> Iterator[Run]:
        """A run that does not train, and leaves what is known of the last one as it is."""
        held = {name: vars(self)[name] for name in _OF_A_RUN if name in vars(self)}
        run = self._open_run(self.seed, trains=False)
        try:
            yield run
        finally:
            configured = self._configured
            self._drop_run()
            for name in _OF_A_RUN:
                vars(self).pop(name, None)
            vars(self).update(held, _configured=configured)

    @property
    def _at_hand(self) -> Run:
        """The run that is open.

        Raises:
            ConfigError: there is none.
        """
        if self._run is None:
            raise ConfigError("this works within a run: call it from a hook or a train() of yours.")
        return self._run

    @property
    def stop_agreement(self) -> StopAgreement:
        """The ranks' agreement on where the open run stops."""
        return self._at_hand.stop

    @property
    def replicas(self) -> list[Synchronizer]:
        """What synchronizes the trained models over the ranks of the open run."""
        return self._at_hand.placement.replicas

    @property
    def pipeline(self) -> Pipeline | None:
        """What runs the model's stages, if the open run has cut it into some."""
        return None if self._run is None else self._run.placement.pipeline

    def _place_models(self) -> None:
        """Moves every module to the device, compiles it if asked, and spreads it over the ranks."""
        run = self._at_hand
        models = outermost(components(self, torch.nn.Module))
        optimizers = self.named_optimizers().values()
        run.cleanup.callback(run.placement.close)
        run.cleanup.callback(self._unwrap_models)
        placed = run.placement.place(models, optimizers, compile=self.compile)
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.nn.Module):
                setattr(self, name, placed.get(id(value), value))
            elif isinstance(value, dict):
                value.update({k: placed[id(v)] for k, v in value.items() if id(v) in placed})
        self.autocast = run.placement.autocast
        if kept := _train_but_for_eval(self.named_models()):
            run.plan.add(f"leaves in eval mode what was put into it: {some(kept)}", ".train()")

    def _unwrap_models(self) -> None:
        """Leaves the user with their own modules, after a run. A spread one stays spread."""
        self._at_hand.fixed = frozenset()
        for name, value in list(vars(self).items()):
            if isinstance(value, Replica):
                setattr(self, name, value.module)
            elif isinstance(value, dict):
                for key, module in value.items():
                    if isinstance(module, Replica):
                        value[key] = module.module

    # Logging and asking

    def count_items(self, batch: Any) -> Any:
        """Items in a batch, the weight of its mean loss: a number, or a tensor on the device.

        Override it where items are not samples, e.g. label tokens. A batch without items counts
        for nothing. An accelerator is not asked whether a batch has any: there its loss has to be
        finite, as a sum divided by `max(count, 1)` is.
        """
        return count_first_dimension(batch)

    @logs
    def log(self, name: str, value: Any, weight: Any = None) -> None:
        """Logs a value; a row or a validation shows the mean over all items of all ranks.

        An `Image`, a `Histogram`, `Text` or a `Table` (`paceline.log`) goes to the loggers that
        show such, as it is, from rank 0.

        Args:
            name: of the metric.
            value: a number or a tensor of one element; nothing waits for its device.
            weight: items the value is a mean over; in a step the batch's items unless given.

        Raises:
            MetricError: the value is no number, or every row has something by that name.
        """
        self.recorder.log(name, value, weight)

    @logs
    def log_dict(self, metrics: Mapping[str, Any], weight: Any = None) -> None:
        """Logs several values, as `log` does each.

        Args:
            metrics: values by name.
            weight: as for `log`, of each.
        """
        for name, value in metrics.items():
            self.log(name, value, weight)

    def log_timing(self, name: str, value: float) -> None:
        """Adds a measurement (speed, memory) to the next row of timing.jsonl.

        Args:
            name: the measurement's name.
            value: its value.
        """
        self.recorder.add_timing(name, value)

    def note_gradient_norm(self, norm: torch.Tensor) -> None:
        """Lets a gradient norm taken elsewhere count for `on_nonfinite`."""
        self.optimization.note_norm(norm)

    def request_stop(self, reason: str) -> None:
        """Asks for a stop at the next boundary that all ranks agree on, with a checkpoint."""
        self.stop_agreement.request(reason)

    def stopping(self) -> bool:
        """Whether the run stops at this boundary, so that an `evaluate()` of your own may be left.

        Each rank may ask as often as it likes. Ranks that exchange something in the evaluation
        share one answer (`self.world.broadcast_object`), so that all leave it at the same place.
        """
        run = self._run
        if run is None or not run.validating:
            return False
        return run.stop.agreed_on(behind_boundary(run.progress.place))

    def request_rewind(self, step: int) -> None:
        """Asks to go back to the newest checkpoint and skip the window of `step` from then on.

        On several ranks each of them has to ask, in the same window.
        """
        self._at_hand.request_rewind(step)

    def say(self, text: str) -> None:
        """Prints a line about the run, on rank 0."""
        self.world.say(text)


def _train_but_for_eval(models: Mapping[str, torch.nn.Module]) -> list[str]:
    """Puts models into train mode, but for the parts that their owner has put into eval mode.

    Args:
        models: by name.

    Returns:
        The names of these parts, without the parts of parts.
    """
    kept: list[str] = []
    for model_name, model in models.items():
        in_eval = [(name, part) for name, part in model.named_modules() if not part.training]
        model.train()  # one of the model's own may freeze more
        for name, part in in_eval:
            part.training = False
            inside = (
                name.startswith(f"{other}." if other else "")
                for other, _ in in_eval
                if other != name
            )
            if not any(inside):
                kept.append(f"{model_name}.{name}" if name else model_name)
    return kept


def components(holder: object, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """The attributes of an object that are of a kind, by name.

    Args:
        holder: the object; attributes that begin with an underscore are left out.
        kind: of the values. A dictionary of them counts by its own keys.

    Raises:
        ConfigError: two have the same name.
    """
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
