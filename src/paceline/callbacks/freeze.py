"""Freeze: leaves modules and parameters untrained, until a step, an epoch or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError, counted, nearest, some
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Freeze(Callback):
    """Freezes modules and parameters by name: for a while, for gradual unfreezing, or for good.

    A name is that of a model, a module or a parameter, either in full (`model.backbone.0.weight`)
    or without the model's name. A module stands for all that is in it. In a name `*`, `?` and
    `[...]` match as in file names, and `*` matches dots, too.

    What is frozen has no gradient: an optimizer that holds it neither moves it nor decays it,
    clipping and norms leave it out, and under DDP it is not exchanged. Its optimizer state begins
    with its first step. Modules with running statistics (BatchNorm) in what is frozen are in eval
    mode meanwhile, whatever calls `train()`, and afterwards in the mode they had before.

    With several of these callbacks a parameter is trained once none of them freezes it any more.
    What was frozen before the run (`requires_grad_(False)`) stays frozen. After the run, all is
    trainable that was so before it. Leave `requires_grad` of what it freezes to it: a resumed run
    freezes it again, whatever a hook of yours did meanwhile.

    Args:
        names: a name, or several.
        until_step: the number of optimizer steps for which they are frozen.
        until_epoch: the number of epochs for which they are frozen. With neither they are never
            trained.

    Raises:
        ConfigError: an argument is out of range; later, a name matches nothing, or nothing is left
            to train.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        *,
        until_step: int | None = None,
        until_epoch: int | None = None,
    ) -> None:
        self.names = [names] if isinstance(names, str) else list(names)
        self.until_step = until_step
        self.until_epoch = until_epoch
        if not self.names or not all(isinstance(name, str) and name for name in self.names):
            raise ConfigError(f"Freeze({names!r}): expected a name, or a list of names")
        if until_step is not None and until_epoch is not None:
            raise ConfigError(
                f"Freeze(until_step={until_step}, until_epoch={until_epoch}): give one of them"
            )
        for name, value in (("until_step", until_step), ("until_epoch", until_epoch)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"Freeze({name}={value!r}): expected a number from 1 on")
        self._parameters: dict[int, torch.nn.Parameter] = {}  # that are trained but for this
        self._modes: dict[int, tuple[torch.nn.Module, bool]] = {}  # of those with statistics
        self._freezes = False  # now

    def run_identity(self) -> dict[str, Any]:
        """What is frozen, and until when."""
        return {
            "names": self.names,
            "until_step": self.until_step,
            "until_epoch": self.until_epoch,
        }

    def on_setup(self, trainer: Trainer) -> None:
        """Finds what the names mean. It is frozen once all callbacks have been set up.

        Raises:
            ConfigError: a name matches nothing.
        """
        models = dict(trainer.named_models())
        self._parameters, self._modes, self._freezes = {}, {}, False
        for name in self.names:
            parameters, parts = _found(models, name)
            if not parameters and not parts:
                raise ConfigError(_nothing_under(name, models))
            self._parameters |= {id(p): p for p in parameters if p.requires_grad}
            self._modes |= {id(part): (part, part.training) for part in parts}
        self._describe(trainer, models)

    def on_load_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Freezes what is frozen at the checkpoint's step, or no longer does."""
        self._freezes = False  # the checkpoint knows nothing of it
        _apply(trainer)

    def on_train_start(self, trainer: Trainer) -> None:
        """Freezes what is frozen at this step.

        Raises:
            ConfigError: nothing is left to train.
        """
        _apply(trainer)
        if self._freezes and not any(
            p.requires_grad for model in trainer.named_models().values() for p in model.parameters()
        ):
            raise ConfigError(
                f"Freeze({', '.join(map(repr, self.names))}): nothing is left to train at step "
                f"{trainer.global_step + 1}: every parameter is frozen."
            )

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Unfreezes, if this is the epoch."""
        self._follow(trainer)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Unfreezes, if this was the last step."""
        self._follow(trainer)

    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Takes out what it has frozen itself: a resumed run's own callbacks freeze it again."""
        if not self._freezes:
            return
        made = state["made"]["models"]
        for name, model in trainer.named_models().items():
            if name in made:
                for key, parameter in model.named_parameters(remove_duplicate=False):
                    if id(parameter) in self._parameters:
                        made[name]["trains"].pop(key, None)
                for key, module in model.named_modules(remove_duplicate=False):
                    if id(module) in self._modes:
                        made[name]["modes"].pop(key, None)

    def on_teardown(self, trainer: Trainer) -> None:
        """Leaves the models as they were before the run."""
        if self._freezes:
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            for module, mode in self._modes.values():
                _put_back(module, mode=mode)
        self._parameters, self._modes, self._freezes = {}, {}, False

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the next step leaves out what it freezes."""
        if self.until_step is not None:
            return trainer.global_step < self.until_step
        return self.until_epoch is None or trainer.current_epoch < self.until_epoch

    def _follow(self, trainer: Trainer) -> None:
        if self._freezes != self.is_due(trainer):
            _apply(trainer)

    def _describe(self, trainer: Trainer, models: Mapping[str, torch.nn.Module]) -> None:
        trained = {id(p): p.numel() for m in models.values() for p in m.parameters()}
        frozen = sum(parameter.numel() for parameter in self._parameters.values())
        until, setting = "for good", "until_step, until_epoch"
        if self.until_step is not None:
            until, setting = f"for {counted(self.until_step, 'step')}", "until_step"
        elif self.until_epoch is not None:
            until, setting = f"for {counted(self.until_epoch, 'epoch')}", "until_epoch"
        kept = ""
        if self._modes:
            kept = f", {counted(len(self._modes), 'module')} with running statistics in eval mode"
        trainer.plan.add(
            f"freezes {', '.join(self.names)} {until}: {frozen:,} of "
            f"{sum(trained.values()):,} parameters{kept}",
            f"Freeze({setting})",
        )


def _apply(trainer: Trainer) -> None:
    """Freezes what one of the trainer's callbacks freezes at this step, and nothing else."""
    every = [callback for callback in trainer.callbacks if isinstance(callback, Freeze)]
    before = [callback for callback in every if callback._freezes]
    for callback in every:
        callback._freezes = callback.is_due(trainer)
    now = [callback for callback in every if callback._freezes]
    frozen = {key: p for callback in now for key, p in callback._parameters.items()}
    for callback in before:
        for key, parameter in callback._parameters.items():
            parameter.requires_grad_(key not in frozen)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    in_eval = {key for callback in now for key in callback._modes}
    for key, (module, mode) in {k: m for c in (*before, *now) for k, m in c._modes.items()}.items():
        if key in in_eval:
            module.train = partial(_stay_in_eval, module)
            module.eval()
        else:
            _put_back(module, mode=mode)
    trainer.optimization.exchange_without(frozenset(frozen))


