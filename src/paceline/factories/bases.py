"""The factories of a FactoryTrainer: each makes one component from its typed section of a recipe.

A factory of one's own derives from the base of its kind, has a `config_type` (or the annotation
`config: MyConfig`) and a `name`, by which recipes choose it:

    class TinyConfig(Config):
        width: HumanInt = 64

    class Tiny(ModelFactory):
        name = "tiny"
        config_type = TinyConfig

        def create_model(self, model_config):
            return TinyModel(self.config.width)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol

import pydantic
import torch
from torch.utils.data import DataLoader

from paceline.errors import ConfigError
from paceline.factories.around import Around
from paceline.factories.defined import check_and_register, classes_named
from paceline.log.plan import Plan
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.typed import Config, HumanFloat, HumanInt, OfKind, Typed
from paceline.world.world import World


class Made(Protocol):
    """What factories read of the trainer for which they make something; what is made grows."""

    config: Any
    tokenizer: Any
    model: Any
    optimizer: Any
    plan: Plan

    @property
    def device(self) -> torch.device: ...
    @property
    def world(self) -> World: ...
    @property
    def training_horizon(self) -> int | None: ...
    @property
    def schedule_length(self) -> int | None: ...


class Factory(Typed, Around):
    """What the factories have in common. One without a `name` is abstract.

    Args:
        trainer: for whom it makes something.
        config: its section of the recipe.

    Attributes:
        kind: its kind in the registry.
    """

    kind: ClassVar[str] = ""
    base: ClassVar[type[Factory]]

    config: Any

    def __init__(self, trainer: Made, config: Any = None) -> None:
        self.trainer = trainer
        self.config = type(self).config_type() if config is None else config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "kind" in vars(cls):
            cls.base = cls
            super().__init_subclass__(**kwargs)
            return
        found = classes_named(cls, "config_type", "config") or ()
        mistakes = []
        expected = cls.base.config_type
        if len(found) != 1 or not (isinstance(found[0], type) and issubclass(found[0], expected)):
            text = ", ".join(getattr(one, "__qualname__", repr(one)) for one in found) or "None"
            mistakes.append(
                f"config_type = {text}: expected a class that derives from {expected.__qualname__}."
            )
        else:
            cls.config_type = found[0]
        check_and_register(cls, cls.base, cls.kind, mistakes)
        super().__init_subclass__(**kwargs)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.trainer.device

    def check(self, mistakes: Mistakes) -> None:
        """Finds what is wrong with its section; called before anything but a tokenizer is made.

        An error that it raises is reported together with the mistakes of other sections.

        Args:
            mistakes: further ones are added to it.
        """


class ModelFactory(Factory):
    """Makes the model."""

    kind = "model_factory"
    events_around = {
        "init": "__init__",
        "create-config": "create_config",
        "create-model": "create_model",
    }

    def __call__(self) -> torch.nn.Module | Mapping[str, torch.nn.Module]:
        return self.create_model(self.model_config)

    @cached_property
    def model_config(self) -> Any:
        """What `create_config` returned, which is asked once."""
        return self.create_config()

    def create_config(self) -> Any:
        """What the model is made from; by default this factory's own config."""
        return self.config

    @abstractmethod
    def create_model(self, model_config: Any) -> torch.nn.Module | Mapping[str, torch.nn.Module]:
        """The model, or models by name, on the CPU.

        Args:
            model_config: what `create_config` returned.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a create_model().")


class TokenizerFactory(Factory):
    """Makes the tokenizer."""

    kind = "tokenizer_factory"
    events_around = {"init": "__init__", "create-tokenizer": "create_tokenizer"}

    def __call__(self) -> Any:
        return self.create_tokenizer()

    @abstractmethod
    def create_tokenizer(self) -> Any:
        """The tokenizer."""
        raise NotImplementedError(f"{type(self).__qualname__} needs a create_tokenizer().")


class OptimizerFactory(Factory):
    """Makes the optimizer."""

    kind = "optimizer_factory"
    events_around = {"init": "__init__", "create-optimizer": "create_optimizer"}

    def __call__(self) -> torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer]:
        return self.create_optimizer(self.trainer.model, self.config)

    @abstractmethod
    def create_optimizer(self, model: Any, optimizer_config: Any) -> Any:
        """The optimizer of the model, or optimizers by name.

        Args:
            model: as the model factory made it.
            optimizer_config: this factory's config.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a create_optimizer().")


