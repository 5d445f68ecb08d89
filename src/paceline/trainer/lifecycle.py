"""A run's beginning and end: everything around the loop, in the order in which it happens."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline import registry
from paceline.checkpoint import CheckpointPolicy, engine_class
from paceline.checkpoint.engine import recorded_engine
from paceline.checkpoint.policy import NATIVE
from paceline.checkpoint.state import Made
from paceline.data.custom import is_custom
from paceline.data.loader import loaders_by_name, open_training, open_validation
from paceline.data.source import Validation, WindowSize, batches_in
from paceline.errors import (
    ConfigError,
    DataError,
    MismatchError,
    PeerError,
    Preempted,
    UnreadableError,
    counted,
)
from paceline.log.files import shown
from paceline.log.kept_code import keep, place_of
from paceline.log.run_record import PRUNED, RunRecord
from paceline.log.sinks import rows_of, with_local_rows
from paceline.reading import status
from paceline.trainer import decisions, error_context, resume, saving
from paceline.trainer.attributes import attributes_of
from paceline.trainer.base import TrainerBase
from paceline.trainer.callback import EARLY_STOP
from paceline.trainer.checks import check_changed, check_components, check_data, check_engine
from paceline.trainer.events import EVENTS, Events
from paceline.trainer.identity import add_own_identity, complete_identity, describe_components
from paceline.trainer.optimization import Optimization
from paceline.trainer.pretrained import keep_pretrained
from paceline.trainer.proof import prove, prove_first_step
from paceline.trainer.ranks_alike import (
    check_components_alike,
    check_data_alike,
    check_settings_alike,
)
from paceline.trainer.recorder import Recorder, rows_every
from paceline.trainer.result import Result
from paceline.trainer.run import Run, StopBeforeWindow
from paceline.trainer.settings import READ_BY_OPENING, READ_ONCE, FixedDict, FixedList
from paceline.trainer.state_tree import settings_of_parts
from paceline.trainer.stop import behind_boundary, behind_window
from paceline.trainer.warm_start import load_weights
from paceline.world.seeding import mix, random_state_kept, seed_everything, stream


@contextmanager
def running(trainer: TrainerBase, run: Run) -> Iterator[None]:
    """The life of a run around its loop.

    Args:
        trainer: whose settings were checked.
        run: just made.

    Raises:
        Preempted: a signal stopped the run, which was saved.
    """
    failure = None
    try:
        start(trainer, run)
        yield
        finish(trainer, run)
    except GeneratorExit:  # a train() of the user's own has left its loop
        finish(trainer, run)
        raise
    except BaseException as error:
        failure = fail(trainer, run, error)
        if failure is error:
            raise
        raise failure from (None if isinstance(failure, PeerError) else error)
    finally:
        teardown(trainer, run, failure)
    # A signal that came too late to stop the run asks the process to leave all the same.
    if run.stop.signalled or (run.stopped and run.stop.by_signal):
        raise Preempted(trainer.result)


def first_point(run: Run) -> int:
    """Where the run begins, as `stop.py` numbers it: with a boundary, if one is pending."""
    place = run.progress.place
    return behind_window(place) if run.progress.pending else behind_boundary(place)


def start(trainer: TrainerBase, run: Run) -> None:
    """From settings to the first window: checks, placement, loading, the printed plan.

    Args:
        trainer: whose run it is.
        run: just made.

    Raises:
        PacelineError: the run cannot start; nothing has been trained.
    """
    cleared = run.stop.clear_file()
    run.world.open()
    # At once: a rank that still left alone at a signal would leave the others behind.
    run.stop.watch(partial(error_context.whereabouts, trainer, run))
    if not run.stop.listen():
        run.plan.add("signals are ignored outside the main thread", "request_stop(...)")
    if cleared:
        trainer.say(f"removed {shown(trainer.run_dir)}/STOP, which was there before this start.")
    _check_one_folder(trainer, run)
    check_settings_alike(trainer, run)
    trainer.resume = resume.after_restart(trainer.resume, trainer.run_dir, run.world)
    check_engine(trainer)
    if trainer.deterministic:
        set_determinism(run)
    seed_everything(run.seed)
    configure(trainer, run)
    if trainer.metric_monitor is not None:
        trainer.metric_monitor.reset()
    described = describe_components(trainer, run)
    trainer.setup()
    complete_identity(trainer, run, described)
    run.events = Events(trainer, [*trainer.callbacks, *_default_callbacks(trainer)])
    _open_records(trainer, run)
    trainer.optimization = Optimization(run, trainer.recorder)
    if trainer.replica_groups is not None:
        trainer.replica_groups.attach(trainer.recorder, trainer.optimization.guard)
    _fix(trainer, run)
    for hook in run.events.on_setup:
        hook()
    add_own_identity(trainer, run)
    run.made_with = run.world.broadcast_object(settings_of_parts(trainer))
    run.made = Made.of(trainer.named_models(), trainer.named_optimizers())
    run.attributes = attributes_of(trainer)
    _load(trainer, run)
    if trainer.replica_groups is not None:
        trainer.replica_groups.hand_saver_over()
    _on_disk(trainer, partial(trainer.recorder.open, run.sinks_state))
    _describe(trainer, run)
    run.stop.open(first_point(run))
    run.trained = not run.is_over
    if run.trained:
        if trainer.resolved_recipe is None and trainer.replica_groups is None:
            _on_disk(trainer, partial(_keep_code, trainer, run))
        for hook in run.events.on_train_start:
            hook()
        run.placement.check_hooks(trainer.named_models())
        if run.saver is not None and trainer.checkpoint_policy is not None:
            prove(trainer, run)
            prove_first_step(trainer, run)
    run.stop.listen(begun=True)


def _check_one_folder(trainer: TrainerBase, run: Run) -> None:
    """Checks that all ranks write to the same folder.

    Raises:
        ConfigError: on every rank.
    """
    folders = run.world.all_gather_object(None if trainer.run_dir is None else str(trainer.run_dir))
    if len(set(folders)) > 1:
        said = ", ".join(f"{folder!r} on rank {i}" for i, folder in enumerate(folders[:4]))
        raise ConfigError(
            f"run_dir has to be the same on every rank, and is {said}: give one that depends on no "
            "clock, random number or rank."
        )


def _keep_code(trainer: TrainerBase, run: Run) -> None:
    """Keeps the user's code in the run folder; a recipe's is kept with the recipe."""
    files = {place_of(name, file): file for name, file in run.identity.code.files.items()}
    if trainer.run_dir is not None:
        keep(trainer.run_dir, run.global_step, files, None)


def set_determinism(run: Run) -> None:
    """Has torch use deterministic algorithms only, until the run's end.

    Args:
        run: that begins.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    def restore() -> None:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    run.cleanup.callback(restore)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def configure(trainer: TrainerBase, run: Run) -> None:
    """Makes the components and opens the data, of which `configure()` may ask how long a run is.

    Args:
        trainer: whose `configure` it is.
        run: that starts.

    Raises:
        ConfigError: `configure()` changes the data after it has asked.
    """
    opened_with: dict[str, Any] = {}

    def open_once() -> None:
        if not opened_with:
            check_data(trainer)
            check_data_alike(trainer, run)
            with random_state_kept():  # weights that are made next are the same, asked or not
                _open_data(trainer, run)
            opened_with.update({name: getattr(trainer, name) for name in READ_BY_OPENING})

    run.open_data = open_once
    trainer.configure()
    changed = [name for name, value in opened_with.items() if getattr(trainer, name) is not value]
    if changed:
        raise ConfigError(
            f"configure() assigns {' and '.join(changed)} after it has read training_horizon or "
            "train_batches, which opens the data: assign the data's settings first."
        )
    check_components(trainer)
    check_components_alike(trainer, run)
    run.open_data()
    run.fixed = frozenset(READ_BY_OPENING)


