"""RolloutTrainer and HFRolloutTrainer: reinforcement learning from a short configuration."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint.files import Disk
from paceline.checkpoint.publication import hidden, make_durable, publish
from paceline.errors import ConfigError, unknown_settings
from paceline.lm.export import write_model
from paceline.parallel.ddp import unwrap
from paceline.rl.evaluation import Evaluation
from paceline.rl.harness import Harness
from paceline.rl.trainer import RLTrainer
from paceline.trainer.callback import Callback
from paceline.trainer.pretrained import is_pretrained, save_tokenizer

_OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


class TrainingConfiguration:
    """How long and how fast to train. A subclass may add attributes of its own.

    Args:
        lr: the learning rate.
        batch_size: steps in a micro-batch.
        optimizer: "adam", "adamw", "sgd", "rmsprop" or "adagrad", with torch's defaults.
        gradient_accumulation_steps: micro-batches in an optimizer step; an experience's last one
            may have fewer.
        training_steps: experiences, each of which is an epoch.
        num_episodes_per_experience: episodes that are played for each.

    Raises:
        ConfigError: a setting is unknown or impossible.
    """

    def __init__(
        self,
        *,
        lr: float = 3e-3,
        batch_size: int = 16,
        optimizer: str = "adamw",
        gradient_accumulation_steps: int = 1,
        training_steps: int = 1024,
        num_episodes_per_experience: int = 8,
        **unknown: Any,
    ) -> None:
        counts = {
            "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "training_steps": training_steps,
            "num_episodes_per_experience": num_episodes_per_experience,
        }
        if unknown:
            known = ("lr", "optimizer", *counts)
            raise unknown_settings(
                f"{type(self).__qualname__}(...)", unknown, known, {"learning_rate": "lr"}
            )
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf:
            raise ConfigError(f"lr={lr!r}: expected a number of at least 0.")
        if optimizer not in _OPTIMIZERS:
            raise ConfigError(f"optimizer={optimizer!r}: choose one of {', '.join(_OPTIMIZERS)}.")
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1.")
        self.lr, self.optimizer = float(lr), optimizer
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.training_steps = training_steps
        self.num_episodes_per_experience = num_episodes_per_experience

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({settings})"


class HFRolloutConfiguration(TrainingConfiguration):
    """What suits small language models: other values of `TrainingConfiguration`."""

    def __init__(self, **settings: Any) -> None:
        defaults = {
            "lr": 1e-5,
            "batch_size": 4,
            "training_steps": 1000,
            "num_episodes_per_experience": 2,
        }
        super().__init__(**{**defaults, **settings})


class RolloutTrainer(RLTrainer):
    """An `RLTrainer` with what a `TrainingConfiguration` says; it writes no file by itself.

    Args:
        config: how long and how fast to train.
        sampler: plays the episodes.
        algorithm: makes losses of them; its minibatch becomes `batch_size` times the accumulation.
        **settings: as of `RLTrainer`: with a `run_dir` and a `checkpoint` it resumes.

    Attributes:
        config: as given.
        harness: for a `train()` of one's own.
        optimizer: over exactly `sampler.system.parameters()`.

    Raises:
        ConfigError: a setting is impossible.
    """

    def __init__(
        self, config: TrainingConfiguration, sampler: Any, algorithm: Any, **settings: Any
    ) -> None:
        if not isinstance(config, TrainingConfiguration):
            raise ConfigError(
                f"config: expected a TrainingConfiguration, not a {type(config).__name__}."
            )
        accumulation = config.gradient_accumulation_steps
        algorithm.minibatch = config.batch_size * accumulation
        sampler.episodes = config.num_episodes_per_experience
        make = _OPTIMIZERS[config.optimizer]
        trained: Any = list(sampler.system.parameters())
        if not trained:
            raise ConfigError(f"{type(sampler.system).__qualname__}.parameters() gives none.")
        if settings.get("run_dir") is None:
            settings = {"checkpoint": None, "loggers": [], **settings}
        super().__init__(
            None,
            sampler=sampler,
            algorithm=algorithm,
            optimizer=make(trained, lr=config.lr),
            epochs=config.training_steps,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        self.config = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.harness = Harness(
            sampler,
            algorithm,
            config.num_episodes_per_experience,
            dataloader_kwargs={"batch_size": config.batch_size},
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = vars(cls).get("train")
        if inspect.isfunction(own) and len(inspect.signature(own).parameters) == 1:
            cls.train = _without_arguments(own)
        super().__init_subclass__(**kwargs)

    def make(self, *sections: str) -> None:
        """Nothing: all components are given."""


def _without_arguments(train: Callable[[Any], Any]) -> Callable[..., Any]:
    """A `train(self)` of a user's, as Trainers are called: with arguments, which it has not."""

    @functools.wraps(train)
    def called(self: Any, *args: Any, **settings: Any) -> Any:
        if any(one is not None for one in (*args, *settings.values())):
            raise ConfigError(f"{type(self).__qualname__}.train() takes no arguments.")
        return train(self)

    vars(called).pop("__wrapped__")  # whose signature would be seen in place of this one
    return called


