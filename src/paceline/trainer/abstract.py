"""AbstractTrainer: the interface that every trainer keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from paceline.world.device_parameters import DeviceParameters
from paceline.world.world import World


@dataclass(frozen=True, kw_only=True)
class AbstractTrainerConfig:
    """What an `AbstractTrainer` may be configured with; extend it with fields of your own.

    Args:
        seed: of the run; 0 is a seed like any other.
        project, group, experiment: names of the run.
        device_parameters: layout, precision and compilation.
    """

    seed: int = 42
    project: str = ""
    group: str = ""
    experiment: str = ""
    device_parameters: DeviceParameters = field(default_factory=DeviceParameters)


class AbstractTrainer(ABC):
    """Named components, counters, a world, and the life cycle configure -> setup -> fit.

    Subclass it to write a trainer from nothing; subclass `Trainer` to get the loop as well.

    Args:
        config: an `AbstractTrainerConfig`, or None for its defaults.

    Attributes:
        config: as given.
        global_step: optimizer steps (windows) done.
        current_epoch: epochs done.
        local_batches: batches this process has trained on since it started.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.global_step = 0
        self.current_epoch = 0
        self.local_batches = 0

    @cached_property
    def world(self) -> World:
        """This process's place among the others, and its device."""
        config = self.config if self.config is not None else AbstractTrainerConfig()
        return World(config.device_parameters.parallel)

    @abstractmethod
    def configure(self) -> None:
        """Makes the components: models, optimizers, schedulers, loaders."""

    @abstractmethod
    def setup(self) -> None:
        """Places the components on their devices."""

    @abstractmethod
    def fit(self) -> Any:
        """Trains."""

    @abstractmethod
    def named_models(self) -> Mapping[str, torch.nn.Module]:
        """The models, by name."""

    @abstractmethod
    def named_optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers, by name."""

    @abstractmethod
    def named_schedulers(self) -> Mapping[str, Any] | None:
        """The learning-rate schedulers, by name; None if there is none."""

    @abstractmethod
    def get_module(self, fqn: str) -> torch.nn.Module:
        """The module at a dotted path whose first part is a model's name."""

    @property
    @abstractmethod
    def train_dataloader(self) -> Any:
        """Yields the training batches."""

    @property
    @abstractmethod
    def val_dataloader(self) -> Any:
        """Yields the validation batches; None for no validation."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The whole state."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def get_name_by_model(self, model: torch.nn.Module) -> str:
        """The name of a model; ValueError if it is none of this trainer's."""
        return _name_of(model, self.named_models(), "model")

    def get_name_by_optimizer(self, optimizer: torch.optim.Optimizer) -> str:
        """The name of an optimizer; ValueError if it is none of this trainer's."""
        return _name_of(optimizer, self.named_optimizers(), "optimizer")

    def get_name_by_scheduler(self, scheduler: Any) -> str:
        """The name of a scheduler; ValueError if it is none of this trainer's."""
        return _name_of(scheduler, self.named_schedulers() or {}, "scheduler")

    def get_scheduler_from_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler that follows an optimizer, or None."""
        schedulers = (self.named_schedulers() or {}).values()
        return next((s for s in schedulers if s.optimizer is optimizer), None)

    def get_model_by_optimizer(self, name: str) -> torch.nn.Module:
        """The model that the named optimizer trains; ValueError if there is none."""
        optimizer = _named(name, self.named_optimizers(), "optimizer")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in self.named_models().values():
            if any(id(parameter) in held for parameter in model.parameters()):
                return model
        raise ValueError(f"the optimizer {name!r} trains no parameter of this trainer's models")

    def get_optimizers_by_model(self, name: str) -> list[torch.optim.Optimizer]:
        """The optimizers that train parameters of the named model; ValueError if it is unknown."""
        own = {id(p) for p in _named(name, self.named_models(), "model").parameters()}
        return [
            optimizer
            for optimizer in self.named_optimizers().values()
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        ]


def _named(name: str, named: Mapping[str, Any], kind: str) -> Any:
    if name not in named:
        raise ValueError(f"no {kind} is called {name!r}; there is: {', '.join(named) or 'none'}")
    return named[name]


def _name_of(thing: Any, named: Mapping[str, Any], kind: str) -> str:
    for name, other in named.items():
        if other is thing:
            return name
    raise ValueError(
        f"this {type(thing).__name__} is no {kind} of this trainer; there is: "
        f"{', '.join(named) or 'none'}"
    )
