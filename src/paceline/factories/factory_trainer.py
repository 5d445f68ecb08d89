"""FactoryTrainer: a Trainer whose components are made by factories, each from a typed section."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from paceline.callbacks.exit_step import ExitStep
from paceline.data.source import WindowSize
from paceline.errors import ConfigError, counted
from paceline.factories.around import Around
from paceline.factories.bases import (
    DataConfig,
    DataFactory,
    Factory,
    ModelFactory,
    OptimizerFactory,
    SchedulerFactory,
    TokenizerFactory,
)
from paceline.factories.defined import check_and_register, classes_named
from paceline.factories.first_batch import epoch_for, first_batch_only
from paceline.factories.optimizers import AdamWFactory, SGDFactory
from paceline.factories.schedules import (
    ConstantFactory,
    CosineFactory,
    LinearFactory,
    StableDecayFactory,
)
from paceline.log.sinks import Sink
from paceline.recipe.builder import describe, trainer_arguments
from paceline.recipe.compose import composed_of
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.recipe import Recipe, check, load_recipe
from paceline.recipe.typed import Config, HumanInt
from paceline.trainer.callback import Callback
from paceline.trainer.resume import kept_global_batch_size
from paceline.trainer.slots import Only, Slot
from paceline.trainer.trainer import Trainer
from paceline.world.seeding import random_state_kept


class TrainerConfig(Config):
    """What a recipe says: the keys of a trainer class's own, and a typed section for each factory.

    A trainer class adds keys to `trainer:` by fields of its own config type.

    Attributes:
        skip_validation: take factories that the trainer class does not list.
        exit_step: leave the run after this optimizer step, saved; the next start resumes it.
        exit_step_this_run: leave it after so many optimizer steps of this start.
        overfit_first_batch: every batch has the first samples of the training data.
        min_steps: optimizer steps to take at least: smaller data are passed over several times in
            an epoch.
        model, tokenizer, data, optimizer, lr_scheduler: the sections.
    """

    free = frozenset({"skip_validation", "exit_step", "exit_step_this_run"})
    not_yet = {
        "activation_checkpoint_cpu_offload": "keeping checkpointed activations on the CPU",
        "arctic_moe": "ArcticMoE",
        "sequence_parallel_size": "sequence parallelism by all-to-all",
        "tiled_mlp_compute": "computing MLPs in tiles",
    }
    skip_validation: bool = False
    exit_step: HumanInt | None = pydantic.Field(None, gt=0)
    exit_step_this_run: HumanInt | None = pydantic.Field(None, gt=0)
    overfit_first_batch: bool = False
    min_steps: HumanInt | None = pydantic.Field(None, gt=0)
    model: Config | None = None
    tokenizer: Config | None = None
    data: DataConfig | None = None
    optimizer: Config | None = None
    lr_scheduler: Config | None = None
    _recipe: Recipe | None = pydantic.PrivateAttr(None)

    @property
    def origin(self) -> str:
        """The file that it was read from, for messages."""
        return "the config" if self._described_by is None else str(self._described_by.composed.path)

    @property
    def trusted(self) -> Collection[str]:
        """What `--trust` names: packages, and models whose pickled weights may be read."""
        return () if self._described_by is None else self._described_by.trust

    def mistakes(self) -> Mistakes:
        """A collection for the mistakes that show when components are made."""
        if self._described_by is None:
            return Mistakes(lambda path: self.origin)
        return self._described_by.composed.mistakes()


# Section -> the attribute of a trainer class that lists its factories, the annotation that does the
# same, and their base; in the order in which they are made.
_PARTS: dict[str, tuple[str, str, type[Factory]]] = {
    "tokenizer": ("tokenizer_factory_type", "tokenizer_factory", TokenizerFactory),
    "data": ("data_factory_type", "data_factory", DataFactory),
    "model": ("model_factory_type", "model_factory", ModelFactory),
    "optimizer": ("optimizer_factory_type", "optimizer_factory", OptimizerFactory),
    "lr_scheduler": ("scheduler_factory_type", "scheduler_factory", SchedulerFactory),
}


_HELD_AS = {"data": "train_dataloader"}  # where a trainer keeps what a section describes


class FactoryTrainer(Trainer, Around):
    """A Trainer whose components are made by factories that a recipe chooses by name.

    A subclass needs a `loss(batch)`. With a `name` recipes take it as `trainer: {type: NAME}`;
    without one it is abstract. What it is made of:

        class Distill(FactoryTrainer):
            name = "distill"
            config_type = DistillConfig              # further keys under `trainer:`
            model_factory_type = [Student, Other]    # a class or a list, the first is the default
            data_factory_type = Pairs

    or, as annotations, `config: DistillConfig`, `model_factory: Student | Other`. A part that is
    None takes any registered factory of its kind. `pre` and `post` callbacks stand around its
    methods (`paceline.factories.around`).

    It works without a recipe as any Trainer does, given a model, an optimizer and loaders.

    Args:
        config: from `get_config`; what it describes is made in `configure()`, unless it is given.
        tokenizer: in place of the tokenizer factory's.
        **settings: as of `Trainer`, and the components of the class's own slots, which become
            attributes; they override the recipe's.

    Attributes:
        config: the typed recipe; None without one.
        tokenizer: None if there is none.

    Raises:
        ConfigError: a setting is unknown or impossible.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[TrainerConfig]] = TrainerConfig
    model_factory_type: ClassVar[Any] = None
    tokenizer_factory_type: ClassVar[Any] = None
    data_factory_type: ClassVar[Any] = DataFactory
    optimizer_factory_type: ClassVar[Any] = [AdamWFactory, SGDFactory]
    scheduler_factory_type: ClassVar[Any] = [
        LinearFactory, CosineFactory, ConstantFactory, StableDecayFactory,
    ]  # fmt: skip
    _called_plainly = frozenset({"evaluate"})  # of those that a class overrides
    events_around = {
        "init": "__init__",
        **{n: n for n in ("train", "epoch", "step", "loss", "backward", "evaluate", "checkpoint")},
    }
    slots = Only(
        {
            "tokenizer": TokenizerFactory,
            "data": Slot(DataFactory, choices=(DataFactory,)),
            "model": ModelFactory,
            "optimizer": Slot(OptimizerFactory, choices=(AdamWFactory, SGDFactory)),
            "lr_scheduler": Slot(
                SchedulerFactory,
                choices=(LinearFactory, CosineFactory, ConstantFactory, StableDecayFactory),
            ),
            "callbacks": list[Callback],
            "loggers": list[Sink],
        }
    )

    def __init__(
        self, config: TrainerConfig | None = None, *, tokenizer: Any = None, **settings: Any
    ) -> None:
        if config is not None and not isinstance(config, TrainerConfig):
            raise ConfigError(
                f"{type(self).__qualname__}({type(config).__name__} ...): expected a config, which "
                "`get_config` makes of a recipe's path or of a dictionary."
            )
        recipe = None if config is None else config._recipe
        if recipe is not None:
            if settings.get("run_dir") is not None:
                recipe = recipe.in_folder(settings["run_dir"])
            settings |= trainer_arguments(recipe, settings)
        bounded = settings.get("epochs") is not None or settings.get("max_steps") is not None
        if not bounded and config is not None:
            settings["epochs"] = 1
        own = {name: settings.pop(name, None) for name in self._own_sections()}
        super().__init__(**settings)
        vars(self).update(own)
        self.config = config
        self.tokenizer = tokenizer
        self._checked: set[str] = set()  # sections
        self._prepared: Any = None  # the training loader, as the settings below have changed it
        if recipe is not None:
            describe(self, recipe)
        if config is None:
            return
        if not bounded:
            self.plan.add("one pass over the data", "trainer.epochs")
        if config.exit_step or config.exit_step_this_run:
            self.callbacks.append(ExitStep(config.exit_step, this_run=config.exit_step_this_run))
        if config.min_steps is not None:
            self._check_min_steps(config.min_steps)

    def _check_min_steps(self, wanted: int) -> None:
        """Refuses what leaves `min_steps` without effect, or says otherwise."""
        name = f"trainer.min_steps={wanted}"
        if self.epochs is None:
            raise ConfigError(f"{name} has no effect without epochs: max_steps says it all.")
        if self.max_steps is not None and self.max_steps < wanted:
            raise ConfigError(f"{name} is more than max_steps={self.max_steps}: give one of them.")
        if self.epoch_length is not None:
            raise ConfigError(f"{name} and epoch_length both say how long an epoch is: give one.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        mistakes: list[str] = []
        found = classes_named(cls, "config_type", "config") or ()
        if len(found) == 1 and _is_a(found[0], TrainerConfig):
            cls.config_type = found[0]
        else:
            mistakes.append(
                f"config_type = {_shown(found)}: expected a class that derives from TrainerConfig."
            )
        slots: dict[str, Any] = {}
        for section, (attribute, hint, base) in _PARTS.items():
            parts = classes_named(cls, attribute, hint) or ()
            wrong = [part for part in parts if not _is_a(part, base)]
            if wrong:
                mistakes.append(
                    f"{attribute} = {_shown(parts)}: {_shown(wrong)} is no {base.__qualname__}; "
                    f"give a class that derives from it, or a list of them."
                )
            slots[section] = Slot(base, choices=() if wrong else parts)
        cls.slots = Only({**_slots_given(cls), **slots})
        if "name" in vars(cls) and not _has_loss(cls):
            mistakes.append("it has no loss: define loss(self, batch), the mean over its items.")
        step = vars(cls).get("step")
        if inspect.isfunction(step) and [*inspect.signature(step).parameters][1:2] == ["batch"]:
            mistakes.append(
                "step(self, batch): a step takes a window, which is one micro-batch or several: "
                "define loss(self, batch), or step(self, window) and loop over its micro-batches."
            )
        check_and_register(cls, FactoryTrainer, "trainer", mistakes)
        super().__init_subclass__(**kwargs)

    @classmethod
    def _own_sections(cls) -> list[str]:
        """The slots that a subclass adds to those of every trainer with factories."""
        return [name for name in cls.slots if name not in FactoryTrainer.slots]

    @property
    def schedule_length(self) -> int | None:
        """How often a schedule steps in the whole run; None if only the data's end will tell."""
        return self.epochs if self.lr_scheduler_interval == "epoch" else self.training_horizon

    def configure(self) -> None:
        """Makes what the recipe describes and was not given."""
        self.make(*_PARTS)

    def make(self, *sections: str) -> None:
        """Makes what sections of the recipe describe, unless it is there already.

        Args:
            sections: "tokenizer", "data", "model", "optimizer", "lr_scheduler": some of them, in
                this order.
        """
        self.check(*sections)
        for section in sections:
            if self._to_make([section]):
                self._make(section)
            if section == "data" and self.config is not None:
                self._prepare_data(self.config)

    def check(self, *sections: str) -> None:
        """Asks the factories of sections what is wrong, before anything but a tokenizer is made.

        Args:
            sections: as for `make`.

        Raises:
            RecipeError: there are mistakes; all of them are listed.
        """
        if self.config is None:
            return
        mistakes = self.config.mistakes()
        # The data are read last: what they may be depends on the tokenizer and the model's config.
        new = [s for s in self._to_make(sections) if s not in self._checked]
        for section in sorted(new, key=lambda name: name == "data"):
            with mistakes.collecting(section):
                if section == "tokenizer":
                    self._make(section)
                else:
                    self.factory(section).check(mistakes)
        mistakes.raise_any(self.config.origin)
        self._checked.update(new)

    def _to_make(self, sections: Iterable[str]) -> list[str]:
        """Those sections that the recipe has and of which nothing is made yet."""
        given = [s for s in sections if self.config and getattr(self.config, s) is not None]
        return [s for s in given if getattr(self, _HELD_AS.get(s, s)) is None]

    def _make(self, section: str) -> None:
        # The model's weights do not depend on how many numbers the data have drawn.
        apart = section in ("tokenizer", "data")
        with random_state_kept() if apart else nullcontext():
            made = self.factory(section)()
        if section == "data":
            self.train_dataloader, self.val_dataloader = made
        else:
            setattr(self, section, made)

    def _prepare_data(self, config: TrainerConfig) -> None:
        """Does to the training loader what `overfit_first_batch` and `min_steps` ask for, once."""
        if self.train_dataloader is None or self.train_dataloader is self._prepared:
            return
        ranks = self.world.dp_size
        if config.overfit_first_batch:
            self.train_dataloader = first_batch_only(self.train_dataloader, ranks)
            count = counted(self.train_dataloader.batch_size or 1, "sample")
            self.plan.add(
                f"every batch is the first one, of {count}",
                "trainer.overfit_first_batch",
                given=True,
            )
        self._prepared = loader = self.train_dataloader
        if config.min_steps is None or self.epochs is None:
            return
        accumulation, samples = self.gradient_accumulation_steps, self.global_batch_size
        if samples is None:
            kept = kept_global_batch_size(self.run_dir, self.resume, loader, accumulation)
            samples = self.world.broadcast_object(kept)
        size = WindowSize(accumulation, samples)
        self.epoch_length = epoch_for(config.min_steps, loader, size, self.epochs, ranks, self.seed)
        if self.epoch_length is not None:
            self.plan.add(
                f"an epoch has {self.epoch_length} micro-batches of a rank, more than a pass over "
                "the data",
                "trainer.min_steps",
            )

    def factory(self, section: str) -> Any:
        """The factory of a section, which is kept as the attribute of its name (`model_factory`).

        Args:
            section: one that the recipe has.
        """
        config, name = getattr(self.config, section), _PARTS[section][1]
        held = vars(self).get(name)
        if held is not None and held.config is config:
            return held
        made = config.class_of(_PARTS[section][2].kind, type(self).slots[section].choices)
        factory = made(self, config)
        setattr(self, name, factory)
        return factory


def get_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    trust: Collection[str] = (),
) -> Any:
    """Reads a recipe of a trainer with factories, and checks it.

    Args:
        source: the recipe's file, or its content as a dictionary.
        overrides: `key=value` changes to a file.
        trust: further packages whose classes the recipe may name, and models (by `name_or_path`)
            whose pickled weights may be read.

    Returns:
        The typed config: `SFTTrainer(get_config("sft.yaml")).train()`.

    Raises:
        RecipeError: the recipe has mistakes.
        ConfigError: its trainer has no factories.
    """
    if isinstance(source, Mapping):
        if overrides:
            raise ConfigError("overrides are for a recipe's file: change the dictionary itself.")
        recipe = check(composed_of(source), trust)
    else:
        recipe = load_recipe(source, overrides, trust=trust)
    config = recipe.config
    if not isinstance(config, TrainerConfig):
        raise ConfigError(
            f"the trainer of {recipe.composed.path} has no factories: `load_recipe` and "
            "`build_trainer` take it."
        )
    config._recipe = recipe
    return config


def _is_a(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _shown(values: Any) -> str:
    return ", ".join(getattr(one, "__qualname__", repr(one)) for one in values) or "None"


def _slots_given(cls: type) -> dict[str, Any]:
    """The slots that a class inherits, and those that it adds."""
    found: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        declared = vars(owner).get("slots", {})
        if isinstance(declared, Only):
            found = {}
        found |= declared
    return found


def _has_loss(cls: type[Trainer]) -> bool:
    return cls.loss is not Trainer.loss or cls.training_step is not Trainer.training_step
