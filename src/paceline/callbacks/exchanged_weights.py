"""The base of callbacks that validate with weights other than those being trained."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class ExchangedWeights(Callback, ABC):
    """Swaps other weights into the models for each validation, then restores the trained ones.

    A subclass loads these weights in `_exchange` and keeps copies of the trained ones, which
    `_put_back` restores bit by bit. Both do nothing when there is nothing to swap.
    """

    # After callbacks that change weights or what is trained; before those that only watch.
    priority = 200

    def __init__(self, *, evaluate: bool = True) -> None:
        self.evaluate = evaluate

    @abstractmethod
    def _exchange(self) -> None:
        """Swaps the other weights in."""

    @abstractmethod
    def _put_back(self) -> None:
        """Copies the trained weights back."""

    def on_validation_start(self, trainer: Trainer) -> None:
        """Swaps the other weights in."""
        if self.evaluate:
            self._exchange()

    def on_validation_end(self, trainer: Trainer) -> None:
        """Copies the trained weights back."""
        self._put_back()

    # A validation that fails or is abandoned must not leave the swapped weights in the models. Any
    # of the events below may follow it.

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Copies the trained weights back, if user code caught an error of the validation."""
        self._put_back()

    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Copies the trained weights back, if a validation was abandoned."""
        self._put_back()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Copies the trained weights back, if a validation failed."""
        self._put_back()

    def on_teardown(self, trainer: Trainer) -> None:
        """Copies the trained weights back, however the run ended."""
        self._put_back()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the models have the other weights, e.g. for a test after training."""
        self._exchange()
        try:
            yield
        finally:
            self._put_back()


def note_batch_norm(trainer: Trainer, whose: str) -> None:
    """Adds a line to the plan if BatchNorm statistics belong to the trained weights alone.

    Args:
        trainer: whose models are searched for BatchNorm, and whose plan gets the line.
        whose: what is validated, the subject of the line.
    """
    modules = (m for model in trainer.named_models().values() for m in model.modules())
    if any(isinstance(m, torch.nn.modules.batchnorm._NormBase) for m in modules):
        trainer.plan.add(
            f"{whose} is validated with the BatchNorm statistics of the trained weights",
            "torch.optim.swa_utils.update_bn after training",
        )
