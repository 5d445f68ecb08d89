"""The state of a run as one tree: gathered for a checkpoint, and loaded from one.

torch's schedulers keep their settings in their state, so that loading it would bring the old ones
back in silence. `identity.py` compares them instead; a change that is accepted puts the new
schedule where it would stand had it run from the start.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from paceline.checkpoint.state import (
    Made,
    check_grouping,
    empty_buffers,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    parameter_names,
    regroup,
)
from paceline.data.kept import Kept, generators_in
from paceline.errors import ResumeError, some
from paceline.trainer.attributes import OF_THE_RUN, attributes_of, changed_since, give_back
from paceline.trainer.base import TrainerBase
from paceline.trainer.monitor import watched_by
from paceline.trainer.names import load_by_name, settings_of, unique_names
from paceline.trainer.optimization import takes_metric
from paceline.trainer.resume import compare, horizon
from paceline.trainer.run import Run
from paceline.world.dtensors import reshard

# What schedulers write into an optimizer's groups.
_SCHEDULED = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "momentum",
    "betas",
    "base_momentum",
    "max_momentum",
)

# What ReduceLROnPlateau keeps of the metric that it follows.
_OF_METRIC = ("best", "num_bad_epochs", "cooldown_counter")


def gather_state(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """The state tree of `checkpoint/state.py`, referring to live tensors.

    Args:
        trainer: whose state it is.
        run: between two windows.
    """
    models = trainer.named_models()
    reshard(models.values())  # a call between two windows leaves parameters gathered
    names = parameter_names(models)
    rank = {**trainer.recorder.state_dict()}
    source = trainer.source.state_dict()
    if trainer.source.per_rank:
        rank["data"] = source
    elif kept := _asked(trainer.source, "reader_state"):
        rank["reader"] = kept
    generators = {name: kept.state() for name, kept in _generators(trainer).items()}
    if generators:
        rank["generators"] = generators
    if validation := _of_validation(trainer):
        rank["validation"] = validation
    monitor, scaler, pipeline = trainer.metric_monitor, run.scaler, run.placement.pipeline
    states = {
        name: state
        for name, callback in unique_names(trainer.callbacks).items()
        if (state := callback.state_dict())
    }
    optimizers = {
        name: optimizer_state(optimizer, names)
        for name, optimizer in trainer.named_optimizers().items()
    }
    if pipeline is not None:
        pipeline.complete(optimizers)
    attributes, lost = changed_since(run.attributes, trainer)
    if attributes:
        rank["attributes"] = attributes
    _report_lost(trainer, run, lost)
    objects = {name: thing.state_dict() for name, thing in trainer.named_objects().items()}
    return {
        "models": {name: model.state_dict() for name, model in models.items()} | run.waiting,
        "optimizers": optimizers,
        "schedulers": {
            name: scheduler.state_dict()
            for name, scheduler in (trainer.named_schedulers() or {}).items()
        },
        "scaler": None if scaler is None else scaler.state_dict(),
        "progress": run.progress.state_dict(),
        "data": None if trainer.source.per_rank else source,
        "monitor": None if monitor is None else monitor.state_dict(),
        "callbacks": states,
        "objects": run.waiting_objects | objects,
        "settings": {
            "monitor": None if monitor is None else watched_by(monitor),
            "callbacks": {name: run.made_with["callbacks"].get(name) for name in states},
            "objects": run.made_with["objects"],
        },
        "rank": {str(run.world.rank): rank},
        "identity": run.identity.keys,
        "identity_parts": run.identity.parts,
        "horizon": horizon(trainer),
        "made": run.made.changes(models, trainer.named_optimizers()),
        "leaves_out": trainer.optimization.leaves_out,
        **_of_groups(trainer),
    }


def _report_lost(trainer: TrainerBase, run: Run, lost: list[str]) -> None:
    """Adds to the plan what training changes and no checkpoint holds, and prints what is new."""
    new: list[str] = []
    for what in lost:
        known = len(run.plan)
        run.plan.add(f"training changes {what}: no checkpoint holds it", "state_dict()")
        if len(run.plan) > known:
            new.append(what)
    if new and run.trained:  # else the plan has yet to be printed and written
        trainer.say(f"training changes {some(new)}: no checkpoint holds it  [state_dict()]")
        with contextlib.suppress(OSError):  # it is written once more at the end
            run.record.update(plan=run.plan.as_list())


def settings_of_parts(trainer: TrainerBase) -> dict[str, Any]:
    """What tells callbacks, and checkpoint objects, of one class apart; a run may change it."""
    return {
        "callbacks": settings_of(unique_names(trainer.callbacks)),
        "objects": settings_of(trainer.named_objects()),
    }


def _generators(trainer: TrainerBase) -> dict[str, Kept]:
    """Random generators of the trainer, its models, loss and callbacks, by whose they are."""
    owners = {"trainer": trainer, **unique_names(trainer.callbacks)}
    models = trainer.named_models()
    for name, model in ({"loss_fn": trainer.loss_fn} | models).items():
        parts = model.named_modules() if isinstance(model, torch.nn.Module) else [("", model)]
        owners |= {f"models.{name}.{path}": part for path, part in parts}
    found = {name: generators_in(owner) for name, owner in owners.items()}
    return {name: kept for name, kept in found.items() if kept.names}


def _of_validation(trainer: TrainerBase) -> dict[str, Any]:
    """What the validation loaders' objects keep, by the loaders' names; "" for the only one."""
    states = {name or "": _asked(data, "state_dict") for name, data in trainer.validation.items()}
    return {name: state for name, state in states.items() if state}


def _asked(data: Any, what: str) -> dict[str, Any]:
    """What a source gives in a method that one of the user's own need not have."""
    return getattr(data, what, dict)()


