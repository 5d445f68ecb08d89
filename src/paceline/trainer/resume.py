"""Going on from a checkpoint: what must be the same, what may grow, what is loaded."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from paceline.checkpoint import Checkpoint, check_fits, load_tree, scan, verify
from paceline.checkpoint.safetensors_file import read_metadata
from paceline.checkpoint.state import (
    check_optimizer_state,
    load_model_state,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    parameter_names,
)
from paceline.errors import CheckpointError, ConfigError, ResumeError
from paceline.log.provenance import read_run
from paceline.trainer.events import named_callbacks
from paceline.trainer.schedules import load_schedule, put, replayed, schedule_settings
from paceline.world.dtensors import reshard
from paceline.world.environment import began_before_restart

if TYPE_CHECKING:
    from paceline.trainer.settings import Resume
    from paceline.trainer.trainer import Trainer

_GLOBAL_BATCH = "data.global_batch_size"


def after_restart(trainer: Trainer) -> Resume:
    """How a run goes on that this start may have begun already, before a launcher's restart.

    What was asked for ("fresh", "must", a path) was done then; what is left is to go on.
    """
    asked, begun = trainer.resume, False
    if trainer.run_dir is None or asked.mode == "auto":
        return asked
    with contextlib.suppress(OSError, ValueError, AttributeError):
        begun = began_before_restart(read_run(trainer.run_dir).get("environment") or {})
    # Of several machines' launchers, only that of the rank that failed has counted a restart.
    begun = any(trainer.world.all_gather_object(begun))
    return replace(asked, mode="auto") if begun else asked


def kept_global_batch_size(
    run_dir: Path | None, resume: Resume, loader: Any, accumulation: int
) -> int | None:
    """Samples of all ranks in a step, where settings that say it for each rank are unchanged.

    So a run that goes on with another number of ranks sees the same samples in each step.

    Args:
        run_dir: the run's folder.
        resume: how it goes on.
        loader: the training loader.
        accumulation: the setting `gradient_accumulation_steps`.

    Returns:
        What the run's newest checkpoint says; None if the settings are to decide.
    """
    if run_dir is None or resume.mode == "fresh" or _accepted(_GLOBAL_BATCH, resume.accept):
        return None
    found, _ = scan(run_dir / "checkpoints")
    window = found[-1].info.get("window") if found else None
    if not isinstance(window, dict) or window.get("as set") != _as_set(loader, accumulation):
        return None
    size = window.get("global_batch_size")
    return size if isinstance(size, int) and size > 0 else None


def window_info(trainer: Trainer) -> dict[str, Any]:
    """What `kept_global_batch_size` reads, for a checkpoint's manifest."""
    size = trainer.source.identity.get("global_batch_size")
    set_to = _as_set(trainer.train_dataloader, trainer.gradient_accumulation_steps)
    return {"as set": set_to, "global_batch_size": size}


def _as_set(loader: Any, accumulation: int) -> list[int]:
    return [getattr(loader, "batch_size", None) or 1, accumulation]


def identity(trainer: Trainer) -> dict[str, Any]:
    """The settings that a resumed run must find unchanged, by dotted key.

    The models' own names and shapes are compared when their weights are loaded.
    """
    keys: dict[str, Any] = {
        "seed": trainer.seed,
        "precision": trainer.computes_in,
        "loss_fn": _kind(trainer.loss_fn),
        "max_grad_norm": trainer.max_grad_norm,
        **{f"loss_fn.{key}": value for key, value in _arguments(trainer.loss_fn).items()},
    }
    for name, value in trainer.source.identity.items():
        keys[f"data.{name}"] = value
    for name, optimizer in trainer.named_optimizers().items():
        keys[f"{name}.class"] = type(optimizer).__name__
        keys |= {f"{name}.{key}": value for key, value in _plain(optimizer.defaults).items()}
        # Some optimizers count in their groups as well.
        arguments = inspect.signature(type(optimizer)).parameters
        for i, group in enumerate(optimizer.param_groups):
            own = {k: v for k, v in group.items() if k in optimizer.defaults and k in arguments}
            if "initial_lr" in group:
                own["lr"] = group["initial_lr"]
            for key, value in _plain(own).items():
                if keys[f"{name}.{key}"] != value:
                    keys[f"{name}.group{i}.{key}"] = value
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        keys[f"{name}.class"] = type(scheduler).__name__
        keys |= {f"{name}.{key}": value for key, value in schedule_settings(scheduler).items()}
    return keys


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an optimizer's settings that can be compared."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, torch.Tensor):
            value = value.item()
        if isinstance(value, (bool, int, float, str, type(None))):
            found[key] = value
        elif isinstance(value, (tuple, list)):
            found[key] = str(tuple(value))
    return found


