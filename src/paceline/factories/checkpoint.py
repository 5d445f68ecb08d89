"""Engines that save a model beside the checkpoints from which a run resumes.

A recipe lists them, each with its triggers; at most one entry is the engine that resumes:

    checkpoint: [{type: paceline, every_steps: 100}, {type: huggingface, at_end: true}]

One of your own derives from `CheckpointEngine`, gives itself a `name` and writes a model:

    class Adapters(CheckpointEngine):
        name = "adapters"

        def save(self, model):
            save_file(adapters_of(model), self.checkpoint_dir / "adapters.safetensors")
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch

from paceline.checkpoint import publication
from paceline.checkpoint.files import Disk
from paceline.errors import ConfigError
from paceline.factories.around import Around
from paceline.factories.defined import check_and_register, classes_named
from paceline.recipe.typed import Config, HumanInt, Typed
from paceline.trainer.callback import Callback


class CheckpointEngineConfig(Config):
    """When an engine saves the model.

    Attributes:
        every_steps: after every n-th optimizer step.
        every_epochs: at the end of every n-th epoch.
        on_best: after a validation with the best value of the monitored metric so far, before the
            next step.
        at_end: when training is over, however it ended but for a signal or an error.
        dir: the folder that gets a folder for each save; `exports/NAME` in the run's folder unless
            given.
    """

    every_steps: HumanInt | None = pydantic.Field(None, gt=0)
    every_epochs: HumanInt | None = pydantic.Field(None, gt=0)
    on_best: bool = False
    at_end: bool = False
    dir: Path | None = None

    @pydantic.model_validator(mode="after")
    def _saves(self) -> CheckpointEngineConfig:
        if not (self.every_steps or self.every_epochs or self.on_best or self.at_end):
            raise ValueError(
                "it would never save: give every_steps, every_epochs, on_best or at_end."
            )
        return self


class CheckpointEngine(Typed, Callback, Around):
    """Saves the model in a format of its own, when its config says so. No run resumes from it.

    Each save has a folder of its own, which is published whole: a run that is killed leaves no half
    of one.

    Args:
        config: the triggers.

    Attributes:
        checkpoint_dir: the folder to write into, while `save` is called.
    """

    registered_as: ClassVar[str] = "checkpoint"
    config_type = CheckpointEngineConfig
    events_around = {"init": "__init__", "save": "save", "load": "load"}
    config: Any
    checkpoint_dir: Path

    def __init__(self, config: Any = None) -> None:
        given: Any = type(self).config_type
        self.config = given(at_end=True) if config is None else config
        self._saved_step: int | None = None
        self._saved_best: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        found = classes_named(cls, "config_type", "config") or ()
        mistakes = []
        if (
            len(found) == 1
            and isinstance(found[0], type)
            and issubclass(found[0], CheckpointEngineConfig)
        ):
            cls.config_type = found[0]
        else:
            mistakes.append(
                "config_type: expected a class that derives from CheckpointEngineConfig."
            )
        check_and_register(cls, CheckpointEngine, "checkpoint", mistakes)
        super().__init_subclass__(**kwargs)

    @abstractmethod
    def save(self, model: Any) -> None:
        """Writes the model to `checkpoint_dir`; called on every rank.

        Args:
            model: the trainer's, whole or spread over ranks; or models by name.
        """
        raise NotImplementedError

    def load(self, model: Any) -> None:
        """Loads what `save` wrote from `checkpoint_dir`; no run calls it.

        Args:
            model: to load into.
        """
        raise NotImplementedError(f"{type(self).__qualname__} cannot load what it saves.")

    # When to save

    def on_train_start(self, trainer: Any) -> None:
        if self.config.dir is None and trainer.run_dir is None:
            raise ConfigError(
                f"the checkpoint engine {self.name!r} has no folder: give the trainer a run_dir, "
                "or the engine a dir."
            )
        if self.config.on_best and trainer.metric_monitor is None:
            raise ConfigError(
                f"the checkpoint engine {self.name!r} saves on_best, and nothing says what is "
                "best: set metric_monitor."
            )

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if self.config.on_best:
            self._save_if_best(trainer)

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        every = self.config.every_steps
        if every is not None and trainer.global_step % every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any) -> None:
        every = self.config.every_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Any) -> None:
        if self.config.on_best:
            self._save_if_best(trainer)
        if self.config.at_end and trainer.global_step > 0:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"saved_step": self._saved_step, "saved_best": self._saved_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_step, self._saved_best = state["saved_step"], state["saved_best"]

    def _save_if_best(self, trainer: Any) -> None:
        monitor = trainer.metric_monitor
        if monitor.worse_count == 0 and monitor.best_value not in (None, self._saved_best):
            self._saved_best = monitor.best_value
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        """Has the model saved once a step, into a folder that is published whole."""
        step = trainer.global_step
        if self._saved_step == step:
            return
        folder = self.config.dir or trainer.run_dir / "exports" / self.name
        name, disk = publication.folder_name(step), Disk()
        self.checkpoint_dir = publication.hidden(folder, name, "new")
        if trainer.world.is_main:
            disk.make_folders(folder)
            disk.remove(self.checkpoint_dir)  # of a run that was killed
            disk.make_folders(self.checkpoint_dir)
        trainer.world.barrier()
        with torch.no_grad():
            self.save(trainer.model)
        trainer.world.barrier()
        if trainer.world.is_main:
            disk.sync(self.checkpoint_dir)  # whole after a power cut too
            publication.publish(folder, name, disk)
            disk.remove(publication.hidden(folder, name, "old"))  # of a run killed in between
        self.checkpoint_dir = folder / name
        self._saved_step = step