def _load_part(
    trainer: TrainerBase, part: str, things: Mapping[str, Any], made_with: Any, tree: dict[str, Any]
) -> dict[str, Any]:
    """Callbacks, or checkpoint objects, of which those that were given a name keep it.

    Returns:
        The states for which there is none.
    """
    kind = {"callbacks": "callback", "objects": "checkpoint object"}[part]
    named = part == "objects" and isinstance(trainer.checkpoint_objects, Mapping)
    theirs = None if named else tree.get("settings", {}).get(part)
    return load_by_name(kind, things, tree[part], trainer.say, made_with, theirs)


def _another_metric(trainer: TrainerBase, tree: dict[str, Any]) -> bool:
    """Whether the run watched another metric, whose best says nothing of this one's."""
    monitor, before = trainer.metric_monitor, tree.get("settings", {}).get("monitor")
    return monitor is not None and before is not None and before != watched_by(monitor)


def _load_objects_of_data(trainer: TrainerBase, own: dict[str, Any]) -> None:
    """Gives the objects of the loaders what this rank's part of the state holds of them."""
    validation = own.get("validation", {})
    loads: list[tuple[Any, str, Any]] = [(trainer.source, "load_reader_state", own.get("reader"))]
    loads += [
        (data, "load_state_dict", validation.get(name or ""))
        for name, data in trainer.validation.items()
    ]
    for data, load, state in loads:
        if state is not None and hasattr(data, load):
            getattr(data, load)(state)


def _attributes(ranks: Mapping[str, Any], run: Run) -> dict[str, dict[str, Any]]:
    """What training had changed: on as many ranks, this one's, else what was the same on all."""
    found = {rank: one.get("attributes", {}) for rank, one in ranks.items()}
    if len(ranks) == run.world.size:
        return found.get(str(run.world.rank), {})
    same: dict[str, dict[str, Any]] = {}
    for holder in {name for one in found.values() for name in one}:
        held = [one[holder] for one in found.values() if holder in one]  # else of another stage
        same[holder] = {k: v for k, v in held[0].items() if all(o.get(k) == v for o in held)}
    return same


def _of_groups(trainer: TrainerBase) -> dict[str, Any]:
    groups = trainer.replica_groups
    return {} if groups is None else {"replica_groups": groups.state_dict()}