def horizon(trainer: Trainer) -> dict[str, int | None]:
    """Where the run ends; may grow at resume."""
    return {"epochs": trainer.epochs, "max_steps": trainer.max_steps}


def check_identity(trainer: Trainer, stored: dict[str, Any]) -> list[str]:
    """Compares with a checkpoint's settings; returns the accepted keys that differ.

    Raises:
        ResumeError: listing every key that may not differ but does.
    """
    now, then = trainer.identity, stored["identity"]
    changed = {
        key: (then.get(key), now.get(key))
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    }
    for key, value in horizon(trainer).items():
        before = stored["horizon"][key]
        if value is not None and before is not None and value < before:
            changed[key] = (before, value)
    accepted = [key for key in changed if _accepted(key, trainer.resume.accept)]
    refused = {key: values for key, values in changed.items() if key not in accepted}
    if refused:
        lines = [f"{key}: {old!r} then, {new!r} now" for key, (old, new) in refused.items()]
        raise ResumeError(
            "this run cannot go on with other settings than it began with:\n  "
            + "\n  ".join(lines)
            + "\nPut them back, start anew beside the old run (another run_dir), move the old run "
            "aside (resume='fresh', --fresh), or accept the change "
            f"(Resume(accept=({next(iter(refused))!r},)), --accept {next(iter(refused))})."
        )
    return accepted


def gather_state(trainer: Trainer) -> dict[str, Any]:
    """The state tree of `checkpoint/state.py`, referring to live tensors."""
    models = trainer.named_models()
    reshard(models.values())  # a call between two windows leaves parameters gathered
    names = parameter_names(models)
    rank = {**trainer.recorder.state_dict()}
    source = trainer.source.state_dict()
    if trainer.source.per_rank:
        rank["data"] = source
    monitor, scaler = trainer.metric_monitor, trainer.optimization.scaler
    optimizers = {
        name: optimizer_state(optimizer, names)
        for name, optimizer in trainer.named_optimizers().items()
    }
    if trainer.pipeline is not None:
        trainer.pipeline.complete(optimizers)
    return {
        "models": {name: model.state_dict() for name, model in models.items()},
        "optimizers": optimizers,
        "schedulers": {
            name: scheduler.state_dict()
            for name, scheduler in (trainer.named_schedulers() or {}).items()
        },
        "scaler": None if scaler is None else scaler.state_dict(),
        "progress": trainer.progress.state_dict(),
        "data": None if trainer.source.per_rank else source,
        "monitor": None if monitor is None else monitor.state_dict(),
        "callbacks": {
            name: state
            for name, callback in named_callbacks(trainer.callbacks).items()
            if (state := callback.state_dict())
        },
        "objects": {name: thing.state_dict() for name, thing in trainer.named_objects().items()},
        "rank": {str(trainer.world.rank): rank},
        "identity": trainer.identity,
        "horizon": horizon(trainer),
        **_of_groups(trainer),
    }


def _of_groups(trainer: Trainer) -> dict[str, Any]:
    groups = trainer.replica_groups
    return {} if groups is None else {"replica_groups": groups.state_dict()}


def load_state(trainer: Trainer, tree: dict[str, Any]) -> None:
    """Puts a state tree back into the trainer's objects.

    Raises:
        MismatchError, ResumeError: it does not fit; nothing that could be checked was changed.
    """
    accepted = check_identity(trainer, tree)
    _check_fits(trainer, tree)
    models = trainer.named_models()
    for name, model in models.items():
        load_model_state(model, tree["models"][name], f"model {name!r}")
    _load_optimizers(trainer, tree, accepted, parameter_names(models))
    if trainer.optimization.scaler is not None and tree["scaler"] is not None:
        trainer.optimization.scaler.load_state_dict(tree["scaler"])
    trainer.progress.load_state_dict(tree["progress"])
    _load_data(trainer, tree)
    if trainer.metric_monitor is not None and tree["monitor"] is not None:
        trainer.metric_monitor.load_state_dict(tree["monitor"])
    _load_named(trainer, "callback", named_callbacks(trainer.callbacks), tree["callbacks"])
    _load_named(trainer, "checkpoint object", trainer.named_objects(), tree["objects"])
    trainer.recorder.load_state_dict(tree["rank"])
    if trainer.replica_groups is not None:
        trainer.replica_groups.load_state_dict(tree.get("replica_groups", {}))