def _fix(trainer: TrainerBase, run: Run) -> None:
    """From here on, assigning what the run has read raises: it would have no effect."""
    trained = {
        name
        for name, model in vars(trainer).items()
        if isinstance(model, torch.nn.Module) and any(p.requires_grad for p in model.parameters())
    }
    steps = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    steppers = {name for name, value in vars(trainer).items() if isinstance(value, steps)}
    run.fixed = frozenset({*READ_ONCE, *EVENTS, *trained, *steppers})
    for name in ("callbacks", "loggers"):
        given = getattr(trainer, name)
        if isinstance(given, list):
            vars(trainer)[name] = FixedList(given)
            run.cleanup.callback(vars(trainer).update, {name: given})
    for name, given in list(vars(trainer).items()):
        held = given.values() if type(given) is dict else ()
        components = all(isinstance(one, (*steps, torch.nn.Module)) for one in held)
        if held and (name == "val_dataloader" or (components and name[0] != "_")):
            grows = all(isinstance(one, torch.nn.Module) for one in held)
            if not grows or any(p.requires_grad for one in held for p in one.parameters()):
                run.fixed |= {name}
            vars(trainer)[name] = FixedDict(name, given, grows=grows)
            run.cleanup.callback(_thaw, trainer, name, given)
    run.take_settings = partial(_take_settings, trainer)
    run.take_settings()


