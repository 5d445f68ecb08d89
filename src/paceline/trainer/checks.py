"""What is wrong with a trainer, all of it at once, before anything runs.

Settings are looked at before `configure()`, which may be expensive; what it may assign, after it.
A trainer that configures nothing has everything looked at in one go.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from paceline import registry
from paceline.checkpoint import CheckpointPolicy, engine_class
from paceline.checkpoint.engine import engine_of, recorded_engine
from paceline.checkpoint.policy import NATIVE
from paceline.data.custom import is_custom, makes_sources, why_no_source
from paceline.errors import (
    ConfigError,
    MissingExtraError,
    UnreadableError,
    counted,
    nearest,
    some,
)
from paceline.parallel import context_parallel
from paceline.parallel.float8 import missing
from paceline.parallel.materialize import without_a_way
from paceline.trainer.base import TrainerBase
from paceline.trainer.callback import Callback, trainers_of
from paceline.trainer.elsewhere import EVENTS_ELSEWHERE, METHODS_ELSEWHERE, is_answer
from paceline.trainer.events import EVENTS, misspelt_hooks, overrides
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.optimization import takes_metric
from paceline.trainer.settings import MODES, epochs_between
from paceline.world import quorum
from paceline.world.environment import replica_group
from paceline.world.layout import Parallel

_CHOICES = {
    "lr_scheduler_interval": ("step", "epoch", "metric"),
    "precision": ("fp32", "bf16", "fp16", "fp8"),
    "on_nonfinite": ("raise", "stop", "skip", "rewind"),
}
_COUNTS = (
    "epochs",
    "max_steps",
    "epoch_length",
    "global_batch_size",
    "early_stop",
    "gradient_accumulation_steps",
    "log_every",
)


# What a Trainer's author overrides.
_OVERRIDDEN = (
    "training_step",
    "validation_step",
    "get_val_metrics",
    "count_items",
    "evaluate",
    "configure",
    "checkpoint_objects",
    "run_identity",
)
# What other systems have methods for.
_ATTRIBUTES = (
    *("train_dataloader", "val_dataloader", "model", "optimizer", "lr_scheduler", "loss_fn"),
    "callbacks",
)


def check_settings(trainer: TrainerBase) -> None:
    """Refuses impossible settings.

    Raises:
        ConfigError: with one line a mistake.
        MissingExtraError: a setting needs a package that is not installed.
    """
    loaders = {name: getattr(trainer, name) for name in ("train_dataloader", "val_dataloader")}
    models = {name: held for name, held in loaders.items() if isinstance(held, torch.nn.Module)}
    _refuse(list(starmap(_model_as_loader, models.items())))  # else they count as components
    wrong = wrong_settings(trainer)
    wrong += _wrong_callbacks(trainer) + _wrong_resume(trainer) + _wrong_with_groups(trainer)
    with contextlib.suppress(UnreadableError):  # then `check_engine` says so, to all ranks
        wrong += _wrong_engine(trainer)
    if not trainer.is_overridden("configure"):
        wrong += _wrong_components(trainer)
    _refuse(wrong)
    _refuse(_wrong_device(trainer))
    if lacking := missing(trainer.precision) or _missing_for_groups():
        raise MissingExtraError(lacking)


def check_components(trainer: TrainerBase) -> None:
    """Raises if models, optimizers, schedulers and data do not fit together.

    Raises:
        ConfigError: with one line a mistake.
    """
    if trainer.is_overridden("configure"):
        _refuse(_wrong_components(trainer))


def check_changed(trainer: TrainerBase) -> None:
    """Refuses impossible values of settings that are changed within a run.

    Raises:
        ConfigError: with one line a mistake.
    """
    _refuse(wrong_settings(trainer) + wrong_validation(trainer))


def check_data(trainer: TrainerBase) -> None:
    """Refuses what are no loaders.

    Raises:
        ConfigError: with one line a mistake.
    """
    _refuse(_wrong_loaders(trainer))


def check_validation(trainer: TrainerBase) -> None:
    """Raises if a setting of the validation is invalid, or a loader is not one.

    Raises:
        ConfigError: with one line a mistake.
        MissingExtraError: the precision needs a package that is not installed.
    """
    _refuse(_wrong_choices(trainer) + _wrong_device(trainer))
    if lacking := missing(trainer.precision):
        raise MissingExtraError(lacking)
    _refuse(_wrong_loaders(trainer, trains=False))


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError("this cannot work:\n  " + "\n  ".join(wrong))


# Settings


def wrong_settings(trainer: TrainerBase) -> list[str]:
    """What is wrong with the settings by themselves, `name=value: why` or `name: why`."""
    return _wrong_choices(trainer) + _wrong_numbers(trainer) + _wrong_combinations(trainer)


def _wrong_choices(trainer: TrainerBase) -> list[str]:
    wrong = [
        f"{name}={value!r}: expected one of {', '.join(choices)}{nearest(str(value), choices)}"
        for name, choices in _CHOICES.items()
        if (value := getattr(trainer, name)) not in choices
    ]
    every: Any = trainer.validate_every
    if epochs_between(every) is None and not (_is_count(every) and every > 0):
        wrong.append(
            f"validate_every={every!r}: expected 'epoch' or a number: of epochs ('5 epochs'), or "
            "of optimizer steps."
        )
    for name, argument in (
        ("deterministic", "deterministic"),
        ("show_progress", "progress"),
    ):
        if not isinstance(value := getattr(trainer, name), bool):
            wrong.append(f"{argument}={value!r}: expected True or False.")
    if not isinstance(trainer.compile, bool) and trainer.compile != "blocks":
        wrong.append(f"compile={trainer.compile!r}: expected True, False or 'blocks'.")
    return wrong


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_numbers(trainer: TrainerBase) -> list[str]:
    wrong: list[str] = []
    for name in _COUNTS:
        value = getattr(trainer, name)
        if value is not None and not _is_count(value):
            wrong.append(f"{name}={value!r}: expected a whole number.")
        elif value is not None and value < 1:
            wrong.append(f"{name}={value!r}: expected at least 1.")
    norm = trainer.max_grad_norm
    if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
        wrong.append(f"max_grad_norm={norm!r}: expected a positive norm, or None not to clip.")
    return wrong


def _wrong_combinations(trainer: TrainerBase) -> list[str]:
    wrong: list[str] = []
    if trainer.global_batch_size is not None and trainer.gradient_accumulation_steps != 1:
        wrong.append(
            "global_batch_size and gradient_accumulation_steps: give one of them; the "
            "accumulation follows from the global batch size."
        )
    if trainer.on_nonfinite == "rewind" and (
        trainer.run_dir is None or trainer.checkpoint_policy is None
    ):
        wrong.append("on_nonfinite='rewind': it goes back to a checkpoint, and none is written.")
    parallel: Any = trainer.parallel
    if isinstance(parallel, Parallel):
        if trainer.precision == "fp16" and parallel.cpu_offload:
            wrong.append(
                "precision='fp16': does not exist yet with parallel.cpu_offload; leave one out."
            )
        if isinstance(budget := parallel.activation_checkpointing, float) and not trainer.compile:
            wrong.append(
                f"parallel.activation_checkpointing={budget}: a memory budget is the compiler's to "
                "keep: set compile=True, or give 'full' or 'selective'."
            )
        if trainer.compile and parallel.rings:
            wrong.append(
                f"compile={trainer.compile!r}: does not exist yet with "
                "parallel.context_attention='ring'; leave one out."
            )
        if parallel.pipeline > 1:
            wrong += _wrong_stages(trainer, parallel)
    if trainer.epochs is None and trainer.max_steps is None:
        wrong.append("epochs: say where the run ends, with epochs=... or max_steps=...")
    return wrong


def _wrong_device(trainer: TrainerBase) -> list[str]:
    """What this process's device cannot do."""
    parallel: Any = trainer.parallel
    if not (isinstance(parallel, Parallel) and parallel.rings):
        return []
    why = context_parallel.why_no_ring(trainer.device)
    return [f"parallel.context_attention='ring': {why}; say 'all_to_all'."] if why else []