def _stay_in_eval(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """In the place of a module's `train`."""
    return type(module).train(module, False)


def _put_back(module: torch.nn.Module, *, mode: bool) -> None:
    vars(module).pop("train", None)
    module.training = mode


def _found(
    models: Mapping[str, torch.nn.Module], pattern: str
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Module]]:
    """The parameters that a name stands for, and the modules whose running statistics it does."""

    def meant(full: str) -> bool:
        return fnmatchcase(full, pattern) or fnmatchcase(full.partition(".")[2], pattern)

    parameters: list[torch.nn.Parameter] = []
    parts: list[torch.nn.Module] = []
    for full, module in _modules(models):
        if meant(full):
            parameters += module.parameters()
            parts += filter(_has_statistics, module.modules())
            continue
        own = module._parameters.items()
        parameters += [p for key, p in own if p is not None and meant(f"{full}.{key}")]
        if _has_statistics(module) and any(meant(f"{full}.{key}") for key in _STATISTICS):
            parts.append(module)
    return parameters, parts


def _nothing_under(name: str, models: Mapping[str, torch.nn.Module]) -> str:
    names = _names(models)
    if name in names:
        return f"Freeze({name!r}): it has no parameters to freeze"
    parts = [f"{key}.{part}" for key, model in models.items() for part in model._modules]
    known = nearest(name, names) or f"; there is {some(parts)}"
    return f"Freeze({name!r}): there is nothing to freeze under this name{known}"


def _modules(models: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Models and all in them by their full names, of which something shared has several."""
    for model_name, model in models.items():
        for path, module in model.named_modules(remove_duplicate=False):
            yield f"{model_name}.{path}" if path else model_name, module


def _names(models: Mapping[str, torch.nn.Module]) -> list[str]:
    """What a name may be, in full and without the model's."""
    names: list[str] = []
    for full, module in _modules(models):
        names += [full, *(f"{full}.{key}" for key in module._parameters)]
    return [*names, *filter(None, (name.partition(".")[2] for name in names))]


def _has_statistics(module: torch.nn.Module) -> bool:
    return any(module._buffers.get(name) is not None for name in _STATISTICS)
