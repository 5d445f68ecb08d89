"""Preview: a recipe's settings, its components, and an outline of its run. Trains nothing."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch.utils.flop_counter import FlopCounterMode

from paceline.checkup.layers import Layer, layers_of, outputs_noted
from paceline.checkup.preflight import alone, told
from paceline.checkup.preflight_checks import samples_in
from paceline.checkup.schedule import Schedule, schedules_of
from paceline.checkup.settings import Setting, settings_of
from paceline.data.batches import describe
from paceline.data.loader import loaders_by_name
from paceline.recipe.builder import build_trainer
from paceline.recipe.mistakes import dotted
from paceline.recipe.parts import each
from paceline.recipe.recipe import Recipe
from paceline.recipe.record import RecordRecipe
from paceline.trainer.slots import own_slots
from paceline.trainer.trainer import Trainer

if TYPE_CHECKING:
    from paceline.trainer.window import Window


@dataclass(frozen=True)
class Preview:
    """What would be trained.

    Attributes:
        settings: the recipe's settings, with their places.
        layers: every module of every model.
        flops: floating-point operations of one batch's forward pass (a multiplication and an
            addition are two); None if they cannot be counted: with an overridden `step()`, or a
            derivative taken in the forward pass.
        problem: why the forward pass failed; empty if it did not.
        components: optimizers, schedulers and other components, by name.
        training, validation: facts about the data, by name.
        plan: (decision, setting that changes it) for each decision that the recipe left open.
        schedules: the learning rates of each optimizer.
    """

    settings: list[Setting]
    layers: list[Layer]
    flops: int | None
    problem: str
    components: dict[str, str]
    training: dict[str, str]
    validation: dict[str, str]
    plan: list[tuple[str, str]]
    schedules: list[Schedule] = field(default_factory=list)

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of all models, and those that are trained."""
        models = [layer for layer in self.layers if layer.depth == 0]
        return sum(m.parameters for m in models), sum(m.trainable for m in models)

    def as_json(self) -> dict[str, Any]:
        """The preview as plain data."""
        parameters, trainable = self.parameters
        return {**asdict(self), "parameters": parameters, "trainable": trainable}


def preview(recipe: Recipe) -> Preview:
    """Builds a recipe's components and runs one batch through the model.

    The run is started as training would start it, without its callbacks and loggers and without a
    run folder: nothing is written. An overridden `step()` takes one step, which is discarded.

    Args:
        recipe: the checked recipe; if it has several seeds, the first is used.

    Raises:
        PacelineError: it cannot be built, or its run cannot start.
    """
    alone("preview")
    settings = settings_of(recipe.composed)
    one = recipe.of_seed(recipe.seeds[0]) if recipe.seeds else recipe
    recipe = replace(one, whole=None)
    trainer = build_trainer(recipe, resume="never")
    records = (each for each in trainer.callbacks if isinstance(each, RecordRecipe))
    decided = next(records, recipe).plan  # the user's own trainer may drop callbacks
    trainer.callbacks, trainer.loggers, trainer.checkpoint_policy = [], [], None
    trainer.run_dir, trainer.show_progress, trainer.compile = None, False, False
    trainer.parallel = replace(trainer.parallel, activation_checkpointing=None)
    trainer.on_nonfinite = "raise"
    with trainer.running(recipe.seed):
        schedules = schedules_of(trainer)
        forward = _Forward(trainer)
        forward.run()
        training, validation = _training(trainer, forward.batch), _validation(trainer)
        components = _components(trainer)
    shown = Preview(
        settings=settings,
        layers=layers_of(trainer.named_models(), forward.outputs),
        flops=forward.flops,
        problem=forward.problem,
        components=components | _of_own_slots(trainer, recipe),
        training=training,
        validation=validation,
        plan=[
            *decided,
            *trainer.source.plan,
            *chain(*(v.plan for v in trainer.validation.values())),
        ],
        schedules=schedules,
    )
    del trainer, forward
    gc.collect()  # a trainer has reference cycles, and may hold most of the memory
    return shown


