"""UpdateRatio: the size of a step relative to the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from paceline.callbacks.gradient_monitor import gradient_norm, layer_names
from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class UpdateRatio(Callback):
    """Adds |change of weights| / |weights before| (2-norms) to the rows, as `update_ratio/<name>`.

    About 1e-3 is healthy. If it is far larger, the learning rate is too high; if it is far smaller,
    the learning rate is too low or the layer does not learn. Source: Karpathy, "Neural Networks:
    Zero to Hero", part 4 (2022).

    Only steps with a row are measured. In these the weights are copied before the step, which takes
    as much memory as the trained weights until the step is done, and the norms are read from the
    device with the row. Weights that are all zero before the step have no ratio.

    Args:
        every: measure at rows whose step is a multiple of this.
        per: a ratio for each "layer" (the module that owns the parameters) or each parameter
            "group" of the optimizers, by its own `name` or else its index.

    Raises:
        ConfigError: an argument is out of its range.
    """

    # Before callbacks that only read rows, e.g. the progress display.
    priority = 50

    def __init__(self, every: int = 1, *, per: Literal["layer", "group"] = "layer") -> None:
        if every < 1:
            raise ConfigError(f"UpdateRatio(every={every}): must be at least 1")
        if per not in ("layer", "group"):
            raise ConfigError(f"UpdateRatio(per={per!r}): expected 'layer' or 'group'")
        self.every = every
        self.per = per
        self._names: dict[torch.Tensor, str] = {}
        self._before: dict[torch.Tensor, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        """Names the layers or groups.

        Raises:
            ConfigError: with pipeline parallelism, where a rank has only the weights of its stage.
        """
        if trainer.pipeline is not None:
            raise ConfigError("UpdateRatio does not exist yet with parallel.pipeline.")
        if self.per == "layer":
            self._names = layer_names(dict(trainer.named_models()))
        else:
            self._names = _group_names(dict(trainer.named_optimizers()))
        self._before = {}

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Copies the weights, if there will be a row at this step."""
        step = trainer.global_step + 1
        if step % trainer.recorder.every or step % self.every:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._before[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the ratios to the row."""
        if not self._before:
            return
        named: dict[str, list[torch.Tensor]] = {}
        for parameter in self._before:
            named.setdefault(self._names.get(parameter, "other"), []).append(parameter)
        norms = [
            torch.stack(
                [
                    gradient_norm(p.detach() - self._before[p] for p in parameters),
                    gradient_norm(self._before[p] for p in parameters),
                ]
            )
            for parameters in named.values()
        ]
        self._before = {}
        read = torch.stack([pair.double() for pair in norms]).tolist()
        for name, (change, size) in zip(named, read, strict=True):
            if size > 0:
                metrics[f"update_ratio/{name}"] = change / size


def _group_names(optimizers: dict[str, torch.optim.Optimizer]) -> dict[torch.Tensor, str]:
    """The name of each parameter's group, prefixed with the optimizer's if there are several."""
    return {
        parameter: f"{name}/{label}" if len(optimizers) > 1 else label
        for name, optimizer in optimizers.items()
        for index, group in enumerate(optimizer.param_groups)
        for label in [str(group.get("name", index))]
        for parameter in group["params"]
    }