def _wrong_stages(trainer: TrainerBase, parallel: Parallel) -> list[str]:
    """What does not go together with stages: the schedule calls the model and `loss_fn` itself."""
    wrong = [
        f"parallel.{name}={size}: does not exist yet with parallel.pipeline; leave one out."
        for name in ("expert", "cpu_offload")
        if (size := getattr(parallel, name)) is True or size > 1
    ]
    if parallel.rings:
        wrong.append(
            "parallel.context_attention='ring': does not exist yet with parallel.pipeline; say "
            "'all_to_all'."
        )
    wrong += [
        f"{name}: with parallel.pipeline no stage computes a loss from a batch by itself: what is "
        "trained is loss_fn(outputs, targets). Put it into a loss_fn, and leave this as it is."
        for name in ("step", "training_step", "loss")
        if trainer.is_overridden(name)
    ]
    return wrong


def _wrong_callbacks(trainer: TrainerBase) -> list[str]:
    used = set[str]().union(*map(_used_by, (trainer, *trainer.callbacks)))
    wrong = misspelt_hooks(trainer) + _never_called(trainer, used)
    for callback in trainer.callbacks:
        if isinstance(callback, Callback):
            wrong += misspelt_hooks(callback) + _never_called(callback, used)
            wrong += [
                f"callbacks: {type(callback).__name__} is for trainers of the kind "
                f"{getattr(kind, '__name__', kind)}, which {type(trainer).__name__} is not."
                for kind in trainers_of(callback)
                if not isinstance(trainer, kind)
            ]
        else:
            wrong.append(f"callbacks: {_say(callback)} is no Callback{_made(callback)}.")
    for logger in trainer.loggers or ():
        if isinstance(logger, type) or not hasattr(logger, "write"):
            wrong.append(f"loggers: {_say(logger)} is no Sink{_made(logger)}.")
    for name, value, kind in (
        ("checkpoint", trainer.checkpoint_policy, CheckpointPolicy),
        ("parallel", trainer.parallel, Parallel),
    ):
        if value is not None and not isinstance(value, kind):
            wrong.append(f"{name}={_say(value)}: expected a {kind.__name__}(...).")
    return wrong