def _check_fits(trainer: Trainer, tree: dict[str, Any]) -> None:
    models, optimizers = trainer.named_models(), trainer.named_optimizers()
    _check_names("models", models, tree["models"])
    _check_names("optimizers", optimizers, tree["optimizers"])
    _check_names("schedulers", trainer.named_schedulers() or {}, tree["schedulers"])
    for name, model in models.items():
        check_fits(model.state_dict(), tree["models"][name], f"model {name!r}")
    names = parameter_names(models)
    for name, optimizer in optimizers.items():
        stored = tree["optimizers"][name]
        check_optimizer_state(optimizer, stored, names, f"optimizer {name!r}")


def _load_optimizers(
    trainer: Trainer, tree: dict[str, Any], accepted: list[str], names: dict[int, str]
) -> None:
    """Optimizers and their schedulers, with the changes that were accepted."""
    schedulers = trainer.named_schedulers() or {}
    for name, optimizer in trainer.named_optimizers().items():
        mine = {key: s for key, s in schedulers.items() if s.optimizer is optimizer}
        stored = [tree["schedulers"][key] for key in mine]
        wanted = _wanted(optimizer, name, accepted)
        course = None
        if mine and _schedule_changed(name, mine, accepted):
            course = replayed(list(mine.values()), stored)
        load_optimizer_state(optimizer, tree["optimizers"][name], names, f"optimizer {name!r}")
        if course is not None:
            put(optimizer, course)
        else:
            for (key, scheduler), state in zip(mine.items(), stored, strict=True):
                changed = [k.removeprefix(key + ".") for k in accepted if k.startswith(key + ".")]
                load_schedule(scheduler, state, changed)
        _apply(optimizer, wanted, mine if course is None else None)


def _schedule_changed(name: str, schedulers: dict[str, Any], accepted: list[str]) -> bool:
    rates = [key for key in accepted if key.startswith(name + ".") and key.endswith(".lr")]
    return bool(rates) or any(
        key.startswith(scheduler + ".") for scheduler in schedulers for key in accepted
    )


def _load_data(trainer: Trainer, tree: dict[str, Any]) -> None:
    source, world = trainer.source, trainer.world
    if (tree["data"] is None) != source.per_rank:
        raise ResumeError(
            "the checkpoint's place in the data is of another kind of loader (map-style against "
            "streamed): go on with the loader it began with, or start from its weights (init_from)."
        )
    if not source.per_rank:
        source.load_state_dict(tree["data"])
        if trainer.progress.batch:  # else it was saved at an epoch's end, where the data still is
            trainer.progress.batch = source.batches_done()  # as this number of ranks counts them
        return
    if len(tree["rank"]) != world.size:
        raise ResumeError(
            f"the training loader keeps its own place on each rank: a run of {len(tree['rank'])} "
            f"ranks cannot go on with {world.size}. A map-style dataset can."
        )
    source.load_state_dict(tree["rank"][str(world.rank)]["data"])


def _load_named(trainer: Trainer, kind: str, here: dict[str, Any], stored: dict[str, Any]) -> None:
    for name, thing in here.items():
        if name in stored:
            thing.load_state_dict(stored[name])
        elif thing.state_dict():
            trainer.say(f"the {kind} {name!r} is new in this run: it starts fresh.")
    for name in stored:
        if name not in here:
            trainer.say(f"the {kind} {name!r} of the checkpoint is no longer there.")


def _check_names(kind: str, here: Any, stored: Any) -> None:
    if set(here) != set(stored):
        raise ResumeError(
            f"the checkpoint holds the {kind} {', '.join(sorted(stored)) or 'none'}; this run has "
            f"{', '.join(sorted(here)) or 'none'}."
        )


def _accepted(key: str, accept: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in accept)


def _wanted(
    optimizer: torch.optim.Optimizer, name: str, accepted: list[str]
) -> list[dict[str, Any]]:
    """What the accepted keys are in each group of the new run's optimizer."""
    keys = [key.removeprefix(name + ".") for key in accepted if key.startswith(name + ".")]
    return [
        {
            key: group.get("initial_lr", group[key]) if key == "lr" else group[key]
            for key in {each.removeprefix(f"group{i}.") for each in keys}
            if key in group
        }
        for i, group in enumerate(optimizer.param_groups)
    ]


