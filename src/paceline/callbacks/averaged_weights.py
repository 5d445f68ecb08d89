"""AveragedWeights: an exponential moving average of the weights, kept beside the trained ones."""

from __future__ import annotations

from paceline.callbacks.weight_average import WeightAverage
from paceline.errors import ConfigError


class AveragedWeights(WeightAverage):
    """Keeps `average <- decay * average + (1 - decay) * weights` and validates with the average.

    See `WeightAverage` for what is averaged and where it is kept.

    Args:
        decay: weight of the old average at each update, from 0 to less than 1.
        every: optimizer steps between updates, counted from the beginning of the run, not from the
            latest resume.
        warmup: use the smaller of `decay` and (1 + n) / (10 + n) at the n-th update (n from 0), so
            that the initial random weights soon lose their influence. Source: TensorFlow's
            `ExponentialMovingAverage(num_updates=...)`.
        evaluate: validate with the averaged weights (and so choose the best checkpoint by them).

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self, decay: float = 0.999, *, every: int = 1, warmup: bool = True, evaluate: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"AveragedWeights(decay={decay}): must be at least 0 and below 1")
        if every < 1:
            raise ConfigError(f"AveragedWeights(every={every}): must be at least 1")
        super().__init__(evaluate=evaluate)
        self.decay = decay
        self.every = every
        self.warmup = warmup

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0

    def _share(self) -> float:
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        return 1.0 - decay
