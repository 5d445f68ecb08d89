"""AveragedWeights: an exponential moving average of the weights, kept beside the trained ones."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError, MismatchError
from paceline.trainer.events import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class AveragedWeights(Callback):
    """Keeps `average <- decay * average + (1 - decay) * weights` and validates with the average.

    The average is a second set of tensors with its own place in the checkpoint; the trained
    weights are never replaced by it, except that during a validation the average is copied into
    the models and the trained weights are copied back afterwards, bit by bit. So a checkpoint,
    and the best one too, always holds both.

    Only parameters are averaged. Buffers (BatchNorm's statistics) are the trained model's own.
    Averages of float16 and bfloat16 parameters are kept in float32, since near a decay of 1 the
    updates would vanish in their rounding.

    Args:
        decay: weight of the old average at each update, from 0 to less than 1.
        every: optimizer steps from one update to the next (of the run's count, not this start's).
        warmup: use the smaller of `decay` and (1 + n) / (10 + n) at the n-th update (n from 0), so
            that the random weights of the start are forgotten soon. Source: TensorFlow's
            `ExponentialMovingAverage(num_updates=...)`.
        evaluate: validate with the averaged weights (and so choose the best checkpoint by them).

    Raises:
        ConfigError: an argument is out of its range.
    """

    # After callbacks that change weights or what is trained; before those that only watch.
    priority = 200

    def __init__(
        self, decay: float = 0.999, *, every: int = 1, warmup: bool = True, evaluate: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"AveragedWeights(decay={decay}): must be at least 0 and below 1")
        if every < 1:
            raise ConfigError(f"AveragedWeights(every={every}): must be at least 1")
        self.decay = decay
        self.every = every
        self.warmup = warmup
        self.evaluate = evaluate
        self._models: dict[str, torch.nn.Module] = {}
        self._live: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}
        self._updates = 0
        self._started = False
        self._kept: dict[str, torch.Tensor] | None = None  # the trained weights, while exchanged

    def on_setup(self, trainer: Trainer) -> None:
        """Makes the tensors that a checkpoint's average is loaded into."""
        models = dict(trainer.named_models())
        if models != self._models:  # the same models trained further keep their average
            self._models, self._live, self._average = models, {}, {}
            self._updates, self._started = 0, False
        self._adopt()

    def on_train_start(self, trainer: Trainer) -> None:
        """Starts from the present weights, unless there is an average already."""
        self._adopt()
        if not self._started:
            _copy(self._average, self._live)  # weights may have been loaded since `on_setup`
        self._started = True

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Takes in what has been unfrozen; until now its weights and their average are the same."""
        self._adopt()

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Updates the average."""
        if trainer.global_step % self.every or not self._average:
            return
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        average = list(self._average.values())
        live = [
            weights if weights.dtype == mean.dtype else weights.to(mean.dtype)
            for weights, mean in zip(self._live.values(), average, strict=True)
        ]
        torch._foreach_lerp_(average, live, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self._updates += 1

    def on_validation_start(self, trainer: Trainer) -> None:
        """Copies the average into the models."""
        if self.evaluate:
            self._exchange()

    def on_validation_end(self, trainer: Trainer) -> None:
        """Copies the trained weights back."""
        self._put_back()

    # A validation that fails or is broken off must not leave the average in the models. The
    # events below are what may follow it; where nothing was exchanged they do nothing.

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Copies the trained weights back, if somebody caught a validation's error and goes on."""
        if self._kept is not None:
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

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the averages by `model.parameter`, as they are (no copies)."""
        return {"updates": self._updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back `state_dict`.

        Raises:
            MismatchError: names, shapes or dtypes differ from the models'; all of them are listed.
        """
        self._adopt(also=state["average"])
        _check(state["average"], self._average)
        _copy(self._average, state["average"])
        self._updates, self._started = state["updates"], True

    def averaged_state_dict(self, model: str | None = None) -> dict[str, torch.Tensor]:
        """The state dict of one model with the averages in place of its parameters.

        Args:
            model: the model's name; may be left out if there is one model.

        Returns:
            Copies, in the model's own dtypes, of parameters (averaged) and buffers (present).
        """
        name = model or next(iter(self._models), "")
        if name not in self._models or (model is None and len(self._models) > 1):
            raise ConfigError(
                f"averaged_state_dict: name one of the models: {', '.join(self._models)}"
            )
        # By identity, so that tied weights are averaged under all of their names.
        means = {id(weights): self._average[key] for key, weights in self._live.items()}
        tensors = self._models[name].state_dict(keep_vars=True)
        return {
            key: means.get(id(tensor), tensor).detach().to(tensor.dtype, copy=True)
            for key, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        }

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the models have the averaged weights, e.g. for a test after training."""
        self._exchange()
        try:
            yield
        finally:
            self._put_back()

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
        if self._kept is None:
            self._kept = {name: weights.detach().clone() for name, weights in self._live.items()}
            _copy(self._live, self._average)
            _reshard(self._models)

    def _put_back(self) -> None:
        if self._kept is not None:
            _copy(self._live, self._kept)
            _reshard(self._models)
            self._kept = None


@torch.no_grad()
def _start(parameter: torch.Tensor) -> torch.Tensor:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().to(torch.float32 if half else parameter.dtype, copy=True)


@torch.no_grad()
def _copy(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    # Not `_foreach_copy_`, which sharded tensors (DTensor) do not have.
    for name, tensor in target.items():
        tensor.detach().copy_(source[name])


def _reshard(models: Mapping[str, torch.nn.Module]) -> None:
    """Drops what FSDP has gathered: it would go on computing with the weights from before."""
    for model in models.values():
        for module in model.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check(saved: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    problems = [f"{name} is missing" for name in held if name not in saved]
    problems += [f"{name} is of no model" for name in saved if name not in held]
    problems += [
        f"{name} is {_form(saved[name])}, here {_form(held[name])}"
        for name in held
        if name in saved and _form(saved[name]) != _form(held[name])
    ]
    if problems:
        raise MismatchError("the averaged weights do not fit the models: " + "; ".join(problems))
