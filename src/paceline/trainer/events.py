"""The events of a run, and the dispatcher that calls who listens.

One table drives both the hooks of a Trainer subclass and the methods of a Callback (which gets the
trainer first). In the order of a run:

    configure -> setup -> on_setup -> load, if resuming -> on_load_checkpoint
    on_train_start
      on_train_epoch_start
        on_train_batch_start(batch, batch_idx)          for each micro-batch of a window
          training_step -> loss
        on_before_backward(loss); backward; on_after_backward
        on_train_batch_end(batch, batch_idx, loss)
        on_before_optimizer_step(optimizer)             gradients whole, before clipping
          clip, step, zero_grad, schedulers of interval "step"; global_step += 1
        on_step_end(metrics)
        metrics row, if due
        validation, if due: on_validation_start
                              on_validation_batch_start, validation_step, on_validation_batch_end
                            on_validation_end, on_metrics(metrics)
        at an epoch's end:  on_train_epoch_end; current_epoch += 1
        one checkpoint, if due: on_save_checkpoint
    on_checkpoint(path, step, best)                     between two windows, once it is published
    on_train_end                                        when training is over, not at a signal
    on_exception(error), if any; on_teardown, always

A resumed run has the events of one that never stopped, except those of saving, which are
`on_save_checkpoint` and `on_checkpoint`: stopping saves once more, and how long a save in the
background takes differs from run to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from paceline.errors import nearest
from paceline.trainer.callback import Callback
from paceline.trainer.elsewhere import METHODS_ELSEWHERE


class Hooks:
    """The events as methods of a Trainer. All are empty: an override needs no `super()` call."""

    def on_setup(self) -> None:
        """Models are placed, nothing is loaded yet: allocate your own state here."""

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        """A checkpoint was loaded; `state` is its whole state tree."""

    def on_train_start(self) -> None:
        """Everything is in place; the first window follows. Also fires in a resumed run."""

    def on_train_epoch_start(self) -> None:
        """An epoch begins. Does not fire again when a run resumes within the epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A micro-batch is on the device; `batch_idx` counts this rank's within the epoch."""

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """`loss` is the micro-batch's loss as weighted for the window's mean over items."""

    def on_after_backward(self) -> None:
        """This micro-batch's gradients have been added."""

    def on_train_batch_end(self, batch: Any, batch_idx: int, loss: torch.Tensor) -> None:
        """`loss` is the detached mean over the micro-batch's items, as `training_step` gave it."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are whole (accumulated, averaged over ranks, unscaled), not yet clipped."""

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        """A window is done and `global_step` counts it; `metrics` is the row if one is due."""

    def on_validation_start(self) -> None:
        """Models are in eval mode and gradients off."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A validation batch is on the device."""

    def on_validation_batch_end(self, batch: Any, batch_idx: int) -> None:
        """`validation_step` has seen the batch."""

    def on_validation_end(self) -> None:
        """Every validation batch has been seen."""

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """The validation's metrics, reduced over all ranks; what you add is in its row too."""

    def on_train_epoch_end(self) -> None:
        """An epoch's last window and its validation are done; `current_epoch` not yet raised."""

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        """The state tree about to be saved; what you add under your own name is stored too."""

    def on_checkpoint(self, path: Path, step: int, best: bool) -> None:
        """The checkpoint of `step` is published at `path`; `best` says if it is marked best.

        It comes between two windows, on each rank once this rank knows: after a save in the
        background that may be another step on each of them, so it is no place for collectives.
        The next save may prune the checkpoint.
        """

    def on_train_end(self) -> None:
        """Training is over (not at a signal or an error)."""

    def on_exception(self, error: BaseException) -> None:
        """The run fails with `error`, which is raised again afterwards."""

    def on_teardown(self) -> None:
        """The last event of every run, however it ends."""


EVENTS: tuple[str, ...] = tuple(name for name in vars(Hooks) if name.startswith("on_"))


class Events(SimpleNamespace):
    """For each event, the tuple of methods that listen to it; an unheard event is an empty tuple.

    The loop writes `for hook in events.on_step_end: hook(metrics)`, so an event that nobody
    overrides costs one attribute look-up.
    """

    def __init__(self, trainer: Hooks, callbacks: Iterable[Callback]) -> None:
        ordered = sorted(callbacks, key=lambda callback: callback.priority)
        super().__init__(
            **{
                event: tuple(
                    ([getattr(trainer, event)] if overrides(trainer, event, Hooks) else [])
                    + [
                        partial(getattr(callback, event), trainer)
                        for callback in ordered
                        if overrides(callback, event, Callback)
                    ]
                )
                for event in EVENTS
            }
        )


def overrides(listener: object, name: str, base: type) -> bool:
    """Whether a method is overridden, on the listener's class or on the instance itself.

    Args:
        listener: an instance of a subclass of `base`.
        name: the method's name.
        base: the class that defines the method.
    """
    if name in vars(listener):
        return True
    # A method with callbacks around it (`paceline.factories`) is the one within.
    own = inspect.unwrap(getattr(type(listener), name, _no_method))
    return own is not inspect.unwrap(getattr(base, name))


def _no_method() -> None:
    """What a listener without such a method has."""


def misspelt_hooks(listener: object) -> list[str]:
    """What is wrong with methods of a callback or trainer that look like events and are none.

    A misspelt hook would never be called and nobody would notice. A Callback has no other methods
    that begin with `on_`; a Trainer may, unless one is so near an event that it must be meant.
    """
    strict = isinstance(listener, Callback)
    names = [
        name
        for name in sorted({*dir(type(listener)), *vars(listener)})
        if name.startswith("on_") and name not in EVENTS and callable(getattr(listener, name, None))
    ]
    return [
        f"{type(listener).__name__} defines {name}, which is no event{_meant(name)} "
        + (f"Events: {', '.join(EVENTS)}" if strict else "If it is your own, rename it.")
        for name in names
        if strict or get_close_matches(name, EVENTS, n=1, cutoff=0.75)
    ]


def _meant(name: str) -> str:
    """The event that another system's hook is here, or else the nearest one."""
    if name in METHODS_ELSEWHERE:  # the nearest to on_step_begin is on_step_end
        return f"; here it is {METHODS_ELSEWHERE[name]}."
    return nearest(name, EVENTS) or "."
