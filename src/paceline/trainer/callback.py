"""Callback: behaviour that plugs into any Trainer."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

import torch

from paceline.registry import register_named

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

Kind = TypeVar("Kind")


EARLY_STOP = "early stop"
"""The reason of a run that its validations have ended."""


class Callback(Generic[Kind]):
    """Behaviour that plugs into any Trainer, one method an event.

    Each method gets the trainer first, then what the Trainer's own hook gets. Only methods that a
    subclass overrides are ever called. Callbacks run in rising `priority`, ties in the order given,
    after the trainer's own hook. What must survive a resume goes through `state_dict` and
    `load_state_dict`; the checkpoint stores it under `name`. A subclass of `Callback[MyTrainer]` is
    refused by trainers that are no MyTrainer, be it a Trainer or a class that one inherits from.

    Attributes:
        priority: lower runs earlier.
        name: the class's name unless set; a second callback of a name gets `_2`. A class that sets
            it is known to recipes by it.
        out_of_patience: while true, training is over at the next boundary with a validation, an
            epoch's end or a checkpoint. It has to follow from values that are equal on every rank,
            and from the callback's state alone: a run that is started again asks it once more.
        ends_with: the run's `stopped_by` where `out_of_patience` ends it. "pruned" is a status of
            its own in run.json; with any other reason the run is complete.
    """

    registered_as: ClassVar[str] = "callback"  # the kind in the registry
    priority: int = 100
    name: str = ""
    ends_with: str = EARLY_STOP

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_named(cls.registered_as, cls)

    @property
    def out_of_patience(self) -> bool:
        return False

    def run_identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged; compared as `callbacks.NAME.<key>`.

        Numbers, strings, None or lists of them, the same on every rank.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, arrays, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def on_setup(self, trainer: Trainer) -> None: ...
    def on_load_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None: ...
    def on_train_start(self, trainer: Trainer) -> None: ...
    def on_train_epoch_start(self, trainer: Trainer) -> None: ...
    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None: ...
    def on_before_backward(self, trainer: Trainer, loss: torch.Tensor) -> None: ...
    def on_after_backward(self, trainer: Trainer) -> None: ...
    def on_train_batch_end(
        self, trainer: Trainer, batch: Any, batch_idx: int, loss: torch.Tensor
    ) -> None: ...
    def on_before_optimizer_step(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer
    ) -> None: ...
    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None: ...
    def on_validation_start(self, trainer: Trainer) -> None: ...
    def on_validation_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None: ...
    def on_validation_batch_end(self, trainer: Trainer, batch: Any, batch_idx: int) -> None: ...
    def on_validation_end(self, trainer: Trainer) -> None: ...
    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None: ...
    def on_train_epoch_end(self, trainer: Trainer) -> None: ...
    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None: ...
    def on_checkpoint(self, trainer: Trainer, path: Path, step: int, best: bool) -> None: ...
    def on_train_end(self, trainer: Trainer) -> None: ...
    def on_exception(self, trainer: Trainer, error: BaseException) -> None: ...
    def on_teardown(self, trainer: Trainer) -> None: ...


def trainers_of(callback: Callback) -> list[Any]:
    """The classes that a trainer has to be of to take a callback, from `Callback[MyTrainer]`.

    Of a protocol that is not `runtime_checkable` nothing is required.
    """
    return [
        argument
        for cls in type(callback).__mro__
        for base in vars(cls).get("__orig_bases__", ())
        if isinstance(origin := get_origin(base), type) and issubclass(origin, Callback)
        for argument in get_args(base)
        if isinstance(argument, type | UnionType) and _is_checkable(argument)
    ]


def _is_checkable(kind: Any) -> bool:
    try:
        isinstance(None, kind)
    except TypeError:
        return False
    return True
