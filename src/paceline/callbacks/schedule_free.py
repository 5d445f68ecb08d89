"""ScheduleFree: trains schedule-free optimizers at one point and evaluates them at another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.callbacks.exchanged_weights import ExchangedWeights, note_batch_norm
from paceline.errors import ConfigError
from paceline.trainer.checks import has_modes
from paceline.world.dtensors import reshard

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class ScheduleFree(ExchangedWeights):
    """Calls `optimizer.train()` and `optimizer.eval()` when a schedule-free optimizer needs it.

    Such optimizers compute gradients at one point, the training point, and are evaluated at
    another, an average that they keep implicitly (Defazio et al., "The Road Less Scheduled",
    NeurIPS 2024; the package `schedulefree`). Validations use the evaluation point. The optimizer's
    own arithmetic would not restore the same bits, so the trained weights are copied before
    `eval()`, and restored after it with everything that it changed in the optimizer.

    After training the models are left at the evaluation point; if they are trained further, in this
    process or another, they continue from the training point. Checkpoints hold the training point
    and, in this callback's state, the evaluation point as `average`, for `export`. That costs a
    copy of the weights in each checkpoint, and two in memory while it is made.

    BatchNorm's statistics are those of the training point, in validations too; the plan has a line
    about it.

    Raises:
        ConfigError: at the start of the run, no optimizer has these methods, or an optimizer's
            methods change its state in place, so that it could not be restored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._optimizers: list[Any] = []
        self._models: dict[str, torch.nn.Module] = {}
        self._kept: list[_Point] | None = None  # the training point, while exchanged
        self._is_over = False

    def on_setup(self, trainer: Trainer) -> None:
        """Finds the optimizers; a resumed run continues from the training point."""
        optimizers = dict(trainer.named_optimizers())
        if self._kept is not None and all(point.is_untouched() for point in self._kept):
            self._put_back()
        self._kept = None  # weights changed since by user code are trained as they are
        self._optimizers = [each for each in optimizers.values() if has_modes(each)]
        self._models, self._is_over = dict(trainer.named_models()), False
        if not self._optimizers:
            kinds = ", ".join(f"{name} is {type(o).__name__}" for name, o in optimizers.items())
            raise ConfigError(
                f"ScheduleFree: no optimizer has train() and eval() to call ({kinds}). Use one "
                "that has, such as schedulefree.AdamWScheduleFree, or leave the callback out."
            )
        note_batch_norm(trainer, "the schedule-free average")

    def on_train_start(self, trainer: Trainer) -> None:
        """Puts the optimizers into training mode."""
        for optimizer in self._optimizers:
            optimizer.train()

    def on_train_end(self, trainer: Trainer) -> None:
        """Leaves the models and the optimizers at the evaluation point."""
        self._kept = [_Point(optimizer) for optimizer in self._optimizers]
        for point in self._kept:
            point.leave()
        reshard(self._models.values())
        self._is_over = True

    def on_teardown(self, trainer: Trainer) -> None:
        """Copies the trained weights back, unless training is over."""
        if not self._is_over:
            self._put_back()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the weights at the evaluation point, by `model.parameter`."""
        if self._kept is None:
            with self.applied():
                return self._average()
        return self._average()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the evaluation point follows from the weights and the optimizers."""

    def _average(self) -> dict[str, Any]:
        own = {id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        return {
            "validated": True,
            "average": {
                f"{model_name}.{name}": parameter.detach().clone()
                for model_name, model in self._models.items()
                for name, parameter in model.named_parameters()
                if id(parameter) in own
            },
        }

    def _exchange(self) -> None:
        if self._kept is None:
            self._kept = [_Point(optimizer) for optimizer in self._optimizers]
            for point in self._kept:
                point.leave()
                # Only the weights stay there: a checkpoint may follow an abandoned validation, and
                # it has to save the optimizer in training mode.
                point.put_back_optimizer()
            reshard(self._models.values())

    def _put_back(self) -> None:
        if self._kept is not None:
            for point in self._kept:
                point.put_back()
            self._kept = None
            reshard(self._models.values())


class _Point:
    """An optimizer's training point: copies of its weights, references to the rest of its state."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._attributes = dict(vars(optimizer))
        self._groups = [dict(group) for group in optimizer.param_groups]
        self._state = {p: dict(entries) for p, entries in optimizer.state.items()}
        self._weights = {p: p.detach().clone() for group in self._groups for p in group["params"]}
        self._left: list[int] = []

    def leave(self) -> None:
        """Moves the weights to the evaluation point.

        Raises:
            ConfigError: the optimizer changes its state in place.
        """
        values = [value for entries in self._state.values() for value in entries.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]
        self._optimizer.eval()
        if versions != [tensor._version for tensor in tensors]:
            raise ConfigError(
                f"{type(self._optimizer).__name__}.eval() changes its state in place, which "
                "ScheduleFree cannot restore bit by bit."
            )
        self._left = [parameter._version for parameter in self._weights]

    def is_untouched(self) -> bool:
        """Whether the weights are still those that `leave` produced."""
        return self._left == [parameter._version for parameter in self._weights]

    def put_back_optimizer(self) -> None:
        """Restores everything but the weights."""
        vars(self._optimizer).update(self._attributes)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update(before)
        self._optimizer.state.clear()
        self._optimizer.state.update({p: dict(entries) for p, entries in self._state.items()})

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores everything, bit by bit."""
        self.put_back_optimizer()
        for parameter, weights in self._weights.items():
            parameter.copy_(weights)
