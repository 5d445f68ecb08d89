"""A run's beginning and end: everything around the loop, in the order in which it happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paceline import registry
from paceline.checkpoint import CheckpointPolicy, Checkpoints
from paceline.data.loader import WindowSize, open_training, open_validation
from paceline.errors import ConfigError, DataError, Preempted
from paceline.log.lock import FolderLock
from paceline.log.provenance import RunRecord
from paceline.trainer import blame, decisions, placement, resume, saving
from paceline.trainer.base import Autocast
from paceline.trainer.checks import check_components, check_settings
from paceline.trainer.compilation import memory_budget
from paceline.trainer.events import Events
from paceline.trainer.float8 import float8_layers
from paceline.trainer.optimization import Optimization
from paceline.trainer.progress import Progress
from paceline.trainer.recorder import Recorder
from paceline.trainer.replica_groups import groups_of
from paceline.trainer.result import Result
from paceline.trainer.stop import StopAgreement
from paceline.world.context import Sequences
from paceline.world.seeding import mix, seed_everything, stream

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


@contextmanager
def running(trainer: Trainer, seed: int | None) -> Iterator[None]:
    """The life of a run around its loop; inside a run that is open already, nothing.

    Raises:
        Preempted: a signal stopped the run, which was saved.
    """
    if trainer._open:
        yield
        return
    check_settings(trainer)
    _reset(trainer, trainer._asked_seed if seed is None else seed)
    trainer._open, failure = True, None
    try:
        start(trainer)
        if trainer.is_over:
            pass
        elif trainer.stop_agreement.reached(_first_point(trainer)):
            trainer._leave(trainer.progress.pending)
        elif trainer.progress.pending:
            trainer._boundary()
        elif trainer.on_nonfinite == "rewind" and trainer._sinks_state is None:
            trainer._save(["start"])  # there has to be one to go back to
        yield
        finish(trainer)
    except GeneratorExit:  # a train() of the user's own has left its loop
        finish(trainer)
        raise
    except BaseException as error:
        failure = fail(trainer, error)
        if failure is error:
            raise
        raise failure from error
    finally:
        trainer._open = False
        teardown(trainer, failure)
    stop = trainer.stop_agreement
    # A signal that came too late to stop the run asks the process to leave all the same.
    if stop.signalled or (trainer._stopped and stop.by_signal):
        raise Preempted(trainer.result)


def _first_point(trainer: Trainer) -> int:
    """Where the run begins, as `stop.py` numbers it: with a boundary, if one is pending."""
    return 2 * trainer.global_step + (not trainer.progress.pending)


def start(trainer: Trainer) -> None:
    """From settings to the first window: checks, placement, loading, the printed plan.

    Raises:
        PacelineError: what stands in the way, before anything is trained.
    """
    trainer.world.open()
    trainer.resume = resume.after_restart(trainer)
    if trainer.stop_agreement.clear_file():
        trainer.say(f"removed {trainer.run_dir}/STOP, which was there before this start.")
    trainer.stop_agreement.watch(partial(blame.whereabouts, trainer))
    if not trainer.stop_agreement.listen():
        trainer.plan.add("signals are not heard outside of the main thread", "request_stop(...)")
    _set_determinism(trainer)
    seed_everything(trainer.seed)
    trainer.configure()
    check_components(trainer)
    if trainer.metric_monitor is not None:
        trainer.metric_monitor.reset()
    _open_data(trainer)
    trainer.setup()
    trainer.optimization = Optimization(trainer)
    trainer.identity = resume.identity(trainer)
    trainer.events = Events(trainer, [*trainer.callbacks, *_default_callbacks(trainer)])
    _open_records(trainer)
    for hook in trainer.events.on_setup:
        hook()
    _load(trainer)
    if trainer.replica_groups is not None:
        trainer.replica_groups.settle()
    _on_disk(trainer, _open_sinks)
    _describe(trainer)
    trainer.stop_agreement.open(_first_point(trainer))
    trainer._trained = not trainer.is_over
    if trainer._trained:
        for hook in trainer.events.on_train_start:
            hook()


def _reset(trainer: Trainer, seed: int | None) -> None:
    """The parts of a run, so that teardown finds each whatever fails in between."""
    trainer.seed = 0 if seed is None else seed
    trainer.plan = type(trainer.plan)()
    trainer.progress = Progress()
    trainer.result = Result(stopped_by="nothing yet", complete=False)
    trainer._asked_saves, trainer._settled = [], False
    trainer._stopped = trainer._rewinding = trainer._validating = trainer.muted = False
    trainer._saved_at = None
    trainer._restore_determinism = None
    trainer.validation = trainer.saver = None
    trainer.replicas, trainer.validation_calls, trainer.pipeline = [], [], None
    trainer.recomputed, trainer.compiled, trainer.while_placed = [], [], ExitStack()
    trainer.float8 = None
    trainer.replica_groups = groups_of(trainer)
    trainer.local_batches = 0
    trainer.on_cpu = trainer.device.type == "cpu"
    trainer.events = Events(trainer, ())
    trainer.record = RunRecord(None)
    trainer.folder_lock = FolderLock()
    trainer.recorder = Recorder(trainer, [])
    stop_file = None if trainer.run_dir is None else trainer.run_dir / "STOP"
    trainer.stop_agreement = StopAgreement(trainer.world, stop_file)


def _set_determinism(trainer: Trainer) -> None:
    if not trainer.deterministic:
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    def restore() -> None:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)

    trainer._restore_determinism = restore
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _open_data(trainer: Trainer) -> None:
    seed, world, accumulation = trainer.seed, trainer.world, trainer.gradient_accumulation_steps
    global_batch_size = trainer.global_batch_size
    if global_batch_size is None:
        global_batch_size = world.broadcast_object(
            resume.kept_global_batch_size(
                trainer.run_dir, trainer.resume, trainer.train_dataloader, accumulation
            )
        )
    size = WindowSize(accumulation, global_batch_size, trainer.epoch_length)
    with _speaking_of("train_dataloader"):
        groups = trainer.replica_groups
        opened_by = open_training if groups is None else groups.open_training
        trainer.source = opened_by(trainer.train_dataloader, size, seed, world)
    if trainer.val_dataloader is not None:
        with _speaking_of("val_dataloader"):
            trainer.validation = open_validation(trainer.val_dataloader, seed, world)
    trainer.counts_items = trainer.is_overridden("count_items")
    trainer.model_key = mix(stream(trainer.seed, "model"), trainer.world.part)
    validation = [] if trainer.validation is None else trainer.validation.plan
    for decision, setting in trainer.source.plan + validation:
        trainer.plan.add(decision, setting)


@contextmanager
def _speaking_of(what: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def place(trainer: Trainer) -> None:
    """Modules to the device, compiled and spread over the ranks as the settings say."""
    budget = trainer.parallel.activation_checkpointing
    if isinstance(budget, float):
        trainer.while_placed.enter_context(memory_budget(budget))
        trainer.plan.add(
            f"keeps {budget:.0%} of the activations that it would, and computes the rest twice",
            "parallel.activation_checkpointing",
        )
    trainer.float8 = float8_layers(trainer)
    placement.place(trainer)
    if (dtype := trainer.autocast_dtype) is not None:
        trainer.autocast = Autocast(trainer.device.type, dtype)
    if (mesh := trainer.world.context_mesh) is not None:
        trainer.autocast = Sequences(
            mesh,
            trainer.autocast,
            ring=trainer.parallel.rings,
            in_stages=trainer.pipeline is not None,
        )
    for model in trainer.named_models().values():
        model.train()


def _default_callbacks(trainer: Trainer) -> list[Any]:
    progress = registry.lookup("callback", "progress")
    if not trainer.show_progress or any(isinstance(c, progress) for c in trainer.callbacks):
        return []
    return [progress()]


def _open_records(trainer: Trainer) -> None:
    sinks = trainer.loggers
    if sinks is None:
        sinks = [registry.lookup("logger", "jsonl")()] if trainer.run_dir is not None else []
    trainer.recorder = Recorder(trainer, list(sinks))
    # A row takes every rank, though only one may have a callback that looks at it.
    wanted = trainer.world.all_gather_object(trainer.recorder.wanted)
    trainer.recorder.wanted = any(wanted)
    if trainer.run_dir is None:
        trainer.plan.add("nothing is written: no rows, no checkpoints", "run_dir")
        return
    _on_disk(trainer, _make_folder)
    # A run that saves nothing may still go on from a checkpoint that is there.
    policy = trainer.checkpoint_policy or CheckpointPolicy(keep_last=None)
    trainer.saver = Checkpoints(trainer.run_dir / "checkpoints", policy, trainer.world)


def _on_disk(trainer: Trainer, work: Callable[[Trainer], None]) -> None:
    """Does on rank 0 what needs the run's folder; every rank hears of an error.

    Raises:
        ConfigError: the folder cannot be used.
    """
    problem: str | None = None
    if trainer.world.is_main:
        try:
            work(trainer)
        except OSError as error:
            problem = f"run_dir={str(trainer.run_dir)!r} cannot be written: {error}"
    problem = trainer.world.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(f"{problem}. Is it a folder, with space and with the right to write?")


def _make_folder(trainer: Trainer) -> None:
    assert trainer.run_dir is not None
    if trainer.resume.mode == "fresh":
        _move_aside(trainer)
    trainer.run_dir.mkdir(parents=True, exist_ok=True)
    if trainer.replica_groups is not None:
        return trainer.replica_groups.open_folder()
    trainer.folder_lock.take(trainer.run_dir, trainer.say)
    trainer.record = RunRecord(trainer.run_dir)


def _move_aside(trainer: Trainer) -> None:
    folder = trainer.run_dir
    assert folder is not None
    if not folder.exists():
        return
    count = 1
    while (aside := folder.with_name(f"{folder.name}.{count}")).exists():
        count += 1
    trainer.folder_lock.take(folder, trainer.say)
    folder.rename(aside)
    trainer.folder_lock.release()
    trainer.say(f"the earlier run was moved to {aside}.")


def _load(trainer: Trainer) -> None:
    """Goes on from a checkpoint if there is one, else starts (from other weights, if asked)."""
    found = resume.find(trainer)
    saving.tell(trainer)
    trainer._sinks_state = None
    if found is None:
        if trainer.resume.init_from is not None:
            resume.load_weights(trainer, Path(trainer.resume.init_from))
        return
    assert trainer.saver is not None
    tree = trainer.saver.load(found.path)
    trainer.load_state_dict(tree)
    if trainer.resume.path is not None:
        trainer.saver.abandon_after(found.save_id)
        saving.tell(trainer)
    _extend(trainer)
    trainer._sinks_state = tree["rank"]
    trainer.plan.add(f"goes on from {found.path.name}", "resume")
    for hook in trainer.events.on_load_checkpoint:
        hook(tree)


def _extend(trainer: Trainer) -> None:
    """Whether the run is over is a matter of the horizon and patience it has now."""
    progress = trainer.progress
    reached = None
    if trainer.epochs is not None and progress.epoch >= trainer.epochs:
        reached = "epochs"
    elif trainer.max_steps is not None and progress.global_step >= trainer.max_steps:
        reached = None if progress.pending else "max_steps"  # the boundary's to say
    patient = progress.ended_by == "early stop" and not decisions.out_of_patience(trainer)
    if patient or progress.ended_by in (None, "epochs", "max_steps"):
        progress.ended_by = reached


def _open_sinks(trainer: Trainer) -> None:
    state = trainer._sinks_state
    for sink in trainer.recorder.sinks:
        sink.open(trainer.run_dir, trainer.identity, fresh=state is None)
    if state is not None:
        trainer.recorder.load_sinks(state)


def _describe(trainer: Trainer) -> None:
    """The plan: what was decided, printed and kept in run.json."""
    plan, horizon = trainer.plan, trainer.training_horizon
    plan.add(f"computes on {trainer.device} in {trainer.computes_in}", "precision")
    if trainer.float8 is not None:
        plan.add(str(trainer.float8), "precision")
    if trainer.world.size > 1:
        plan.add(placement.layout(trainer.world), "parallel")
    if trainer.parallel.calls_together and (dtype := trainer.autocast_dtype):
        kind = str(dtype).removeprefix("torch.")
        plan.add(f"gathers weights in {kind}, sums their gradients in float32", "precision")
    if trainer.parallel.cpu_offload:
        plan.add("keeps weights in host memory, and steps there", "parallel.cpu_offload")
    if trainer.compiled:
        line = f"compiles {len(trainer.compiled)} blocks one by one"
        beside = ", but for their experts" * (trainer.parallel.expert > 1)
        plan.add(line + beside, "compile")
    if trainer.recomputed:
        blocks = f"{len(trainer.recomputed)} blocks compute their forward pass twice"
        plan.add(blocks, "parallel.activation_checkpointing")
    plan.add(
        f"ends after {'the data' if horizon is None else f'{horizon} optimizer steps'}",
        "epochs, max_steps",
    )
    plan.add(f"seed {trainer.seed}", "train(seed=...)")
    if trainer.val_dataloader is not None:
        plan.add(f"validates every {trainer.validate_every}", "validate_every")
    if trainer.checkpoint_policy is None:
        plan.add("saves no checkpoint: a run that is stopped starts anew", "checkpoint")
    elif trainer.saver is not None:
        plan.add(f"saves by {trainer.checkpoint_policy}", "checkpoint")
    if not trainer.on_cpu and not all(
        getattr(o, "_step_supports_amp_scaling", False) for o in trainer.named_optimizers().values()
    ):
        plan.add("an unfused optimizer waits for the device each step", "optimizer(fused=True)")
    if trainer.saver is not None and trainer.checkpoint_policy is not None and not trainer.is_over:
        trainer.saver.check_space(trainer.state_dict())
    _on_disk(trainer, _start_record)
    if trainer.is_over:
        trainer.say(f"the run in {trainer.run_dir} is complete ({trainer.progress.ended_by}).")
    elif trainer.show_progress and trainer.world.is_main:
        plan.show()


def _start_record(trainer: Trainer) -> None:
    plan = trainer.plan.as_list()
    trainer.record.start(seed=trainer.seed, plan=plan, world_size=trainer.world.size)


def write_open_row(trainer: Trainer) -> None:
    """The row of the steps since the last one, when training is over."""
    recorder = trainer.recorder
    trainer.optimization.guard.read()
    if recorder.wanted and any(trainer.world.all_gather_object(bool(recorder.train.sums()))):
        recorder.write(recorder.row())


def finish(trainer: Trainer) -> None:
    """The loop has ended in order."""
    trainer.source.close()
    if trainer.progress.ended_by is not None and not trainer._stopped and trainer._trained:
        for hook in trainer.events.on_train_end:
            hook()
    if trainer.saver is not None:
        failed = trainer.saver.wait()
        saving.tell(trainer)
        if failed is not None:
            raise failed
    trainer.result = result(trainer)
    trainer.record.finish(
        _status(trainer.result),
        stopped_by=trainer.result.stopped_by,
        **_reached(trainer),
    )
    trainer.stop_agreement.unwatch()
    if trainer.show_progress and (trainer._trained or trainer._stopped):
        _say_how_it_ended(trainer)


def _status(result: Result) -> str:
    return "complete" if result.complete else "stopped"


def _say_how_it_ended(trainer: Trainer) -> None:
    result, where = trainer.result, "" if trainer.run_dir is None else f" in {trainer.run_dir}"
    if not result.complete:
        saved = f"; saved{where}: the same again goes on from there" if result.checkpoint else where
        trainer.say(f"stopped at step {result.global_step} ({result.stopped_by}){saved}.")
        return
    measured = "".join(f", {name} {value:.4g}" for name, value in result.metrics.items())
    trainer.say(f"complete at step {result.global_step} ({result.stopped_by}{measured}){where}.")


def result(trainer: Trainer) -> Result:
    """What the run has come to."""
    progress, monitor = trainer.progress, trainer.metric_monitor
    newest = trainer.saver.list()[-1:] if trainer.saver is not None else []
    return Result(
        stopped_by=progress.ended_by or trainer.stop_agreement.reason or "train() left its loop",
        complete=progress.ended_by is not None,
        final_val_loss=progress.metrics.get("val/loss"),
        metrics=dict(progress.metrics),
        best=None if monitor is None else monitor.best_value,
        global_step=progress.global_step,
        epoch=progress.epoch,
        checkpoint=newest[0].path if newest else None,
    )


def fail(trainer: Trainer, error: BaseException) -> BaseException:
    """The run ends with an error: everybody is told, and what is durable stays as it is.

    Returns:
        The error to raise: a PeerError if it only comes of another rank's, a DataError if the
        first batch is what it comes of, or itself.
    """
    shown = trainer.stop_agreement.fail(error) or blame.in_training(trainer, error)
    why = f"{type(shown).__name__}: {shown}"
    trainer.record.finish("failed", stopped_by=why, **_reached(trainer))
    _call_each([partial(hook, shown) for hook in trainer.events.on_exception], shown)
    return shown


def _reached(trainer: Trainer) -> dict[str, Any]:
    """How far the run has come, for run.json."""
    progress, monitor = trainer.progress, trainer.metric_monitor
    return {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "metrics": dict(progress.metrics),
        "monitor": None if monitor is None else monitor.metric_name,
        "best": None if monitor is None else monitor.best_value,
    }


def teardown(trainer: Trainer, failure: BaseException | None) -> None:
    """Leaves nothing behind, however the run ended."""
    steps: list[Callable[[], Any]] = [*trainer.events.on_teardown]
    if trainer.saver is not None:
        steps.append(trainer.saver.close)
    status = "failed" if failure is not None else _status(trainer.result)
    steps.append(partial(trainer.recorder.close, status))
    opened = getattr(trainer, "source", None), trainer.validation
    steps += [data.close for data in opened if data is not None]
    steps += [trainer.stop_agreement.close, trainer.folder_lock.release]
    steps.append(partial(placement.take_back, trainer))
    if trainer._restore_determinism is not None:
        steps.append(trainer._restore_determinism)
    _call_each([*steps, trainer.world.close], failure)


def _call_each(steps: Iterable[Callable[[], Any]], failure: BaseException | None) -> None:
    """Calls all of them, even if some fail; the first error counts, and tells of the others."""
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