def check_engine(trainer: TrainerBase) -> None:
    """Checks, once the ranks have met, that the run's checkpoints are those of its engine.

    Raises:
        ConfigError: another engine wrote them.
        UnreadableError: who wrote them could not be read.
    """
    if wrong := _wrong_engine(trainer):
        raise ConfigError(wrong[0])


def _own_methods(thing: Any) -> dict[str, Any]:
    """The methods of an object that are the user's, by name."""
    return {
        name: value
        for base in type(thing).__mro__
        if not base.__module__.startswith("paceline.") and base is not object
        for name, value in vars(base).items()
        if inspect.isfunction(value)
    }


def _used_by(thing: Any) -> set[str]:
    """The names that the user's methods of an object refer to."""
    methods = map(inspect.unwrap, _own_methods(thing).values())
    return {name for method in methods for name in _names_in(method.__code__)}


def _never_called(thing: Any, used: set[str]) -> list[str]:
    """A trainer's or callback's methods that mean one of ours, by other systems' names or misspelt.

    Args:
        thing: the trainer or callback.
        used: what methods of any of them refer to: it is a helper, and left alone.
    """
    is_trainer, kind = isinstance(thing, TrainerBase), type(thing).__name__
    ours = [base for base in type(thing).__mro__ if base.__module__.startswith("paceline.")]
    known = {name for base in ours for name in vars(base) if not is_answer(base, name)}
    own = _own_methods(thing)
    elsewhere = METHODS_ELSEWHERE if is_trainer else EVENTS_ELSEWHERE
    methods = [name for name in known if is_trainer and name[0] != "_" and name[:3] != "on_"]
    wrong = [
        f"{kind} defines the method {name}, which nothing calls: here it is an attribute. Assign "
        "it in configure(), or give it to the constructor."
        for name in _ATTRIBUTES
        if is_trainer and name in own
    ]
    hooks = [name for name in own if name.startswith("on_")]
    misspelt = {name for name in hooks if get_close_matches(name, EVENTS, n=1, cutoff=0.75)}
    for name in sorted(own.keys() - known - used - misspelt):
        bare = name.lstrip("_")
        near = get_close_matches(bare, _OVERRIDDEN if is_trainer else (), n=1, cutoff=0.88)
        if bare in elsewhere or near or (name != bare and bare in methods):
            meant = elsewhere.get(bare) or (near[0] if near else bare)
            wrong.append(
                f"{kind} defines {name}, which nothing calls; here it is {meant}. If it is your "
                "own, rename it."
            )
    return wrong


def _names_in(code: Any) -> set[str]:
    """The names that a function's code refers to, in functions within it too."""
    inner = [each for each in code.co_consts if hasattr(each, "co_names")]
    return set(code.co_names).union(*map(_names_in, inner))