def _take_settings(trainer: TrainerBase) -> None:
    """Has the settings that may change within a run count from here on.

    Raises:
        ConfigError: one has an impossible value.
    """
    check_changed(trainer)
    trainer.recorder.every = trainer.log_every or trainer.recorder.default_every


def _thaw(trainer: TrainerBase, name: str, given: dict[str, Any]) -> None:
    """Leaves the user with the dictionary of before, and what was added to it."""
    held = vars(trainer).get(name)
    if isinstance(held, FixedDict):  # else the user has assigned another one
        given |= dict(held)
        vars(trainer)[name] = given


def _open_data(trainer: TrainerBase, run: Run) -> None:
    open_training_data(trainer, run, _global_batch_size(trainer, run))
    open_validation_data(trainer, run)


def _global_batch_size(trainer: TrainerBase, run: Run) -> int | None:
    """Samples an optimizer step, if they are set or a resumed run has them."""
    if trainer.global_batch_size is not None:
        return trainer.global_batch_size
    loader, accumulation = trainer.train_dataloader, trainer.gradient_accumulation_steps
    kept = resume.kept_global_batch_size(trainer.run_dir, trainer.resume, loader, accumulation)
    return run.world.broadcast_object(kept)


def open_training_data(trainer: TrainerBase, run: Run, global_batch_size: int | None) -> None:
    """Opens the training data.

    Args:
        trainer: which gets the source.
        run: that starts.
        global_batch_size: samples an optimizer step; None for as many as the ranks make.
    """
    seed, world, accumulation = run.seed, run.world, trainer.gradient_accumulation_steps
    size = WindowSize(accumulation, global_batch_size, trainer.epoch_length)
    with _speaking_of("train_dataloader"):
        loader, groups = trainer.train_dataloader, trainer.replica_groups
        run.stop.leaves_draws = is_custom(loader)
        if groups is None:
            trainer.source = open_training(loader, size, seed, world, StopBeforeWindow(run))
        else:
            trainer.source = groups.open_training(loader, size, seed, world)
    run.model_key = mix(stream(seed, "model"), world.part)
    for decision, setting in trainer.source.plan:
        run.plan.add(decision, setting, given=setting == "shuffle")  # as the loader says


def open_validation_data(trainer: TrainerBase, run: Run) -> None:
    """Opens the validation data, and says who counts the items of a batch.

    Args:
        trainer: which gets them, by name.
        run: that starts.
    """
    validation: dict[str | None, Validation] = {}
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        with _speaking_of("val_dataloader" if name is None else f"val_dataloader[{name!r}]"):
            validation[name] = open_validation(loader, run.seed, run.world, name)
    trainer.validation = validation
    if trainer.is_overridden("count_items"):
        run.count_items = trainer.count_items
    for data in validation.values():
        for decision, setting in data.plan:
            run.plan.add(decision, setting)


