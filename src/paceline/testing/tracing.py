"""A run, or its part up to a stop, with a trace of everything that stops must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.trainer.callback import Callback
from paceline.trainer.events import EVENTS
from paceline.trainer.result import Result
from paceline.trainer.trainer import Trainer
from paceline.world.dtensors import local_part

Build = Callable[[Path], Trainer]  # from a run's folder to a fresh trainer that writes there


class StopAt(Callback):
    """Asks for a stop once `step` optimizer steps are done; 0 stops before the first.

    On several ranks each of them needs one: they all ask in the same window, so the run stops at
    exactly that step.

    Args:
        step: the number of optimizer steps after which to stop.
        reason: for `Result.stopped_by`.
    """

    def __init__(self, step: int, reason: str = "test") -> None:
        self.step = step
        self.reason = reason

    def on_train_start(self, trainer: Trainer) -> None:
        self._ask(trainer)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._ask(trainer)

    def _ask(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            trainer.stop_agreement.request(self.reason, everywhere=True)


class Trace(Callback):
    """Records what a run does on this rank. It runs after every other callback.

    All but `on_checkpoint`: when a save in the background ends is not for the run to decide.

    Attributes:
        events: each event, with the number of optimizer steps done.
        samples: by step, the indices of its samples in order; empty lists for data that can only
            be iterated.
        state: a copy of the state tree that was saved last; None before the first save.
    """

    priority = 10**9

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.samples: dict[int, list[Any]] = {}
        self.state: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        self.events.append(("on_train_batch_start", trainer.global_step))
        self.samples.setdefault(trainer.global_step, []).extend(trainer.window.ids())

    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        self.events.append(("on_save_checkpoint", trainer.global_step))
        self.state = copied(state)


def _writing(event: str) -> Callable[..., None]:
    def write(self: Trace, trainer: Trainer, *_: Any) -> None:
        self.events.append((event, trainer.global_step))

    return write


for _event in EVENTS:
    if _event not in vars(Trace) and _event != "on_checkpoint":
        setattr(Trace, _event, _writing(_event))


@dataclass(frozen=True)
class Ending:
    """How a run, or its part up to a stop, ended on one rank.

    Attributes:
        result: as `Trainer.train` returns it.
        events, samples, state: as in `Trace`.
    """

    result: Result
    events: list[tuple[str, int]]
    samples: dict[int, list[Any]]
    state: dict[str, Any] | None


def traced_run(build: Build, run_dir: str | Path, *callbacks: Callback, seed: int = 0) -> Ending:
    """Trains to the end, or until a callback stops the run, and returns how it ended.

    If the folder holds a run, it is resumed.

    Args:
        build: takes the run's folder and returns a new trainer with `run_dir` set to it.
        run_dir: the run's folder.
        callbacks: added to the trainer's own, e.g. `StopAt(5)`.
        seed: of the run.
    """
    trainer, trace = build(Path(run_dir)), Trace()
    trainer.callbacks.extend([*callbacks, trace])
    result = trainer.fit(seed=seed)
    return Ending(result, trace.events, trace.samples, trace.state)


def trained_state(build: Build, run_dir: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Trains to the end without a trace; returns the state of models and optimizers.

    Args:
        build: as for `traced_run`.
        run_dir: the run's folder.
        seed: of the run.
    """
    trainer = build(Path(run_dir))
    trainer.fit(seed=seed)
    parts = {"models": trainer.named_models(), "optimizers": trainer.named_optimizers()}
    return {
        part: {name: copied(each.state_dict()) for name, each in things.items()}
        for part, things in parts.items()
    }


def copied(tree: Any) -> Any:
    """A copy of a state tree, with this rank's part of each tensor, on the CPU."""
    if isinstance(tree, torch.Tensor):
        part = local_part(tree.detach())
        return part if part.is_meta else part.cpu().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copied(value) for value in tree]
    return copy.deepcopy(tree)