def _wrong_engine(trainer: TrainerBase) -> list[str]:
    """A checkpoint engine that there is not, or that did not write what the run resumes from."""
    policy = trainer.checkpoint_policy
    run_dir = None if trainer.resume.mode == "fresh" else trainer.run_dir
    try:
        if isinstance(policy, CheckpointPolicy):
            engine_class(policy.engine)
        elif run_dir is not None:
            engine_of(run_dir)
    except ConfigError as error:
        return [f"checkpoint: {error}"]
    written_by = None if run_dir is None else recorded_engine(run_dir)
    if written_by is None or getattr(policy, "engine", written_by) == written_by:
        return []
    return [
        f"checkpoint.engine={policy.engine!r}: the checkpoints in {run_dir} were written by the "
        f"engine {written_by!r}. Resume with that one, start beside the old run (another run_dir), "
        "or move it aside (resume='fresh', --fresh)."
    ]


def _say(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.60}"


def _made(value: Any) -> str:
    return f"; make one of it: {value.__name__}(...)" if isinstance(value, type) else ""


def _wrong_resume(trainer: TrainerBase) -> list[str]:
    resume = trainer.resume
    wrong: list[str] = []
    if resume.path is not None and not resume.path.exists():
        wrong.append(
            f"resume={resume.mode!r}: there is no such checkpoint, and no such mode; the modes are "
            f"{', '.join(MODES)}{nearest(resume.mode, MODES)}"
        )
    if trainer.run_dir is None and (resume.path is not None or resume.mode == "must"):
        wrong.append(f"resume={resume.mode!r}: a run without run_dir has nothing to resume from.")
    if resume.init_from is not None and (resume.path is not None or resume.mode == "must"):
        wrong.append(
            f"resume={resume.mode!r} resumes a run, init_from={str(resume.init_from)!r} "
            "starts a new one: give one of them."
        )
    if resume.init_from is not None and not Path(resume.init_from).exists():
        wrong.append(f"init_from={str(resume.init_from)!r}: there is no such file or folder.")
    return wrong


def _wrong_with_groups(trainer: TrainerBase) -> list[str]:
    """What of a trainer's settings does not exist yet with replica groups; none without them."""
    if replica_group() is None:
        return []
    world = trainer.world
    refused = {
        f"{world.size} processes in a group": world.size > 1,
        "an accelerator": world.device.type != "cpu",
        "precision='fp16'": trainer.precision == "fp16",
        "on_nonfinite='rewind'": trainer.on_nonfinite == "rewind",
        "a step() of your own": trainer.is_overridden("step"),
        "run_dir=None, through which the groups hand over their state,": trainer.run_dir is None,
        f"resume={trainer.resume.mode!r}": trainer.resume.mode != "auto",
        "a checkpoint engine of your own": getattr(trainer.checkpoint_policy, "engine", NATIVE)
        != NATIVE,
    }
    return [
        f"TORCHFT_LIGHTHOUSE is set: {what} does not exist yet with replica groups."
        for what, is_so in refused.items()
        if is_so
    ]


def _missing_for_groups() -> str | None:
    """What is not installed and this run's replica groups need; None if nothing is missing."""
    return None if replica_group() is None else quorum.missing()


# Components and data


def _wrong_components(trainer: TrainerBase) -> list[str]:
    wrong = _wrong_kinds(trainer) + _wrong_loaders(trainer)
    wrong += wrong_validation(trainer) + wrong_steps(trainer)
    try:
        models, optimizers = trainer.named_models(), trainer.named_optimizers()
        schedulers = trainer.named_schedulers() or {}
    except ConfigError as error:
        return [*wrong, str(error)]
    if not models and not wrong:
        wrong.append("there is no model: give model=... or assign one in configure().")
    if not optimizers and not wrong:
        wrong.append("there is no optimizer: give optimizer=... or assign one in configure().")
    wrong += _without_values(models) + _wrong_parameters(models, optimizers) + _wrong_states(models)
    wrong += _wrong_for_scaling(trainer, models)
    if "loss" in optimizers:
        wrong.append(
            "optimizer 'loss': a step's dictionary has its one loss under this name; name the "
            "optimizer otherwise."
        )
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, torch.optim.LBFGS) and not trainer.is_overridden("step"):
            wrong.append(
                f"{name}: LBFGS needs a closure; override step(window) and give it one with "
                "self.optimizer_step(closure=...)."
            )
        if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
            wrong.append(
                f"{name}: each rank of a ZeroRedundancyOptimizer has other state, which no "
                "checkpoint holds: give the optimizer that it wraps, and shard its state and the "
                "model's with parallel.dp_shard."
            )
    wrong += _wrong_modes(trainer, optimizers)
    known = [id(optimizer) for optimizer in optimizers.values()]
    for name, scheduler in schedulers.items():
        if id(scheduler.optimizer) not in known:
            wrong.append(f"{name}: it follows an optimizer that is not this trainer's.")
        wrong += _wrong_interval(name, scheduler, trainer)
    return wrong