@contextmanager
def _speaking_of(what: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _default_callbacks(trainer: TrainerBase) -> list[Any]:
    progress = registry.lookup("callback", "progress")
    if not trainer.show_progress or any(isinstance(c, progress) for c in trainer.callbacks):
        return []
    return [progress()]


def _open_records(trainer: TrainerBase, run: Run) -> None:
    logged = trainer.recorder.train  # in configure()
    trainer.recorder = Recorder(run, with_local_rows(trainer.loggers, trainer.run_dir))
    trainer.recorder.train = logged
    # A row takes every rank, though only one may have a callback that looks at it.
    recorder = trainer.recorder
    every = rows_every(trainer.source.windows_per_epoch)  # of streams each rank knows its own
    everywhere = run.world.all_gather_object((recorder.wanted, recorder.writes, every))
    wanted, writes, intervals = zip(*everywhere, strict=True)
    recorder.wanted, recorder.writes = any(wanted), any(writes)
    recorder.default_every = min(intervals)
    if trainer.run_dir is None:
        run.plan.add("nothing is written: no checkpoints, rows stay in memory", "run_dir")
        return
    _on_disk(trainer, partial(_make_folder, trainer, run, trainer.run_dir))
    policy = trainer.checkpoint_policy
    if policy is None:  # a run that saves nothing may still resume from a checkpoint that is there
        written_by = recorded_engine(trainer.run_dir)
        policy = CheckpointPolicy(keep_last=None, engine=written_by or NATIVE)
    folder = trainer.run_dir / "checkpoints"
    run.saver = engine_class(policy.engine)(folder, policy, run.world)


def _on_disk(trainer: TrainerBase, work: Callable[[], None]) -> None:
    """Does on rank 0 what needs the run's folder; every rank raises its error.

    Raises:
        ConfigError: the folder cannot be used.
    """
    problem: str | None = None
    if trainer.world.is_main:
        try:
            work()
        except OSError as error:
            where = f"run_dir={str(trainer.run_dir)!r}"
            advice = "Is it a folder, with space and with the right to write?"
            problem = f"{where} cannot be written: {error}. {advice}"
        except UnreadableError as error:
            problem = str(error)
    problem = trainer.world.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def _make_folder(trainer: TrainerBase, run: Run, folder: Path) -> None:
    if trainer.resume.mode == "fresh":
        _move_aside(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.replica_groups is not None:
        return trainer.replica_groups.open_folder(folder)
    run.folder_lock.take(folder, trainer.say)
    run.record = RunRecord(folder)
    run.record.open()


def _move_aside(run: Run, folder: Path) -> None:
    if status(folder) is None:
        return
    count = 1
    while (aside := folder.with_name(f"{folder.name}.{count}")).exists():
        count += 1
    run.folder_lock.take(folder, run.world.say)
    folder.rename(aside)
    run.folder_lock.release()
    run.world.say(f"the earlier run was moved to {aside}.")


def _load(trainer: TrainerBase, run: Run) -> None:
    """Resumes from a checkpoint if there is one, else starts (from other weights, if asked)."""
    groups = trainer.replica_groups
    if groups is not None and not groups.writes:
        found = groups.newest()
    else:
        found = resume.find(run.saver, trainer.resume, trainer.run_dir)
    saving.report(run)
    kept = None if found is None else found.info.get("run_id")
    run.id = run.world.broadcast_object(kept or secrets.token_hex(8))
    if found is None:
        if trainer.resume.init_from is not None:
            path = Path(trainer.resume.init_from)
            load_weights(trainer.named_models(), path, run.world.say)
        return
    assert run.saver is not None
    tree = run.saver.load(found.path)
    try:
        trainer.load_state_dict(tree)
    except MismatchError as error:
        raise MismatchError(
            f"{error}\n{shown(found.path)} is of another model or optimizer. Put them back, or "
            "train in another folder (run_dir, run.dir): from the start, or from the weights that "
            f"fit (Resume(init_from=...), --init-from {shown(found.path)})."
        ) from error
    elsewhere = trainer.resume.path is not None and not run.saver.list()
    if trainer.resume.path is not None and not elsewhere:
        run.saver.abandon_after(found.save_id)
        saving.report(run)
    _extend(trainer, run)
    run.sinks_state = None if elsewhere else tree["rank"]  # rows before are in the other folder
    if not elsewhere:  # a stop before the first step need not save again what is there
        run.saved_at = (run.progress.global_step, list(run.progress.pending))
    run.plan.add(f"resumes from {found.path if elsewhere else found.path.name}", "resume")
    for hook in run.events.on_load_checkpoint:
        hook(tree)


def _extend(trainer: TrainerBase, run: Run) -> None:
    """Decides anew whether the run is over: its horizon or patience may have grown."""
    progress = run.progress
    reached = None
    if trainer.epochs is not None and progress.epoch >= trainer.epochs:
        reached = "epochs"
    elif trainer.max_steps is not None and progress.global_step >= trainer.max_steps:
        reached = None if progress.pending else "max_steps"  # the boundary's to say
    lasts = progress.ended_by not in (None, "epochs", "max_steps")  # `early_stop`, or a callback
    if not lasts or decisions.out_of_patience(trainer) is None:
        progress.ended_by = reached
    if progress.ended_by == PRUNED:
        run.lacks_end = run.world.broadcast_object(not run.record.was_complete)


def _describe(trainer: TrainerBase, run: Run) -> None:
    """The plan: what was decided, printed and kept in run.json."""
    plan = run.plan
    plan.add(f"computes on {run.device} in {run.placement.computes_in}", "precision")
    for decision, setting in run.placement.lines():
        plan.add(decision, setting)
    _add_decisions(trainer, run)
    if run.saver is not None and trainer.checkpoint_policy is not None and not run.is_over:
        run.saver.check_space(trainer.state_dict())
    _on_disk(trainer, run.start_record)
    if trainer.run_dir is not None:
        held = getattr(trainer, "tokenizer", None)
        _on_disk(trainer, partial(keep_pretrained, trainer.run_dir, trainer.named_models(), held))
    if run.is_over:
        more = _MORE.get(run.progress.ended_by or "", "change what ended it")
        trainer.say(
            f"the run in {shown(trainer.run_dir)} is complete ({run.progress.ended_by}): nothing "
            f"is left to train. To train on, {more}; for a new run, give another run_dir "
            "(run.name, run.dir) or resume='fresh' (--fresh)."
        )
    elif trainer.show_progress and run.world.is_main:
        plan.show()


_MORE = {
    "epochs": "raise epochs",
    "max_steps": "raise max_steps",
    EARLY_STOP: "raise early_stop",
    PRUNED: "start it without the callback that has pruned it",
}


def _add_decisions(trainer: TrainerBase, run: Run) -> None:
    """Adds the plan's lines beside those of data and placement."""
    add, horizon = run.plan.add, trainer.training_horizon
    end = "the data" if horizon is None else f"{horizon} optimizer steps"
    if getattr(trainer.source, "estimates", False):
        end += " (estimated: the sampler's passes differ in length)"
    add(f"ends after {end}", "epochs, max_steps")
    add(f"seed {run.seed}", "train(seed=...)")
    if trainer.has_validation:
        every = trainer.validate_every
        add(f"validates every {every}", "validate_every", given=every != "epoch")
    if trainer.max_val_batches is not None:
        add(_left_out(trainer), "validate_every")
    every = trainer.recorder.every
    rows = "each step" if every == 1 else f"every {every} steps"
    add(f"a row of metrics {rows}", "log_every", given=trainer.log_every is not None)
    policy = trainer.checkpoint_policy
    if policy is None:
        add("saves no checkpoint: a run that is stopped starts anew", "checkpoint")
    elif run.saver is not None:
        line = policy.in_words(monitored=trainer.metric_monitor is not None)
        add(line, "checkpoint", given=policy != CheckpointPolicy())
    optimizers = trainer.named_optimizers().values()
    fused = (getattr(each, "_step_supports_amp_scaling", False) for each in optimizers)
    if not run.on_cpu and not all(fused):
        add("an unfused optimizer waits for the device each step", "optimizer(fused=True)")


def _left_out(trainer: TrainerBase) -> str:
    """What `ValidationPolicy(max_batches=...)` leaves out of the validation data, counted."""
    most = trainer.max_val_batches
    assert most is not None
    whole, used = batches_in(trainer.validation), batches_in(trainer.validation, most)
    if whole is None or used is None:
        return f"validates on at most {counted(most, 'batch', 'es')} of each loader a rank"
    left = whole - used
    return f"validates on {used} of {counted(whole, 'batch', 'es')} a rank: {left} left out"


def end(trainer: TrainerBase, run: Run, why: str) -> None:
    """Training is over at the boundary at hand, whose checkpoint follows.

    Args:
        trainer: whose run it is.
        run: that ends.
        why: the reason.
    """
    run.progress.ended_by = why
    if why != PRUNED:  # which may go on: the checkpoint then has the open row, and `finish` ends it
        write_open_row(trainer, run)


def write_open_row(trainer: TrainerBase, run: Run) -> None:
    """Writes the row of what was logged since the last one, when training is over.

    Args:
        trainer: whose recorder writes it.
        run: that is over.
    """
    recorder = trainer.recorder
    trainer.optimization.guard.read()
    if recorder.wanted and any(run.world.all_gather_object(recorder.has_open_row)):
        recorder.write(recorder.row())


def finish(trainer: TrainerBase, run: Run) -> None:
    """Ends a run whose loop has ended in order.

    Args:
        trainer: whose run it is; gets its result.
        run: at its end.
    """
    trainer.source.close()
    if (failed := saving.wait_for_saves(run)) is not None:
        raise failed
    if run.progress.ended_by is not None and not run.stopped and run.trained:
        for hook in run.events.on_train_end:
            hook()
    if (run.progress.ended_by is not None and not run.stopped and run.trained) or run.lacks_end:
        write_open_row(trainer, run)
    trainer.recorder.ended = True
    trainer.result = _result(trainer, run)
    run.record.finish(
        _status(trainer.result),
        stopped_by=trainer.result.stopped_by,
        **_position(trainer, run),
    )
    run.stop.unwatch()
    if trainer.show_progress and (run.trained or run.stopped):
        _say_how_it_ended(trainer)


def _status(result: Result) -> str:
    if result.stopped_by == PRUNED:
        return PRUNED
    return "complete" if result.complete else "stopped"


def _say_how_it_ended(trainer: TrainerBase) -> None:
    result = trainer.result
    where = "" if trainer.run_dir is None else f" in {shown(trainer.run_dir)}"
    if not result.complete:
        saved = f"; saved{where}: the same call resumes from there" if result.checkpoint else where
        trainer.say(f"stopped at step {result.global_step} ({result.stopped_by}){saved}.")
        return
    measured = "".join(f", {name} {value:.4g}" for name, value in result.metrics.items())
    ended = _status(result)
    trainer.say(f"{ended} at step {result.global_step} ({result.stopped_by}{measured}){where}.")


def _result(trainer: TrainerBase, run: Run) -> Result:
    """What the run has come to."""
    progress, monitor = run.progress, trainer.metric_monitor
    newest = run.saver.list()[-1:] if run.saver is not None else []
    return Result(
        stopped_by=progress.ended_by or run.stop.reason or "train() left its loop",
        complete=progress.ended_by is not None,
        final_val_loss=progress.metrics.get("val/loss"),
        metrics=dict(progress.metrics),
        best=None if monitor is None else monitor.best_value,
        global_step=progress.global_step,
        epoch=progress.epoch,
        checkpoint=newest[0].path if newest else None,
        _rows=rows_of(trainer.recorder.sinks, trainer.run_dir),
    )


def fail(trainer: TrainerBase, run: Run, error: BaseException) -> BaseException:
    """Ends a run with an error, on every rank; what is on disk stays as it is.

    Args:
        trainer: whose run it is.
        run: that fails.
        error: why.

    Returns:
        The error to raise: a PeerError if it only comes of another rank's, or itself.
    """
    shown = run.stop.fail(error) or error_context.in_training(trainer, run, error)
    why = f"{type(shown).__name__}: {shown}"
    run.record.finish("failed", stopped_by=why, **_position(trainer, run))
    _call_each([partial(hook, shown) for hook in run.events.on_exception], shown)
    return shown


def _position(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """How far the run has come, for run.json."""
    progress, monitor = run.progress, trainer.metric_monitor
    return {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "metrics": dict(progress.metrics),
        "monitor": None if monitor is None else monitor.metric_name,
        "best": None if monitor is None else monitor.best_value,
    }


def teardown(trainer: TrainerBase, run: Run, failure: BaseException | None) -> None:
    """Closes everything, however the run ended.

    Args:
        trainer: whose run it was.
        run: that is over.
        failure: the error that ended it, if one did.
    """
    wait = partial(saving.wait_for_saves, run)  # what was being saved as the run failed
    steps: list[Callable[[], Any]] = [wait, *run.events.on_teardown]
    if run.saver is not None:
        steps.append(run.saver.close)
    status = "failed" if failure is not None else _status(trainer.result)
    steps.append(partial(trainer.recorder.close, status))
    opened = [getattr(trainer, "source", None), *trainer.validation.values()]
    steps += [data.close for data in opened if data is not None]
    steps += [run.stop.close, run.folder_lock.release, run.cleanup.close, run.world.close]
    _call_each(steps, failure)


def _call_each(steps: Iterable[Callable[[], Any]], failure: BaseException | None) -> None:
    """Calls all of them, even if some fail; the first error is raised, with notes on the others."""
    first = failure
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001  the others must have their turn
            if first is None:
                first = error
            else:
                first.add_note(f"then, as the run ended: {type(error).__name__}: {error}")
    if failure is None and first is not None:
        raise first
