"""GradientMonitor: logs the norm of the gradients and applies the non-finite policy to it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback
from paceline.world.dtensors import by_mesh, dense_part, whole

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class GradientMonitor(Callback):
    """Logs the 2-norm of an optimizer's gradients, before clipping.

    The name is `grad_norm`; with several optimizers `grad_norm/<optimizer>`. A row has the mean of
    its steps, and as `max_grad_norm` the largest. Between rows nothing is read from the device. The
    trainer's `on_nonfinite` policy applies to the norm.

    Args:
        every: optimizer steps between norms. Above 1 it is cheaper, but in the steps between a
            gradient that is not finite goes unnoticed if the loss is finite.
        per_layer: also log the norm of each layer (the module that owns the parameters), as
            `grad_norm/<layer>`.

    Raises:
        ConfigError: `every` is less than 1.
    """

    def __init__(self, every: int = 1, *, per_layer: bool = False) -> None:
        if every < 1:
            raise ConfigError(f"GradientMonitor(every={every}): must be at least 1")
        self.every = every
        self.per_layer = per_layer
        self._names: dict[int, str] = {}
        self._layers: dict[torch.Tensor, str] = {}
        self._largest: dict[str, torch.Tensor] = {}  # since the last row
        self._stepped = False  # before the first step there is no state

    def on_setup(self, trainer: Trainer) -> None:
        """A run begins: forgets the norms of one before."""
        self._largest, self._stepped = {}, False

    def on_train_start(self, trainer: Trainer) -> None:
        """Names the optimizers and layers.

        Raises:
            ConfigError: `per_layer` with pipeline parallelism, where a rank has only the layers of
                its own stage.
        """
        if self.per_layer and trainer.pipeline is not None:
            raise ConfigError(
                "GradientMonitor(per_layer=True): no rank has the gradients of all layers with "
                "parallel.pipeline; leave per_layer out."
            )
        optimizers = dict(trainer.named_optimizers())
        self._names = {
            id(optimizer): "grad_norm" if len(optimizers) == 1 else f"grad_norm/{name}"
            for name, optimizer in optimizers.items()
        }
        self._layers = layer_names(dict(trainer.named_models())) if self.per_layer else {}

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Computes the norm, logs it and passes it to the trainer."""
        if (trainer.global_step + 1) % self.every:
            return
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if not parameters and trainer.pipeline is None:
            return
        norm = norm_of_all_stages(trainer, [p.grad for p in parameters])
        trainer.note_gradient_norm(norm)
        name = self._names[id(optimizer)]
        trainer.log(name, norm, weight=1)  # a step counts once
        norm = norm.detach()
        largest = self._largest.get(name)
        self._largest[name] = (
            norm if largest is None else torch.maximum(largest.to(norm.device), norm)
        )
        if self.per_layer:
            self._log_layers(trainer, parameters)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the largest norm of its steps to a row."""
        self._stepped = True
        if metrics:
            metrics |= {f"max_{name}": float(norm) for name, norm in self._largest.items()}
            self._largest = {}

    def state_dict(self) -> dict[str, Any]:
        """The largest norm since the last row."""
        return {"largest": dict(self._largest)} if self._stepped else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._largest, self._stepped = dict(state["largest"]), True

    def _log_layers(self, trainer: Trainer, parameters: list[torch.Tensor]) -> None:
        layers: dict[str, list[torch.Tensor]] = {}
        for parameter in parameters:
            name = self._layers.get(parameter, "other")
            layers.setdefault(name, []).append(parameter)
        for name, members in layers.items():
            trainer.log(f"grad_norm/{name}", gradient_norm(p.grad for p in members), weight=1)


def norm_of_all_stages(trainer: Trainer, gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """`gradient_norm` over the gradients of all pipeline stages.

    With a pipeline every rank has to call it, even if it has no gradients.

    Args:
        trainer: whose pipeline, if it has one, adds up the stages.
        gradients: of this rank, of any shape; None for a parameter without one.

    Returns:
        A 0-dim tensor on the device.
    """
    if trainer.pipeline is None:
        return gradient_norm(gradients)
    return trainer.pipeline.total_norm(gradients, gradient_norm)


@torch.no_grad()
def gradient_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector, sqrt(sum of g_i^2), a 0-dim device tensor.

    Half-precision gradients are squared and summed in float32: their own range overflows at a
    norm of 65504, and that would look like a non-finite gradient.

    Args:
        gradients: dense, sparse, complex or distributed tensors of any shape; None is skipped.

    Returns:
        A 0-dim tensor on the device; zero if there are no gradients.
    """
    dense = [_dense(gradient) for gradient in gradients if gradient is not None]
    if not dense:
        return torch.zeros(())
    dtype = reduce(torch.promote_types, {gradient.dtype for gradient in dense}, torch.float32)
    totals = []
    for group in by_mesh(dense):
        norms = torch._foreach_norm(group, 2.0, dtype)  # pyright: ignore[reportPrivateImportUsage]
        totals.append(whole(torch.linalg.vector_norm(torch.stack(norms))))
    return totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    gradient = dense_part(gradient)
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def layer_names(models: dict[str, torch.nn.Module]) -> dict[torch.Tensor, str]:
    """The layer of each parameter, prefixed with the model's name if there are several models."""
    layers: dict[torch.Tensor, str] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            parts = name.split(".")[:-1] or [name]
            layers[parameter] = ".".join([model_name, *parts] if len(models) > 1 else parts)
    return layers