def _wrong_kinds(trainer: TrainerBase) -> list[str]:
    """Components of a kind that would be overlooked, or fail late."""
    wrong: list[str] = []
    for name, kind, word in (
        ("model", torch.nn.Module, "a torch.nn.Module"),
        ("optimizer", torch.optim.Optimizer, "a torch optimizer"),
        ("lr_scheduler", torch.optim.lr_scheduler.LRScheduler, "a torch LRScheduler"),
    ):
        given = getattr(trainer, name)
        for value in given.values() if isinstance(given, Mapping) else (given,):
            if value is not None and not isinstance(value, kind):
                wrong.append(f"{name}: {_say(value)} is not {word}{_made(value)}.")
    if trainer.loss_fn is not None and not callable(trainer.loss_fn):
        wrong.append(f"loss_fn: {_say(trainer.loss_fn)} cannot be called.")
    if isinstance(trainer.loss_fn, type) and issubclass(trainer.loss_fn, torch.nn.Module):
        wrong.append(f"loss_fn: {_say(trainer.loss_fn)} is no loss{_made(trainer.loss_fn)}.")
    monitor = trainer.metric_monitor
    if monitor is not None and not isinstance(monitor, MetricMonitor):
        wrong.append(
            f"metric_monitor={_say(monitor)}: expected a MetricMonitor(metric_name=..., mode=...)."
        )
    return wrong


def _wrong_loaders(trainer: TrainerBase, *, trains: bool = True) -> list[str]:
    wrong: list[str] = []
    if trains and trainer.train_dataloader is None:
        wrong.append("train_dataloader: there is nothing to train on.")
    if trains and is_custom(trainer.train_dataloader):
        wrong += _wrong_sizes(trainer)
    names = ("train_dataloader", "val_dataloader") if trains else ("val_dataloader",)
    given = {name: getattr(trainer, name) for name in names}
    loaders = {name: loader for name, loader in given.items() if loader is not None}
    if isinstance(given["val_dataloader"], Mapping):
        named = loaders.pop("val_dataloader")
        wrong += _wrong_names(named)
        loaders |= {f"val_dataloader[{name!r}]": loader for name, loader in named.items()}
    for name, loader in loaders.items():
        if loader is trainer.train_dataloader and hasattr(loader, "state_dict"):
            if name != "train_dataloader":
                wrong.append(
                    f"{name}: it is the training loader itself, whose place in the data a "
                    "validation would move: give validation a loader of its own."
                )
            continue
        if name == "train_dataloader" and is_custom(loader):
            continue
        if _holds_loaders(loader):
            wrong.append(
                f"{name}: it holds several loaders, and training reads one: join the datasets "
                "(torch.utils.data.ConcatDataset), or give an iterable that mixes their batches."
                if name == "train_dataloader"
                else f"{name}: several loaders are given by name: "
                "val_dataloader={'near': ..., 'far': ...}."
            )
        elif _is_count(loader):
            wrong.append(f"{name}={loader}: a seed is given by name, train(seed={loader}).")
        elif isinstance(loader, torch.nn.Module):
            wrong.append(_model_as_loader(name, loader))
        elif isinstance(loader, (torch.Tensor, np.ndarray)):
            wrong.append(
                f"{name}: a {type(loader).__name__} is no loader: give DataLoader(TensorDataset("
                "inputs, targets), batch_size); of stacked batches, a list of them."
            )
        elif name == "train_dataloader" and (why := why_no_source(loader)):
            wrong.append(f"{name}: {_say(loader)} {why}.")
        elif not hasattr(loader, "__iter__"):
            wrong.append(
                f"{name}: {_say(loader)} cannot be iterated: give a DataLoader or an iterable of "
                "batches."
            )
        elif hasattr(loader, "__next__"):
            wrong.append(
                f"{name}: {_say(loader)} is an iterator, which can be read only once: give an "
                "object whose __iter__ starts again, such as a DataLoader."
            )
    return wrong


