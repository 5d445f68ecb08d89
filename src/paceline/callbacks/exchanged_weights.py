"""What callbacks share that validate with other weights than those being trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class ExchangedWeights(Callback):
    """Puts other weights into the models for each validation, and the trained ones back bit by bit.

    A subclass says in `_exchange` what these weights are, and keeps copies of the trained ones for
    `_put_back`. Either does nothing where there is nothing to do.
    """

    # After callbacks that change weights or what is trained; before those that only watch.
    priority = 200

    def __init__(self, *, evaluate: bool = True) -> None:
        self.evaluate = evaluate

    def _exchange(self) -> None:
        raise NotImplementedError

    def _put_back(self) -> None:
        raise NotImplementedError

    def on_validation_start(self, trainer: Trainer) -> None:
        """Puts the other weights into the models."""
        if self.evaluate:
            self._exchange()

    def on_validation_end(self, trainer: Trainer) -> None:
        """Copies the trained weights back."""
        self._put_back()

    # A validation that fails or is broken off must not leave the others in the models. The events
    # below are what may follow it.

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Copies the trained weights back, if somebody caught a validation's error and goes on."""
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
        """Within the block the models have the other weights, e.g. for a test after training."""
        self._exchange()
        try:
            yield
        finally:
            self._put_back()


def note_batch_norm(trainer: Trainer, whose: str) -> None:
    """A line of the plan, if there are statistics that belong to the trained weights alone."""
    modules = (m for model in trainer.named_models().values() for m in model.modules())
    if any(isinstance(m, torch.nn.modules.batchnorm._NormBase) for m in modules):
        trainer.plan.add(
            f"{whose} is validated with the BatchNorm statistics of the trained weights",
            "torch.optim.swa_utils.update_bn after training",
        )
