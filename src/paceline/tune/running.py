"""Trains a RunConfig, one run per seed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

from paceline.callbacks import EarlyStopping
from paceline.checkpoint import CheckpointPolicy
from paceline.errors import ConfigError, Preempted
from paceline.recipe.seeds import SEEDS_FILE, each_seed
from paceline.registry import lookup
from paceline.trainer.callback import Callback
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.optimization import takes_metric
from paceline.trainer.settings import Resume
from paceline.trainer.trainer import Trainer
from paceline.tune.run_config import RunConfig
from paceline.world.environment import refuse_replica_groups
from paceline.world.seeding import seed_everything
from paceline.world.world import World

CONFIG_FILE = "config.yaml"


def train_config(
    config: RunConfig,
    dl_train: Any = None,
    dl_val: Any = None,
    *,
    trainer: Callable[..., Trainer] = Trainer,
    resume: str | Resume = "auto",
    **settings: Any,
) -> float:
    """Trains one run per seed, in `runs/<project>/<group>/seed_<n>`.

    A complete run is skipped, and a stopped one is resumed; other settings have other folders. The
    results of the seeds are written to `seeds.json` there. A seed that fails, or ends with a loss
    that is not finite, is recorded as failed there and keeps no other from training; on several
    ranks an error ends the call.

    Args:
        config: the settings.
        dl_train, dl_val: the loaders; by default those of `config.data`.
        trainer: a subclass of Trainer, or a function with its keywords.
        resume: the Trainer's `resume`.
        **settings: further keywords of the Trainer, such as `callbacks` or `progress`. Without
            `log_every`, metrics.csv has one line for each epoch.

    Returns:
        The mean over the finished seeds of the last validation's loss; NaN if none has one that is
        finite.

    Raises:
        ConfigError: only one of the loaders is given, no validation loss was logged, or this
            process is a replica group.
        Exception: the first seed's, if every seed failed; on several ranks, that of any seed.
        Preempted: a run was stopped and saved; the same call resumes it.
    """
    refuse_replica_groups("runs for several seeds do")
    config.validate_for_execution()
    if (dl_train is None) != (dl_val is None):
        raise ConfigError("run(config, dl_train, dl_val): give both loaders or neither.")
    if dl_train is None:
        dl_train, dl_val = config.create_dataloaders()
    main = World().is_main
    if main:
        for warning in config.validate_semantics():
            print(f"paceline: warning: {warning}", file=sys.stderr, flush=True)
        config.folder.mkdir(parents=True, exist_ok=True)
        config.to_yaml(config.folder / CONFIG_FILE)

    def train(seed: int) -> dict[str, float]:
        one = _trainer_of(config, seed, trainer, {**settings, "resume": resume})
        result = one.train(dl_train, dl_val, seed=seed)
        if not result.complete:
            raise Preempted(result)
        return result.metrics

    seeds = each_seed(config.seeds, train, "val/loss", config.folder)
    for seed, why in seeds.failed.items():
        if main:
            print(f"paceline: warning: seed {seed} failed: {why}", file=sys.stderr, flush=True)
    if not seeds.metrics:
        return math.nan
    mean = seeds.mean("val/loss")
    if mean is None:
        raise ConfigError('run(...) returns a mean of "val/loss", which no validation has logged.')
    return mean


def failed(config: RunConfig) -> dict[str, str]:
    """The seeds that failed when the configuration was last trained, each with its reason."""
    return json.loads((config.folder / SEEDS_FILE).read_text(encoding="utf-8"))["failed"]


def _trainer_of(
    config: RunConfig, seed: int, make: Callable[..., Trainer], settings: dict[str, Any]
) -> Trainer:
    """The trainer of one seed."""
    seed_everything(seed)  # the weights are a function of the seed alone
    model = config.create_model()
    optimizer = config.create_optimizer(model)
    scheduler = config.create_scheduler(optimizer)
    stopping, saving = config.early_stopping_config, config.checkpoint_config
    callbacks = list(settings.pop("callbacks", ()))
    if stopping.enabled:
        watched = metric_name(config.monitor), stopping.mode, stopping.patience, stopping.min_delta
        callbacks.append(EarlyStopping(*watched, relative=True))
    policy, monitor = CheckpointPolicy(save_best=False), None
    if saving.enabled:
        policy = CheckpointPolicy(
            every_epochs=saving.save_every_n_epochs or None,
            keep_last=saving.keep_last_k,
            save_best=saving.save_best,
        )
        monitor = MetricMonitor(metric_name(saving.monitor), saving.mode)
    if config.wandb:
        settings["loggers"] = [*(settings.get("loggers") or ()), _tracker(config, seed)]
    own = {
        "lr_scheduler_interval": "metric" if takes_metric(scheduler) else "epoch",
        "metric_monitor": monitor,
        "checkpoint": policy,
    }
    if "log_every" not in settings:
        callbacks.append(_RowAnEpoch())
    return make(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        loss_fn=config.create_criterion(),
        epochs=config.epochs,
        callbacks=callbacks,
        run_dir=config.folder / f"seed_{seed}",
        **{**own, **settings},
    )


def _tracker(config: RunConfig, seed: int) -> Any:
    """The runs of one configuration are a group in the project."""
    tags = [part.rpartition(".")[2] for part in (config.net, config.optimizer, config.scheduler)]
    named = {"project": config.project, "group": config.group, "run_name": f"seed_{seed}"}
    return lookup("logger", "wandb")(**named, tags=tags)


class _RowAnEpoch(Callback):
    """A row of the training loss for each epoch, in place of one for each `log_every` steps."""

    def on_setup(self, trainer: Trainer) -> None:
        trainer.log_every = trainer.source.windows_per_epoch


def metric_name(name: str) -> str:
    """Paceline's name of a metric: `val_loss` is "val/loss".

    Args:
        name: as a configuration has it.
    """
    return "val/loss" if name == "val_loss" else name