def _model_as_loader(name: str, loader: Any) -> str:
    return (
        f"{name}: {_say(loader)} is a model, which is given to Trainer(model=...); a loader "
        "belongs here."
    )


def _holds_loaders(loader: Any) -> bool:
    held = loader.values() if isinstance(loader, Mapping) else loader
    return isinstance(loader, (Mapping, list, tuple)) and any(
        isinstance(each, DataLoader) for each in held
    )


def _wrong_names(loaders: Mapping[Any, Any]) -> list[str]:
    if not loaders:
        return ["val_dataloader: it holds no loader: give some by name, or None."]
    return [
        f"val_dataloader[{name!r}]: a name is text without '/', since metrics are called "
        "'val/NAME/loss'."
        for name in loaders
        if not isinstance(name, str) or not name or "/" in name
    ]


def _wrong_sizes(trainer: TrainerBase) -> list[str]:
    """Settings on windows, which have no effect on a source that makes its own."""
    if makes_sources(trainer.train_dataloader):
        return []
    given = {
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps != 1,
        "global_batch_size": trainer.global_batch_size is not None,
        "epoch_length": trainer.epoch_length is not None,
    }
    return [
        f"{name}: the source given as train_dataloader makes its own windows: leave this out, or "
        "give an object with open_source(size, ...), which gets it."
        for name, is_given in given.items()
        if is_given
    ]


def wrong_validation(trainer: TrainerBase) -> list[str]:
    """Settings that count on a validation or a metric that there is not."""
    wrong: list[str] = []
    if trainer.early_stop is not None and trainer.metric_monitor is None:
        wrong.append(
            "early_stop: it counts validations without a better metric, so it needs "
            "metric_monitor=MetricMonitor(...)."
        )
    counting = [
        name
        for name, value in (
            ("metric_monitor", trainer.metric_monitor is not None),
            ("lr_scheduler_interval='metric'", trainer.lr_scheduler_interval == "metric"),
        )
        if value
    ]
    if not trainer.has_validation:
        wrong += [
            f"{name}: nothing is ever validated without a val_dataloader or an evaluate() of your "
            "own."
            for name in counting
        ]
    elif counting:
        metric = getattr(trainer.metric_monitor, "metric_name", "val/loss")
        wrong += [f"{counting[0]}: {why}" for why in never_measured(trainer, metric)]
    return wrong


_ADDING = ("on_metrics", *(name for name in EVENTS if name.startswith("on_validation_")))


def never_measured(trainer: TrainerBase, metric: str) -> list[str]:
    """Why no validation will measure a metric; empty if one does, or code of the user's might.

    Args:
        trainer: the trainer, with its loaders.
        metric: the name.
    """
    own = ("evaluate", "loss", "validation_step", "get_val_metrics", *_ADDING)
    if any(map(trainer.is_overridden, own)) or any(map(_may_measure, trainer.callbacks)):
        return []
    loaders, measured = trainer.val_dataloader, ["val/loss"]
    if isinstance(loaders, Mapping):
        measured = [f"val/{name}/loss" for name in loaders]
    if metric in measured:
        return []
    return [
        f"{metric!r} is not measured{nearest(metric, measured) or '.'} A validation gives: "
        f"{', '.join(measured)}. Log others in validation_step, or return them from "
        "get_val_metrics."
    ]


def _may_measure(callback: object) -> bool:
    """Whether a callback may add to a validation's metrics.

    Paceline's own callbacks that end a run by its metrics (early stopping) add none.
    """
    if not isinstance(callback, Callback):
        return True  # another check reports it
    judges = overrides(callback, "out_of_patience", Callback)
    ours = type(callback).__module__.startswith("paceline.")
    return not (judges and ours) and any(overrides(callback, name, Callback) for name in _ADDING)


def wrong_steps(trainer: TrainerBase) -> list[str]:
    """Default steps need a loss_fn and one model."""
    if trainer.is_overridden("loss"):
        return []
    needed = {
        "training_step": ("train", "epoch", "step", "training_step"),
        "validation_step": ("evaluate", "validation_step"),
    }
    if trainer.val_dataloader is None:
        del needed["validation_step"]
    wrong: list[str] = []
    for step, ways in needed.items():
        if any(map(trainer.is_overridden, ways)):
            continue
        if trainer.loss_fn is None:
            wrong.append(
                f"loss_fn: the default {step} computes loss_fn(model(inputs), targets): give "
                f"loss_fn=..., or override loss or {step}."
            )
        if isinstance(trainer.model, Mapping):
            wrong.append(f"model: with several models, override loss or {step}.")
    return wrong


