"""GradientExplosion: warns of gradients much larger than usual."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from paceline.callbacks.gradient_monitor import norm_of_all_stages
from paceline.errors import ConfigError
from paceline.log.accumulator import Held
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class GradientExplosion(Callback):
    """Compares each step's gradient norm, before clipping, with the usual norm.

    The usual norm is the median of the previous `window` steps, which a few outliers do not move. A
    step is an explosion if its norm exceeds `factor` times the usual one. The callback changes
    nothing in training: clipping (`max_grad_norm`) is what limits a step.

    The norm that clipping or a `GradientMonitor` computes is reused. Norms stay on the device and
    are read with the next row. The warning, about the worst step since the previous row, therefore
    comes with a row, which also has the largest norm since then as `grad_norm/max` (with several
    optimizers `grad_norm/max/<optimizer>`). Norms that are not finite are left to `on_nonfinite`.

    Args:
        factor: the multiple of the usual norm above which a step is an explosion, above 1.
        window: steps over which the median is taken.
        warmup: steps before the first one is judged, at most `window`.

    Raises:
        ConfigError: an argument is out of range.
    """

    # After a GradientMonitor, whose norm it reuses.
    priority = 110

    def __init__(self, factor: float = 10.0, *, window: int = 100, warmup: int = 20) -> None:
        if not factor > 1:
            raise ConfigError(f"GradientExplosion(factor={factor}): must be above 1")
        if not 1 <= warmup <= window:
            raise ConfigError(
                f"GradientExplosion(window={window}, warmup={warmup}): expected 1 <= warmup <= "
                "window"
            )
        self.factor = factor
        self.window = window
        self.warmup = warmup
        self._names: dict[int, str] = {}
        self._stepped: list[str] = []  # optimizers, in this window
        self._usual: dict[str, deque[float]] = {}
        self._unread: dict[str, Held] = {}  # norms and their steps since the last row

    def on_setup(self, trainer: Trainer) -> None:
        """Names the optimizers, and resets the norms."""
        optimizers = dict(trainer.named_optimizers())
        self._names = {id(optimizer): name for name, optimizer in optimizers.items()}
        self._usual = {name: deque(maxlen=self.window) for name in optimizers}
        self._unread = {name: Held() for name in optimizers}
        self._stepped = []

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Computes the norm, unless clipping or a `GradientMonitor` does."""
        name = self._names[id(optimizer)]
        self._stepped.append(name)
        if trainer.max_grad_norm is None and name not in trainer.optimization.norms:
            held = [p.grad for g in optimizer.param_groups for p in g["params"]]
            if trainer.pipeline is not None or any(gradient is not None for gradient in held):
                trainer.note_gradient_norm(norm_of_all_stages(trainer, held))

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Keeps the norms; judges those not yet judged if a row is due."""
        for name in self._stepped:
            norm = trainer.optimization.norms.get(name)
            if norm is not None:
                self._unread[name].add(norm, trainer.global_step)
        self._stepped.clear()
        if metrics:
            for name, held in self._unread.items():
                self._judge(trainer, metrics, name, held)
                self._unread[name] = Held()

    def state_dict(self) -> dict[str, Any]:
        """The norms of the window, and those not yet judged with their steps."""
        return {
            "usual": {name: list(norms) for name, norms in self._usual.items()},
            "unread": {
                name: [list(pair) for pair in held.read()] for name, held in self._unread.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, norms in state["usual"].items():
            self._usual[name] = deque(norms, maxlen=self.window)
            self._unread[name] = Held()
            for norm, step in state["unread"][name]:
                self._unread[name].add(norm, step)

    def _judge(self, trainer: Trainer, metrics: dict[str, Any], name: str, held: Held) -> None:
        usual, worst = self._usual[name], (self.factor, 0, 0.0, 0.0)
        largest = -math.inf
        for norm, step in held.read():
            if not math.isfinite(norm):
                continue
            largest = max(largest, norm)
            if len(usual) >= self.warmup and (middle := median(usual)) > 0:
                worst = max(worst, (norm / middle, step, norm, middle))
            usual.append(norm)
        several = len(self._names) > 1
        if largest >= 0:
            metrics[f"grad_norm/max/{name}" if several else "grad_norm/max"] = largest
        ratio, step, norm, middle = worst
        if step:
            trainer.say(
                f"the gradient norm{f' of {name}' if several else ''} of step {step} was "
                f"{norm:.4g}, {ratio:.3g} times the usual {middle:.4g}."
            )
