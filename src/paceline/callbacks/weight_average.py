"""The base of callbacks that keep an average of the weights beside the trained ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from paceline.callbacks.exchanged_weights import ExchangedWeights
from paceline.errors import ConfigError, MismatchError
from paceline.world.dtensors import copied, copy_into, local_part, reshard

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class WeightAverage(ExchangedWeights):
    """Moves the average towards the weights by a fraction of their distance, at some steps.

    The average is a second set of tensors with its own place in the checkpoint. Only during a
    validation is it copied into the models; the trained weights are copied back afterwards, bit by
    bit. So every checkpoint, the best one too, holds both.

    Only parameters are averaged. Buffers (BatchNorm's statistics) are the trained model's own.
    Averages of float16 and bfloat16 parameters are kept in float32, since rounding would swallow
    small updates.
    """

    def __init__(self, *, evaluate: bool = True) -> None:
        super().__init__(evaluate=evaluate)
        self._models: dict[str, torch.nn.Module] = {}
        self._live: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}
        self._updates = 0
        self._started = False
        self._kept: dict[str, torch.Tensor] | None = None  # the trained weights, while exchanged

    @abstractmethod
    def _is_due(self, step: int) -> bool:
        """Whether the average is updated after `step` steps."""

    @abstractmethod
    def _share(self) -> float:
        """The fraction of the distance to the weights that the next update covers, from 0 to 1."""

    def _is_of_use(self) -> bool:
        """Whether there is an average to validate with."""
        return True

    def on_setup(self, trainer: Trainer) -> None:
        """Allocates the tensors that a checkpoint's average is loaded into."""
        models = dict(trainer.named_models())
        if models != self._models:  # the same models trained further keep their average
            self._models, self._live, self._average = models, {}, {}
            self._updates, self._started = 0, False
        self._adopt()
        if self.evaluate:
            trainer.plan.add(
                "metrics, export and load_model are of the averaged weights",
                f"{type(self).__name__}(evaluate=False)",
            )

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts from the current weights, unless there already is an average."""
        self._adopt()
        if not self._started:
            _copy(self._average, self._live)  # weights may have been loaded since `on_setup`
        self._started = True

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Adds unfrozen parameters; until now their average equals their weights."""
        self._adopt()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Updates the average, if an update is due."""
        if self._is_due(trainer.global_step):
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        if not self._average:
            return
        average = [local_part(mean) for mean in self._average.values()]
        live = [
            local_part(weights).to(mean.dtype)
            for weights, mean in zip(self._live.values(), average, strict=True)
        ]
        torch._foreach_lerp_(average, live, self._share())  # pyright: ignore[reportPrivateImportUsage]
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the averages by `model.parameter` (no copies).

        An average without an update is left out, so that it cannot be exported.
        """
        average: dict[str, Any] = {}
        if self._is_of_use():
            average = {"average": dict(self._average), "validated": self.evaluate}
        return {"updates": self._updates, **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            MismatchError: names, shapes or dtypes differ from the models'; all mismatches are
                listed.
        """
        if "average" in state:
            self._adopt(also=state["average"])
            _check(state["average"], self._average)
            _copy(self._average, state["average"])
            self._started = True
        self._updates = state["updates"]

    def averaged_state_dict(self, model: str | None = None) -> dict[str, torch.Tensor]:
        """The state dict of one model with the averages in place of its parameters.

        Args:
            model: the model's name; may be left out if there is one model.

        Returns:
            Copies, in the model's own dtypes, of parameters (averaged) and buffers (current).
        """
        name = model or next(iter(self._models), "")
        if name not in self._models or (model is None and len(self._models) > 1):
            raise ConfigError(
                f"averaged_state_dict: name one of the models: {', '.join(self._models)}"
            )
        # By identity, so that tied weights are averaged under all of their names.
        means = {id(weights): self._average[key] for key, weights in self._live.items()}
        means = means if self._is_of_use() else {}
        tensors = self._models[name].state_dict(keep_vars=True)
        return {
            key: means.get(id(tensor), tensor).detach().to(tensor.dtype, copy=True)
            for key, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        }

    def _adopt(self, also: Collection[str] = ()) -> None:
        """Starts an average for each trainable parameter (and those in `also`) without one."""
        for model_name, model in self._models.items():
            for name, parameter in model.named_parameters():
                key = f"{model_name}.{name}"
                if key in self._average or not parameter.dtype.is_floating_point:
                    continue
                if parameter.requires_grad or key in also:
                    self._live[key] = parameter
                    self._average[key] = _start(parameter)

    def _exchange(self) -> None:
        if self._kept is None and self._is_of_use():
            self._kept = {name: copied(weights) for name, weights in self._live.items()}
            _copy(self._live, self._average)
            reshard(self._models.values())

    def _put_back(self) -> None:
        if self._kept is not None:
            _copy(self._live, self._kept)
            reshard(self._models.values())
            self._kept = None


@torch.no_grad()
def _start(parameter: torch.Tensor) -> torch.Tensor:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().to(torch.float32) if half else copied(parameter)


def _copy(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        copy_into(tensor, source[name])


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check(saved: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    problems = [f"{name} is missing" for name in held if name not in saved]
    problems += [f"{name} belongs to no model" for name in saved if name not in held]
    problems += [
        f"{name} is {_form(saved[name])}, here {_form(held[name])}"
        for name in held
        if name in saved and _form(saved[name]) != _form(held[name])
    ]
    if problems:
        raise MismatchError("the averaged weights do not fit the models: " + "; ".join(problems))