def _wrong_interval(name: str, scheduler: Any, trainer: TrainerBase) -> list[str]:
    interval, monitor = trainer.lr_scheduler_interval, trainer.metric_monitor
    kind = type(scheduler).__name__
    if interval == "metric" and "metrics" not in inspect.signature(scheduler.step).parameters:
        return [f"{name}: {kind} takes no metric: lr_scheduler_interval is 'step' or 'epoch'."]
    if interval != "metric" and takes_metric(scheduler):
        return [f"{name}: {kind} steps with a metric: set lr_scheduler_interval='metric'."]
    mode = getattr(scheduler, "mode", None)
    if interval == "metric" and isinstance(monitor, MetricMonitor) and mode != monitor.mode:
        return [
            f"{name}: {kind}(mode={mode!r}) gets {monitor.metric_name!r}, of which "
            f"metric_monitor says mode={monitor.mode!r}."
        ]
    return []


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer trains other weights than it evaluates with, as schedule-free ones."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _wrong_modes(trainer: TrainerBase, optimizers: Any) -> list[str]:
    modal = [name for name, optimizer in optimizers.items() if has_modes(optimizer)]
    if not modal:
        return []
    switch = registry.lookup("callback", "schedule_free")
    if any(isinstance(callback, switch) for callback in trainer.callbacks):
        return []
    return [
        f"{name}: {type(optimizers[name]).__name__} has to be told when to train() and when to "
        "eval(): add the callback ScheduleFree() (in recipes `type: schedule_free`)."
        for name in modal
    ]


def _wrong_parameters(models: Any, optimizers: Any) -> list[str]:
    names: dict[int, str] = {}
    trainable: dict[int, str] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), f"{model_name}.{name}")
            if parameter.requires_grad:
                trainable.setdefault(id(parameter), f"{model_name}.{name}")
    held = Counter(
        id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]
    )
    wrong: list[str] = []
    forgotten = [name for key, name in trainable.items() if key not in held]
    if forgotten and optimizers:
        wrong.append(
            f"in no optimizer: {some(forgotten)}. Give them to one, or freeze them with "
            "requires_grad_(False)."
        )
    twice = [names.get(key, "a parameter of no model") for key, n in held.items() if n > 1]
    if twice:
        wrong.append(f"in more than one optimizer or group: {some(twice)}.")
    strangers = sum(key not in names for key in held)
    if strangers and models:
        wrong.append(
            f"an optimizer has {counted(strangers, 'parameter')} that no model of this trainer "
            "has, so no checkpoint would hold them. Was it made for another model, or before the "
            "model was replaced?"
        )
    return wrong


def _wrong_for_scaling(trainer: TrainerBase, models: Any) -> list[str]:
    """Parameters whose gradients torch's GradScaler cannot unscale."""
    if trainer.precision != "fp16":
        return []
    cannot = [
        f"{name}.{key} ({str(p.dtype).removeprefix('torch.')})"
        for name, model in models.items()
        for key, p in model.named_parameters()
        if p.requires_grad and (p.is_complex() or p.dtype == torch.float16)
    ]
    if not cannot:
        return []
    return [
        f"precision='fp16': the scaled gradients of {some(cannot)} cannot be unscaled. Keep "
        "weights in float32 (autocast computes in float16), or set precision='fp32' or 'bf16'."
    ]


def _without_values(models: Any) -> list[str]:
    empty = [f"{name}.{key}" for name, model in models.items() for key in without_a_way(model)]
    if not empty:
        return []
    return [
        f"without values: {some(empty)}. They are on the meta device, and no reset_parameters() "
        "of their module, nor an init_weights() around it, could give them any."
    ]


def _wrong_states(models: Any) -> list[str]:
    """A model may save less than all of itself, but nothing that is trained."""
    wrong: list[str] = []
    for model_name, model in models.items():
        if type(model).state_dict is torch.nn.Module.state_dict:
            continue
        saved = model.state_dict()
        trained = (name for name, p in model.named_parameters() if p.requires_grad)
        lost = [f"{model_name}.{name}" for name in trained if name not in saved]
        if lost:
            wrong.append(
                f"{type(model).__name__}.state_dict() leaves out what is trained: {some(lost)}."
            )
    return wrong