def _apply(optimizer: torch.optim.Optimizer, wanted: list[dict[str, Any]], schedulers: Any) -> None:
    """Writes accepted settings; rates under schedulers keep their place, or were replayed."""
    for i, (group, values) in enumerate(zip(optimizer.param_groups, wanted, strict=True)):
        for key, value in values.items():
            if key != "lr" or "initial_lr" not in group:
                group[key] = value
            elif schedulers is not None:
                group["lr"] = value * (group["lr"] / group["initial_lr"])
                group["initial_lr"] = value
                for scheduler in schedulers.values():
                    if hasattr(scheduler, "base_lrs"):
                        scheduler.base_lrs[i] = value


def _kind(thing: Any) -> str | None:
    if thing is None:
        return None
    if isinstance(thing, partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _arguments(thing: Any) -> dict[str, Any]:
    """The plain settings of a loss: attributes of a module, keywords of a partial function."""
    if isinstance(thing, partial):
        return _plain(thing.keywords)
    if not isinstance(thing, torch.nn.Module):
        return {}
    own = {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "training"}
    return _plain(own)


def load_weights(trainer: Trainer, path: Path) -> None:
    """Warm start: model weights alone, by name; says what was loaded, missing and unexpected.

    Raises:
        CheckpointError: nothing there, damaged, or no name fits.
    """
    source, stored = _weights_at(trainer, path)
    loaded, missing, unexpected = 0, [], []
    for name, model in trainer.named_models().items():
        here, there = model.state_dict(keep_vars=True), stored.get(name, {})
        fits = {k: v for k, v in there.items() if k in here and v.shape == here[k].shape}
        loaded += len(fits)
        tied = {id(here[k]) for k in fits}  # an exported file has tied weights under one name
        missing += [f"{name}.{k}" for k in here if k not in fits and id(here[k]) not in tied]
        unexpected += [f"{name}.{k}" for k in there if k not in fits]
        load_tensors(model, fits)
    if not loaded:
        raise CheckpointError(f"init_from={path}: no tensor there fits this trainer's models.")
    trainer.say(
        f"weights from {source}: {loaded} tensors loaded; missing: {', '.join(missing) or 'none'}; "
        f"unexpected: {', '.join(unexpected) or 'none'}."
    )


def _weights_at(trainer: Trainer, path: Path) -> tuple[Path, dict[str, Any]]:
    """Where the weights are found, and the models' states by name."""
    if path.is_file():
        named = read_metadata(path).get("model")
        models = trainer.named_models()
        name = named if named in models else next(iter(models))
        return path, {name: load_file(path)}
    folder = _checkpoint_in(trainer, path)
    return folder, load_tree(folder, parts=("models",))["models"]


def _checkpoint_in(trainer: Trainer, path: Path) -> Path:
    """A checkpoint's folder, or the newest intact one of a run's folder; nothing is moved there."""
    if (path / "manifest.json").exists():
        verify(path)
        return path
    found, broken = scan(path / "checkpoints")
    for _, error in broken:
        trainer.say(f"init_from: {error}; another checkpoint is looked for.")
    for checkpoint in reversed(found):
        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            trainer.say(f"init_from: {error}; an older checkpoint is looked for.")
        else:
            return checkpoint.path
    raise CheckpointError(
        f"init_from={path} is neither a checkpoint nor a run with one nor a safetensors file."
    )


def find(trainer: Trainer) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start.

    Raises:
        ConfigError: `resume` says "must" and there is none, or "never" and there is one.
    """
    saver, mode = trainer.saver, trainer.resume.mode
    if saver is None:
        return None
    if trainer.replica_groups is not None and not trainer.replica_groups.writes:
        return trainer.replica_groups.newest()
    saver.recover()
    if trainer.resume.path is not None:
        wanted = trainer.resume.path.resolve()
        found = next((c for c in saver.list() if c.path.resolve() == wanted), None)
        if found is None:
            raise ConfigError(
                f"resume={trainer.resume.mode!r} is no checkpoint of this run; there is: "
                f"{', '.join(c.path.name for c in saver.list()) or 'none'}. To start from another "
                "run's weights, use init_from."
            )
        return found
    found = saver.newest()
    if found is None and mode == "must":
        raise ConfigError(f"resume='must': {trainer.run_dir} holds no intact checkpoint.")
    if found is not None and mode == "never":
        raise ConfigError(
            f"resume='never': {trainer.run_dir} holds a run already (step {found.step}). Choose "
            "another run_dir, go on from it (resume='auto'), or move it aside (resume='fresh')."
        )
    return found