class SchedulerFactory(Factory):
    """Makes the learning-rate schedule, which steps with the optimizer."""

    kind = "scheduler_factory"
    events_around = {"init": "__init__", "create-scheduler": "create_scheduler"}

    def __call__(self) -> Any:
        return self.create_scheduler(self.trainer.optimizer)

    @abstractmethod
    def create_scheduler(self, optimizer: Any) -> Any:
        """The schedule of the optimizer; None for none.

        Args:
            optimizer: as the optimizer factory made it. `self.trainer.training_horizon` is the
                length of the run in optimizer steps.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a create_scheduler().")


class DataSourceConfig(Config):
    """The settings that every source has.

    Attributes:
        split: the part of the data set to read.
        sample_ratio: a share to draw, without replacement.
        sample_count: a number of samples to draw, without replacement.
        sample_seed: of the draw.
        weight: how often a sample is seen beside those of other sources.
    """

    split: str = ""
    sample_ratio: HumanFloat | None = pydantic.Field(None, gt=0, le=1)
    sample_count: HumanInt | None = pydantic.Field(None, gt=0)
    sample_seed: int = 42
    weight: HumanFloat = pydantic.Field(1.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> DataSourceConfig:
        if self.sample_ratio is not None and self.sample_count is not None:
            raise ValueError("sample_ratio and sample_count exclude each other: give one of them.")
        drawn = self.sample_ratio is not None or self.sample_count is not None
        if "sample_seed" in self.model_fields_set and not drawn:
            raise ValueError("sample_seed has no effect without sample_ratio or sample_count.")
        return self


class DataSource(Factory):
    """Reads one set of samples.

    Args:
        factory: the data factory for which it reads.
        config: its entry in the recipe.
        split: what to read where the config gives no split, "train" or "eval".
    """

    kind = "data_source"
    config_type = DataSourceConfig
    events_around = {"init": "__init__", "load": "load"}

    def __init__(self, factory: DataFactory, config: Any = None, split: str = "train") -> None:
        super().__init__(factory.trainer, config)
        self.factory, self.split = factory, split

    def __call__(self) -> Sequence[Mapping[str, Any]]:
        return self.load(self.config, self.config.split or self.split)

    @abstractmethod
    def load(self, config: Any, split: str) -> Sequence[Mapping[str, Any]]:
        """The rows of the set, each a mapping of its columns.

        Args:
            config: this source's config.
            split: the part to read; "train" or "eval" where the recipe does not say.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a load().")


class DataConfig(Config):
    """The settings that every data factory has.

    Attributes:
        micro_batch_size: samples of a rank in a micro-batch.
        num_workers: worker processes that read samples; 0 reads in the training process.
        seed: of shuffles and draws while the data are prepared; the order of training has its own.
        sources: what to train on.
        eval_sources: what to validate on, by name.
    """

    free = frozenset({"micro_batch_size", "num_workers"})
    micro_batch_size: HumanInt = pydantic.Field(1, gt=0)
    num_workers: int = pydantic.Field(0, ge=0)
    seed: int = 42
    sources: Annotated[list[DataSourceConfig], OfKind("data_source")] = []
    eval_sources: Annotated[dict[str, DataSourceConfig], OfKind("data_source")] = {}


class DataFactory(Factory):
    """Makes the loaders: reads the sources, processes and splits them."""

    kind = "data_factory"
    config_type = DataConfig
    events_around = {
        "init": "__init__",
        "load": "load",
        "process": "process",
        "split": "split_data",
        "create-dataloader": "create_dataloader",
    }

    evaluates = False  # whether the data at hand are for validation

    def __call__(self) -> tuple[Any, Any]:
        """The training loader and the validation loader, or loaders by name; None for none."""
        rows = self.load(self._sources(self.config.sources, "train"))
        training, held_out = self.split_data(self.process(rows))
        loader = self.create_dataloader(training)
        self.evaluates = True
        named = {
            name: self.create_dataloader(self.process(self.load(self._sources([one], "eval"))))
            for name, one in self.config.eval_sources.items()
        }
        if held_out is not None:
            named["held_out"] = self.create_dataloader(held_out)
        return loader, named or None

    def _sources(self, configs: Iterable[Any], split: str) -> list[DataSource]:
        """The sources of configs, each of the class that its `type` names."""
        return [one.class_of(DataSource.kind)(self, one, split) for one in configs]

    def load(self, data_sources: Sequence[DataSource]) -> Any:
        """The rows of all sources, one source after the other.

        Args:
            data_sources: the sources.
        """
        return [row for source in data_sources for row in source()]

    def process(self, dataset: Any) -> Any:
        """What the loader draws samples from; by default the rows themselves.

        Args:
            dataset: what `load` returned.
        """
        return dataset

    def split_data(self, training_data: Any) -> tuple[Any, Any]:
        """Training data, and what of it is held out for validation; by default nothing.

        Args:
            training_data: what `process` returned.
        """
        return training_data, None

    def create_dataloader(self, dataset: Any) -> Any:
        """A loader of the samples; the Trainer shuffles it and shares it out over ranks.

        Args:
            dataset: what `process` or `split_data` returned.
        """
        if not len(dataset):
            raise ConfigError("data: there are no samples.")
        return DataLoader(
            dataset,
            batch_size=self.config.micro_batch_size,
            shuffle=not self.evaluates,
            num_workers=self.config.num_workers,
        )