def load_state(trainer: TrainerBase, run: Run, tree: dict[str, Any]) -> None:
    """Puts a state tree back into the trainer's objects.

    Args:
        trainer: whose objects they are.
        run: between two windows, or at its start.
        tree: as `gather_state` gave it.

    Raises:
        MismatchError, ResumeError: it does not fit; nothing that could be checked was changed.
    """
    found = compare(run.identity, horizon(trainer), tree, trainer.resume)
    made, changes = run.made, tree.get("made", {})
    if not found.weights_say_more:
        found.check()
    _check_fits(trainer, tree, made, changes)
    found.check()
    if found.unknown:
        missing = ", ".join(found.unknown)
        run.plan.add(f"not compared with the checkpoint, which lacks it: {missing}")
    models = trainer.named_models()
    run.waiting = {name: state for name, state in tree["models"].items() if name not in models}
    for name, model in models.items():
        if name in tree["models"]:
            load_tensors(model, tree["models"][name])
        if name in made.models:
            empty_buffers(model, made.models[name], tree["models"][name])
            made.models[name].switch(model, changes.get("models", {}).get(name, {}))
    give_back(run.attributes, trainer, _attributes(tree["rank"], run))
    for name, optimizer in trainer.named_optimizers().items():
        regroup(optimizer, tree["optimizers"][name]["groups"], models)
    _load_optimizers(trainer, tree, found.accepted, parameter_names(models))
    if run.scaler is not None and tree["scaler"] is not None:
        run.scaler.load_state_dict(tree["scaler"])
    run.progress.load_state_dict(tree["progress"])
    trainer.optimization.load_leaves_out(tree.get("leaves_out", ()))
    _load_data(trainer, run, tree)
    if trainer.metric_monitor is not None and tree["monitor"] is not None:
        if _another_metric(trainer, tree):
            trainer.say(
                f"the metric monitor watches {watched_by(trainer.metric_monitor)} now, and "
                f"{tree['settings']['monitor']} in the checkpoint: it starts fresh."
            )
        else:
            trainer.metric_monitor.load_state_dict(tree["monitor"])
    named = {"callbacks": unique_names(trainer.callbacks), "objects": trainer.named_objects()}
    for part, things in named.items():
        left = _load_part(trainer, part, things, run.made_with[part], tree)
        if part == "objects":  # training may make them on its way, as it did
            run.waiting_objects = {k: v for k, v in left.items() if k not in things}
    trainer.recorder.load_state_dict(tree["rank"])
    generators = tree["rank"].get(str(run.world.rank), {}).get("generators", {})
    for name, kept in _generators(trainer).items():
        kept.load(generators.get(name, {}))
    _load_objects_of_data(trainer, tree["rank"].get(str(run.world.rank), {}))
    if trainer.replica_groups is not None:
        trainer.replica_groups.load_state_dict(tree.get("replica_groups", {}))


def load_for_inference(
    trainer: TrainerBase, run: Run, tree: dict[str, Any], weights: Mapping[str, Mapping[str, Any]]
) -> None:
    """Puts back what an evaluation needs: weights, checkpoint objects, counters, loaders' objects.

    Args:
        trainer: whose objects they are.
        run: that does not train.
        tree: as `gather_state` gave it, or those parts of it.
        weights: the models' states by name, on the CPU.

    Raises:
        MismatchError, ResumeError: the weights are of other models; nothing was changed.
    """
    models, made = trainer.named_models(), Made.of(trainer.named_models(), {})
    _check_names("models", models, weights)
    changes = tree.get("made", {}).get("models", {})
    for name, form in made.models.items():
        form.check(weights[name], changes.get(name, {}), f"model {name!r}")
    for name, model in models.items():
        load_tensors(model, weights[name])
        empty_buffers(model, made.models[name], weights[name])
    changed = _attributes(tree.get("rank", {}), run)
    changed.pop(OF_THE_RUN, None)  # settings of training
    give_back(attributes_of(trainer), trainer, changed)
    objects = trainer.named_objects()
    _load_part(trainer, "objects", objects, settings_of(objects), tree)
    run.progress.load_state_dict(tree["progress"])
    generators = tree.get("rank", {}).get(str(run.world.rank), {}).get("generators", {})
    for name, kept in _generators(trainer).items():
        kept.load(generators.get(name, {}))