class _Forward:
    """Runs one batch through the models of a run that has been started."""

    def __init__(self, trainer: Trainer) -> None:
        self.outputs: Any = {}
        self.flops: int | None = None
        self.problem = ""
        self.batch: dict[str, str] = {}
        self._trainer = trainer

    def run(self) -> None:
        """Counts operations and records outputs; a failure is kept as `problem`."""
        trainer = self._trainer
        try:
            window = next(iter(trainer.epoch_windows()))
            if window.samples >= 0:
                self.batch["samples a step"] = f"{int(window.samples):,}"
            with outputs_noted(trainer.named_models()) as self.outputs:
                if trainer.is_overridden("step"):
                    trainer.step(window)
                    self.batch["batch"] = describe(window.batch)
                else:
                    self._first_batch(window)
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            self.problem = told(error)

    def _first_batch(self, window: Window) -> None:
        batch, batch_idx = next(iter(window))
        self.batch["batch"] = describe(batch)
        counter = FlopCounterMode(display=False)
        with self._trainer.autocast:
            try:
                with counter:
                    self._trainer.training_step(batch, batch_idx)
                self.flops = counter.get_total_flops()
            except Exception:  # noqa: BLE001 - the counter does not support autograd.grad
                self._trainer.training_step(batch, batch_idx)


def _components(trainer: Trainer) -> dict[str, str]:
    found = {}
    for name, optimizer in trainer.named_optimizers().items():
        groups = optimizer.param_groups
        held = sum(p.numel() for group in groups for p in group["params"])
        options = ", ".join(
            f"{key}={value}" for key, value in optimizer.defaults.items() if value is not None
        )
        count = f", in {len(groups)} groups" if len(groups) > 1 else ""
        found[name] = f"{type(optimizer).__name__}({options}) of {held:,} parameters{count}"
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        found[name] = f"{type(scheduler).__name__}, each {trainer.lr_scheduler_interval}"
    function = trainer.loss_fn
    if function is not None:
        found["loss_fn"] = getattr(function, "__name__", None) or repr(function)
    found["device"] = f"{trainer.device}, {trainer.computes_in}"
    return found


def _of_own_slots(trainer: Trainer, recipe: Recipe) -> dict[str, str]:
    """The classes of the components in the trainer class's own slots."""
    parts = [recipe.parts.get(name) for name in own_slots(type(trainer))]
    made = [component for part in parts for _, component in each(part)]
    return {dotted(one.path): f"{one.target.__module__}.{one.target.__qualname__}" for one in made}


def _training(trainer: Trainer, batch: dict[str, str]) -> dict[str, str]:
    loader = trainer.train_dataloader
    return {
        "samples": _number(samples_in(loader)),
        **batch,
        "batches an epoch": _number(trainer.train_batches),
        "steps an epoch": _number(trainer.source.windows_per_epoch),
        "steps in the run": _number(trainer.training_horizon),
        "workers": str(getattr(loader, "num_workers", 0)),
    }


def _validation(trainer: Trainer) -> dict[str, str]:
    if not trainer.has_validation:
        return {}
    shown: dict[str, str] = {}
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        data = trainer.validation[name]
        batch, _ = next(iter(data.batches()), (None, 0))
        facts = {
            "samples": _number(samples_in(loader)),
            "batch": "none" if batch is None else describe(batch),
            "batches": _number(data.length),
            "workers": str(getattr(loader, "num_workers", 0)),
        }
        prefix = "" if name is None else f"{name}: "
        shown |= {f"{prefix}{what}": value for what, value in facts.items()}
    return {**shown, "validates every": str(trainer.validate_every)}


def _number(count: int | None) -> str:
    return "not known in advance" if count is None else f"{count:,}"
