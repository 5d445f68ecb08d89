"""LossPrediction: predicts the value of a loss at the end of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_ZOOMS = 6  # each narrows the search for a rate by a factor of 16


class LossPrediction(Callback):
    """Adds `predicted/final_loss`, and its standard error `predicted/final_loss_se`, to the rows.

    See `predict_final` for the curves and the error. They are added to the rows that have the loss:
    training rows for "train/loss", validation rows for a validation loss. No prediction is made
    before there are `min_points` such rows, nor in a run whose length is unknown until the data
    ends.

    Args:
        monitor: the loss's name in the rows.
        min_points: the rows needed for a first prediction, at least 6.
        max_points: the points kept, at least twice `min_points`; beyond that, neighbours are
            averaged. It bounds the memory, and the time per row.

    Raises:
        ConfigError: an argument is out of range.
    """

    # Before callbacks that only read rows, e.g. the progress display.
    priority = 50

    def __init__(
        self, monitor: str = "train/loss", *, min_points: int = 10, max_points: int = 512
    ) -> None:
        if min_points < 6 or max_points < 2 * min_points:
            raise ConfigError(
                f"LossPrediction(min_points={min_points}, max_points={max_points}): expected at "
                "least 6, and twice that"
            )
        self.monitor = monitor
        self.min_points = min_points
        self.max_points = max_points
        self._forget()

    def _forget(self) -> None:
        self._points: list[list[float]] = []  # step and loss, each the mean of `_stride` rows
        self._stride = 1
        self._open = [0.0, 0.0, 0.0]  # rows of the next point, and the sums of steps and losses

    def on_setup(self, trainer: Trainer) -> None:
        """Resets the points."""
        self._forget()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the prediction to a training row."""
        if self.monitor in metrics:
            self._predict(trainer, metrics)

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Adds the prediction to a validation row."""
        if self.monitor in metrics:
            self._predict(trainer, metrics)

    def _predict(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._take(trainer.global_step, float(metrics[self.monitor]))
        horizon = trainer.training_horizon
        if horizon is None or len(self._points) < self.min_points:
            return
        steps, losses = zip(*self._points, strict=True)
        value, error = predict_final(steps, losses, horizon)
        metrics["predicted/final_loss"] = value
        metrics["predicted/final_loss_se"] = error

    def _take(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        count, steps, losses = self._open
        self._open = [count + 1, steps + step, losses + loss]
        if self._open[0] < self._stride:
            return
        self._points.append([self._open[1] / self._stride, self._open[2] / self._stride])
        self._open = [0.0, 0.0, 0.0]
        if len(self._points) >= self.max_points:
            pairs = zip(self._points[0::2], self._points[1::2], strict=False)
            self._points = [[(a + c) / 2, (b + d) / 2] for (a, b), (c, d) in pairs]
            self._stride *= 2

    def state_dict(self) -> dict[str, Any]:
        """The points, and the one still being averaged."""
        points = [list(point) for point in self._points]
        return {"points": points, "stride": self._stride, "open": list(self._open)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._points = [list(point) for point in state["points"]]
        self._stride, self._open = state["stride"], list(state["open"])


@dataclass(frozen=True)
class _Fit:
    """A curve's value at the horizon, its variance, and the curve's AICc."""

    value: float
    variance: float
    criterion: float


def predict_final(
    steps: Sequence[float], losses: Sequence[float], horizon: float
) -> tuple[float, float]:
    """Extrapolates a loss to `horizon` with curves fitted to the losses so far.

    The curves are a constant, a shifted exponential a * exp(-b * t) + c and a shifted power law
    a * t ** -b + c, with b > 0. For a given b the least-squares a and c have a closed form; b is
    searched. The prediction is the curves' mean with Akaike weights exp(-AICc / 2). Its variance is
    the mean, under the same weights, of each curve's variance plus the squared distance of its
    prediction from that mean (Burnham and Anderson, "Model Selection and Multimodel Inference",
    2002, sections 2.9 and 4.3). A curve's variance is that of its parameters at the horizon, by the
    linearised fit, plus that of one loss about the curve. Losses are assumed to be independent
    about the curve, and the curve to hold to the end: a learning rate that will still be lowered
    leads to a lower loss than predicted.

    Args:
        steps: increasing and positive, at least 6 of them.
        losses: one for each step, of any sign.
        horizon: the step to predict, not before the last.

    Returns:
        The predicted loss and its standard error.
    """
    t, y = np.asarray(steps, float), np.asarray(losses, float)
    middle, spread = float(y.mean()), float((y - y[0]).std())
    if spread <= 1e-12 * float(np.abs(y).max()):
        return middle, 0.0
    z = (y - middle) / spread
    rates = np.logspace(-1, 3, 65)
    fits = [
        _constant(z),
        _fit(z, t / horizon, 1.0, rates, _exponential),
        _fit(z, t / t[0], horizon / t[0], rates / 100, _power),
    ]
    best = min(fit.criterion for fit in fits)
    weights = [math.exp((best - fit.criterion) / 2) for fit in fits]
    weights = [weight / sum(weights) for weight in weights]
    value = sum(w * fit.value for w, fit in zip(weights, fits, strict=True))
    variance = sum(
        w * (fit.variance + (fit.value - value) ** 2) for w, fit in zip(weights, fits, strict=True)
    )
    return middle + spread * value, spread * math.sqrt(variance)


def _exponential(rate: Any, t: Any) -> Any:
    return np.exp(-rate * t)


def _power(rate: Any, t: Any) -> Any:
    return np.exp(-rate * np.log(t))


def _constant(z: np.ndarray) -> _Fit:
    n, residual = len(z), float((z * z).sum())  # z has mean 0
    variance = residual / (n - 1)
    return _Fit(0.0, variance * (1 + 1 / n), _criterion(residual, n, 2))


def _fit(
    z: np.ndarray, t: np.ndarray, end: float, rates: np.ndarray, curve: Callable[[Any, Any], Any]
) -> _Fit:
    """The least-squares fit of a * curve(b, t) + c to losses of mean 0, at t = end."""
    for _ in range(_ZOOMS):
        residuals = _residuals(z, curve(rates[:, None], t))
        i = int(residuals.argmin())
        around = rates[max(i - 1, 0)], rates[min(i + 1, len(rates) - 1)]
        rate = float(rates[i])
        rates = np.geomspace(*around, 33)
    shape = curve(rate, t)
    deviation = shape - shape.mean()
    a = float((deviation * z).sum() / max(float((deviation**2).sum()), 1e-300))
    c = -a * float(shape.mean())
    n, residual = len(z), float(((z - a * shape - c) ** 2).sum())
    variance = residual / (n - 3)
    jacobian = np.stack([shape, a * _slope(rate, t, curve), np.ones(n)], 1)
    at_end = np.array([curve(rate, end), a * _slope(rate, end, curve), 1.0])
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    own = max(float(at_end @ covariance @ at_end), 0.0)
    return _Fit(a * float(curve(rate, end)) + c, own + variance, _criterion(residual, n, 4))


def _slope(rate: float, t: Any, curve: Callable[[Any, Any], Any]) -> Any:
    """The derivative with respect to log(rate), the variable of the search: its scale is 1."""
    return rate * (-np.log(t) if curve is _power else -np.asarray(t)) * curve(rate, t)


def _residuals(z: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Sums of squares about the best a * shape + c, one for each row of `shapes`."""
    deviations = shapes - shapes.mean(1, keepdims=True)
    sizes = (deviations**2).sum(1)
    explained = (deviations * z).sum(1) ** 2 / np.maximum(sizes, 1e-300)
    return (z * z).sum() - np.where(sizes > 1e-20, explained, 0.0)


def _criterion(residual: float, n: int, parameters: int) -> float:
    """AICc of a least-squares fit whose parameters include the variance."""
    k = parameters
    floor = 1e-24 * n  # of an exact fit, in units of the losses' spread
    return n * math.log(max(residual, floor) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