class HFRolloutTrainer(RolloutTrainer):
    """A `RolloutTrainer` that evaluates on prompts and keeps the best and the last auditor.

    `CKPT_DIR/best` and `CKPT_DIR/last` are folders for `from_pretrained`, tokenizer included.

    Args:
        config: how long and how fast to train.
        sampler: plays the episodes; its `eval_rollout` takes a prompt.
        algorithm: makes losses of them.
        environment: another name of `sampler`.
        dev_prompts: any iterable of prompts, each played once without branches; none for no
            evaluation.
        eval_every: experiences between two evaluations; there is one at the end besides.
        ckpt_dir: the folder of both.
        **settings: as of `RLTrainer`.

    Attributes:
        best_score: the best mean reward of the leaves so far.

    Raises:
        ConfigError: a setting is impossible, or the system has no auditor of transformers.
    """

    def __init__(
        self,
        config: TrainingConfiguration,
        sampler: Any = None,
        algorithm: Any = None,
        *,
        environment: Any = None,
        dev_prompts: Iterable[Any] | None = None,
        eval_every: int = 200,
        ckpt_dir: str | Path = "checkpoints",
        **settings: Any,
    ) -> None:
        if (sampler is None) == (environment is None):
            raise ConfigError("sampler, environment: give one of them; they are one setting.")
        sampler = environment if sampler is None else sampler
        if algorithm is None:
            raise ConfigError("algorithm: nothing says how the policy is trained.")
        if int(eval_every) < 1:
            raise ConfigError(f"eval_every={eval_every}: expected at least 1.")
        prompts, keeper = list(dev_prompts or ()), _Keeper()
        callbacks = [keeper, *settings.pop("callbacks", ())]
        if prompts:
            settings["evaluation"] = Evaluation(every=int(eval_every), prompts=prompts)
        super().__init__(config, sampler, algorithm, callbacks=callbacks, **settings)
        self.dev_prompts, self.eval_every = prompts, int(eval_every)
        self.ckpt_dir = Path(ckpt_dir)
        self._keeper = keeper
        if type(self).save is HFRolloutTrainer.save and not is_pretrained(
            getattr(sampler.system, "auditor", None)
        ):
            raise ConfigError(
                f"{type(sampler.system).__qualname__}.auditor is no model of transformers: "
                "override save(step, tag), or take RolloutTrainer."
            )

    @property
    def best_score(self) -> float:
        """The best mean reward of the leaves so far; minus infinity before the first."""
        return self._keeper.best_score

    def save(self, step: int, tag: str = "step") -> Path:
        """Writes the auditor and its tokenizer, whole or not at all.

        Args:
            step: optimizer steps taken, for the folder's name.
            tag: "best" and "last" replace the folder of that name; others are kept by step.

        Returns:
            The folder.
        """
        name = tag if tag in ("best", "last") else f"{tag}-{step}"
        disk, new = Disk(), hidden(self.ckpt_dir, name, "new")
        disk.remove(new)  # of a run that was killed
        disk.make_folders(new)
        write_model(unwrap(self.system.auditor), new)
        save_tokenizer(getattr(self.system, "auditor_tokenizer", None), new)
        make_durable(new, disk)
        publish(self.ckpt_dir, name, disk)
        return self.ckpt_dir / name


class _Keeper(Callback):
    """Keeps the best and the last auditor of a run."""

    def __init__(self) -> None:
        self.best_score = -math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score = state["best_score"]

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        score = metrics.get("val/reward")
        if score is not None and score > self.best_score:
            self.best_score = score
            _saved(trainer, "best")

    def on_train_end(self, trainer: Any) -> None:
        _saved(trainer, "last")


def _saved(trainer: Any, tag: str) -> None:
    if trainer.world.is_main:
        trainer.save(trainer.global_step, tag)