def _check_fits(
    trainer: TrainerBase, tree: dict[str, Any], made: Made, changes: dict[str, Any]
) -> None:
    later = {*changes.get("later", ()), *(trainer.named_models().keys() - made.models.keys())}
    models = {name for name in tree["models"] if name not in later}
    _check_names("models", made.models.keys() - later, models)
    _check_names("optimizers", trainer.named_optimizers(), tree["optimizers"])
    _check_names("schedulers", trainer.named_schedulers() or {}, tree["schedulers"])
    for name in models:
        changed = changes.get("models", {}).get(name, {})
        made.models[name].check(tree["models"][name], changed, f"model {name!r}")
    for name in trainer.named_optimizers():
        now = [group["params"] for group in tree["optimizers"][name]["groups"]]
        check_grouping(
            made.groups[name], changes.get("groups", {}).get(name, now), f"optimizer {name!r}"
        )


def _load_optimizers(
    trainer: TrainerBase, tree: dict[str, Any], accepted: list[str], names: dict[int, str]
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
        load_optimizer_state(optimizer, tree["optimizers"][name], names)
        if course is not None:
            put(optimizer, course)
        else:
            for (key, scheduler), state in zip(mine.items(), stored, strict=True):
                changed = [k.removeprefix(key + ".") for k in accepted if k.startswith(key + ".")]
                if takes_metric(scheduler) and _another_metric(trainer, tree):
                    changed += _OF_METRIC
                load_schedule(scheduler, state, changed)
        _apply(optimizer, wanted, mine if course is None else None)


def _schedule_changed(name: str, schedulers: dict[str, Any], accepted: list[str]) -> bool:
    rates = [key for key in accepted if key.startswith(name + ".") and key.endswith(".lr")]
    return bool(rates) or any(
        key.startswith(scheduler + ".") for scheduler in schedulers for key in accepted
    )


def _load_data(trainer: TrainerBase, run: Run, tree: dict[str, Any]) -> None:
    source, world = trainer.source, run.world
    if (tree["data"] is None) != source.per_rank:
        raise ResumeError(
            "the checkpoint's place in the data is of another kind of loader (map-style against "
            "streamed): resume with the loader it began with, or start from its weights "
            "(init_from)."
        )
    if not source.per_rank:
        source.load_state_dict(tree["data"])
        if run.progress.batch:  # else it was saved at an epoch's end, where the data still is
            run.progress.batch = source.batches_done()  # as this number of ranks counts them
        return
    if len(tree["rank"]) != world.size:
        raise ResumeError(
            f"the training loader keeps its own place on each rank: a run of {len(tree['rank'])} "
            f"ranks cannot resume with {world.size}. A map-style dataset can."
        )
    source.load_state_dict(tree["rank"][str(world.rank)]["data"])


def _check_names(kind: str, here: Any, stored: Any) -> None:
    if set(here) != set(stored):
        raise ResumeError(
            f"the checkpoint holds the {kind} {', '.join(sorted(stored)) or 'none'}; this run has "
            f"{', '.join(sorted(here)) or 'none'}."
        )


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


def replayed(schedulers: list[Any], stored: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Brings one optimizer's new schedulers to where stored ones stand.

    Args:
        schedulers: as constructed, and their optimizer with them.
        stored: the state of each in the checkpoint.

    Returns:
        What they then want in each of the optimizer's groups; None if they cannot be replayed.
    """
    if any(takes_metric(s) or s.last_epoch != 0 for s in schedulers):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps in between
        for scheduler, state in zip(schedulers, stored, strict=True):
            for _ in range(state["last_epoch"]):
                scheduler.step()
    groups = schedulers[0].optimizer.param_groups
    return [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]


def load_schedule(scheduler: Any, stored: dict[str, Any], changed: list[str]) -> None:
    """Loads a scheduler's state, except changed settings.

    Args:
        scheduler: the scheduler to load into.
        stored: its state in the checkpoint.
        changed: names of settings that keep their current values.
    """
    kept = {name: vars(scheduler)[name] for name in changed if name in vars(scheduler)}
    scheduler.load_state_dict(stored)
    vars(scheduler).update(kept)


def put(optimizer: torch.optim.Optimizer, wanted: list[dict[str, Any]]) -> None:
    """Sets the scheduled values of an optimizer, after its state was loaded.

    Args:
        optimizer: the optimizer, which is changed.
        wanted: the values of each parameter group, from `replayed`.
    """
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)
