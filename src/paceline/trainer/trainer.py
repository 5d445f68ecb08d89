"""Trainer: the loop. It reads from top to bottom in the order of the event table (`events.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch

from paceline.checkpoint import CheckpointPolicy
from paceline.checkpoint.export import Weights
from paceline.data.batches import inputs_and_targets, inputs_of
from paceline.data.source import Draw, Source, SourceFactory, StopCollecting
from paceline.errors import ConfigError
from paceline.log.sinks import made
from paceline.trainer import as_dataclass, decisions, lifecycle, saving
from paceline.trainer.base import TrainerBase, ending_its_run
from paceline.trainer.callback import Callback
from paceline.trainer.checks import check_settings
from paceline.trainer.elsewhere import infers, trains, unknown_keyword
from paceline.trainer.events import overrides
from paceline.trainer.inference import Wanted, averages, opened
from paceline.trainer.monitor import MetricMonitor
from paceline.trainer.prediction import Predictions
from paceline.trainer.replica_groups import groups_of
from paceline.trainer.result import Result
from paceline.trainer.run import Run
from paceline.trainer.settings import InEpochs, Resume, ValidationPolicy
from paceline.trainer.staged_step import StagedStep
from paceline.trainer.state_tree import gather_state, load_state
from paceline.trainer.stop import behind_boundary, behind_window
from paceline.trainer.validation import judge, measure, validate
from paceline.trainer.window import Window
from paceline.world.layout import Parallel

_EACH_EPOCH = CheckpointPolicy()


class Trainer(TrainerBase):
    """Trains models, exactly resumably, on one process or several.

    Give `model`, `optimizer` and `loss_fn` and it is complete: batches are `(inputs, targets)`, or
    mappings with "labels" or "targets".
    Or subclass it: override `loss`, or `training_step` and `validation_step`, or a whole segment
    (`train`, `epoch`, `step`, `evaluate`, `checkpoint`), and any hook of the event table.

    Args:
        model: a module, or modules by name.
        optimizer: an optimizer, or optimizers by name.
        lr_scheduler: a scheduler, or schedulers by name; each follows its own optimizer.
        loss_fn: `loss_fn(outputs, targets)` -> mean loss over the batch's items.
        train_dataloader: a DataLoader, any iterable of batches, or a source of your own
            (`paceline.Source`).
        val_dataloader: a DataLoader, any iterable of batches, or None for no validation. Several by
            name are validated on one after the other: for "near", what is logged as "val/x" is
            "val/near/x".
        epochs: passes of `epoch_length` micro-batches; None for no bound.
        max_steps: optimizer steps; None for no bound.
        epoch_length: micro-batches a rank sees in an epoch; None for the loader's own length.
        gradient_accumulation_steps: micro-batches in a window.
        global_batch_size: samples of all ranks in a window; the accumulation follows from it.
        lr_scheduler_interval: "step", "epoch", or "metric" (each validation's monitored metric).
        max_grad_norm: clip each optimizer's gradients to this 2-norm.
        precision: "fp32", or autocast to "bf16" or "fp16" (with loss scaling), or "fp8": bf16, with
            linear layers that multiply in float8 where the device can (extra `fp8`). Weights are
            kept as they were made; sharded ones are gathered in the lower precision.
        compile: compile models in place, or their repeated "blocks", as sharded ones always are.
        deterministic: use deterministic algorithms only.
        validate_every: "epoch", "5 epochs", a number of optimizer steps, or a `ValidationPolicy`.
        metric_monitor: which metric decides what is best.
        early_stop: end training after this many validations without a better metric.
        on_nonfinite: what a loss or gradient norm that is not finite leads to.
        checkpoint: when to save and what to keep; None for no checkpoints.
        parallel: the layout over processes.
        callbacks: behaviour to plug in.
        loggers: sinks for rows beside metrics.jsonl and timing.jsonl, or their registered names,
            such as "wandb"; only [] turns all rows off.
            Without a run_dir rows are kept in memory, for `Result.history`.
        progress: print the plan and show progress.
        log_every: optimizer steps between two rows; None for some ten rows an epoch, at least one
            every 50 steps.
        run_dir: the run's folder; None to write nothing.
        resume: "auto", "must", "never", "fresh", the path of a checkpoint, or a `Resume`.

    Raises:
        ConfigError: a setting is unknown or impossible.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.nn.Module] | None = None,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
        lr_scheduler: Any = None,
        loss_fn: Any = None,
        train_dataloader: Iterable[Any] | Source | SourceFactory | None = None,
        val_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        epochs: int | None = None,
        max_steps: int | None = None,
        epoch_length: int | None = None,
        gradient_accumulation_steps: int = 1,
        global_batch_size: int | None = None,
        lr_scheduler_interval: Literal["step", "epoch", "metric"] = "step",
        max_grad_norm: float | None = None,
        precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32",
        compile: bool | Literal["blocks"] = False,
        deterministic: bool = False,
        validate_every: Literal["epoch"] | int | InEpochs | ValidationPolicy = "epoch",
        metric_monitor: MetricMonitor | None = None,
        early_stop: int | None = None,
        on_nonfinite: Literal["raise", "stop", "skip", "rewind"] = "raise",
        checkpoint: CheckpointPolicy | None = _EACH_EPOCH,
        parallel: Parallel | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Any] | None = None,
        progress: bool = True,
        log_every: int | None = None,
        run_dir: str | Path | None = None,
        resume: str | Resume = "auto",
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_keyword(unknown, Trainer)
        super().__init__()
        self.parallel = parallel or Parallel()
        self.model = _own(model)
        self.optimizer = _own(optimizer)
        self.lr_scheduler = (
            dict(lr_scheduler) if isinstance(lr_scheduler, Mapping) else lr_scheduler
        )
        self.loss_fn = loss_fn
        self.train_dataloader = train_dataloader
        self.val_dataloader = val_dataloader
        self._epochs = epochs
        self.max_steps = max_steps
        self.epoch_length = epoch_length
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.global_batch_size = global_batch_size
        self.lr_scheduler_interval = lr_scheduler_interval
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        self.compile = compile
        self.deterministic = deterministic
        policy = validate_every
        policy = policy if isinstance(policy, ValidationPolicy) else ValidationPolicy(policy)
        self.validate_every, self.max_val_batches = policy.every, policy.max_batches
        self.metric_monitor = metric_monitor
        self.early_stop = early_stop
        self.on_nonfinite = on_nonfinite
        self.checkpoint_policy = checkpoint
        self.callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        self.loggers = made(loggers)
        self.show_progress = progress
        self.log_every = log_every
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.resume = resume if isinstance(resume, Resume) else Resume(str(resume))

    def __post_init__(self, *settings: Any) -> None:
        """Of a subclass that is a dataclass: takes the settings that its constructor was given."""
        if settings:
            Trainer.__init__(self, **as_dataclass.passed_on(self, _SETTINGS, settings))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        as_dataclass.prepare(cls)
        if "train" in vars(cls):
            cls.train = ending_its_run(cls.train)
        if "evaluate" in vars(cls):
            cls.evaluate = _loading_weights_first(cls.evaluate)

    # What a model's author writes

    def loss(self, batch: Any) -> torch.Tensor:
        """The mean loss over a batch's items.

        By default `loss_fn(model(inputs), targets)`, of pairs `(inputs, targets)` or of mappings:
        their "labels" or "targets" are the targets, and what else is in them the inputs, a
        dictionary.
        """
        pair = isinstance(batch, (list, tuple)) and len(batch) == 2  # which costs no call
        inputs, targets = batch if pair else inputs_and_targets(batch)
        return self.loss_fn(self.model(inputs), targets)  # pyright: ignore[reportCallIssue,reportOptionalCall]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The mean loss over a batch's items, or independent losses by optimizer name.

        Args:
            batch: as the loader yields it, on the device.
            batch_idx: its index in the epoch, on this rank.

        Returns:
            A tensor of one element; or a dictionary with it as "loss", the rest of which is logged
            as "train/NAME"; or, in a dictionary without "loss", several losses by optimizer name.
        """
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs what a validation measures; by default the loss, as "val/loss".

        Args:
            batch: as the loader yields it, on the device.
            batch_idx: its index in the validation, on this rank.
        """
        self.log("val/loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """A batch's outputs, by default the model's for its inputs.

        Args:
            batch: as the loader yields it, on the device.
            batch_idx: its index, on this rank.

        Returns:
            A tensor or an array of [samples, ...], a list of one entry a sample, or several of
            these by name.
        """
        return self.model(inputs_of(batch))  # pyright: ignore[reportCallIssue,reportOptionalCall]

    def get_val_metrics(self) -> dict[str, Any]:
        """A validation's metrics beyond those logged, from state of your own on this rank."""
        return {}

    # The loop

    @trains
    def train(
        self,
        train_dataloader: Iterable[Any] | Source | SourceFactory | None = None,
        val_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        epochs: int | None = None,
        *,
        seed: int | None = None,
    ) -> Result:
        """Trains to the end, from the run folder's newest checkpoint if there is one.

        Args:
            train_dataloader, val_dataloader, epochs: in place of the constructor's.
            seed: of every random stream of the run; unless given the recipe's, or 0.

        Returns:
            What came of it.

        Raises:
            Preempted: a signal stopped the run, which was saved (a SystemExit with code 75).
        """
        if train_dataloader is not None:
            self.train_dataloader = train_dataloader
        if val_dataloader is not None:
            self.val_dataloader = val_dataloader
        if epochs is not None:
            self._epochs = epochs
        with self.running(seed):
            while not self.is_over:
                before = self.progress.state_dict()
                self.epoch()
                if self.progress.state_dict() == before and not self.is_over:
                    raise ConfigError("epoch() took no step: it has to loop over epoch_windows().")
        return self.result

    @trains
    def fit(self, seed: int | None = None) -> Result:
        """The same as `train(seed=...)`."""
        with self.running(seed):
            self.train()
        return self.result

    def epoch(self) -> None:
        """Trains what is left of the present epoch."""
        for window in self.epoch_windows():
            self.step(window)

    def step(self, window: Window) -> None:
        """Takes one optimizer step on a window's micro-batches.

        One of your own loops over the window, calls `backward` and `optimizer_step`, and computes
        losses `with self.autocast`. Gradients that it leaves end with the window. An optimizer that
        evaluates the loss itself gets a closure from `optimizer_step`.
        """
        run = self._run
        if run is not None and run.placement.pipeline is not None:
            StagedStep(run, self.optimization, self.recorder, self.loss_fn, window).take()
        else:
            for batch, batch_idx in window:
                with self.autocast:
                    loss = self.training_step(batch, batch_idx)
                self.backward(loss)
        self.optimizer_step()

    def backward(self, loss: Any, only: str | Collection[str] | None = None) -> None:
        """Adds the gradients of a micro-batch's mean loss, weighted for the window's mean.

        Args:
            loss: the mean over the micro-batch's items, or what `training_step` may return.
            only: the optimizer, or several, whose parameters are to get gradients; all, unless
                given.
        """
        self.optimization.backward(loss, only)

    def optimizer_step(
        self, name: str | None = None, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Steps the named optimizer and its schedulers; without a name, every optimizer.

        Args:
            name: the optimizer's; None for every optimizer.
            closure: for an optimizer that evaluates the loss itself (LBFGS), on one process and one
                micro-batch a window: computes the loss, calls `backward` with it and returns it.
                Each evaluation is clipped and has to be finite; the first one is logged, and fires
                `on_before_optimizer_step`.

        Returns:
            The norm of the gradients before clipping, on the device; None unless something
            measures it (`max_grad_norm`, `check_gradients`, GradientMonitor). Of several
            optimizers, the last one's.
        """
        if closure is not None:
            return self.optimization.step_with(closure, name)
        norm = None
        for each in (name,) if name is not None else self.optimization.optimizers:
            norm = self.optimization.step(each)
        return norm

    def windows(self) -> Iterator[Window]:
        """Every window that is left of the run.

        A `train()` of your own keeps every promise with
        `for window in self.windows(): self.step(window)`: rows, validation, checkpoints, stopping
        and the epoch's end run each time the loop asks for the next window. To end early, call
        `request_stop`: breaking out of the loop discards the current window.
        """
        windows = self._all_windows()
        if self._run is None:
            self._own_loop = windows
        return windows

    def _all_windows(self) -> Generator[Window]:
        with self.running():
            while not self.is_over:
                yield from self.epoch_windows()

    def epoch_windows(self) -> Iterator[Window]:
        """Every window that is left of the present epoch, for an `epoch()` of your own."""
        run, progress, source = self._at_hand, self.progress, self.source
        epoch = progress.epoch
        source.start_epoch(epoch)
        if not progress.begun:
            progress.begun = True
            for hook in run.events.on_train_epoch_start:
                hook()
        while not run.is_over and progress.epoch == epoch:
            try:
                draw = source.draw()
            except StopCollecting:  # on every rank: the run stops before this window
                return self._leave(pending=[])
            if draw is None:
                return self._pass_over_epoch(run) if getattr(source, "is_empty", False) else None
            window = self.open_window(draw)
            if progress.global_step not in progress.skips:
                yield window
            if self.replica_groups is not None and not self.replica_groups.committed:
                continue  # it did not count, and is drawn once more
            self._close_window(run, window)
            if run.rewinding:
                saving.rewind(self, run, partial(self._boundary, run))
                return

    def open_window(self, draw: Draw) -> Window:
        """Makes a window the one at hand.

        Args:
            draw: its micro-batches, from the training data.
        """
        window = Window(self._at_hand, draw, self.progress.batch)
        vars(self)["window"] = window  # each step; assigning it would ask what may be assigned
        self.optimization.begin(window)
        return window

    def _close_window(self, run: Run, window: Window) -> None:
        """Counts a window that is done, and runs the boundary after it."""
        progress = self.progress
        self.optimization.end_window()
        progress.global_step += 1
        progress.batch += len(window)
        progress.samples += window.samples
        progress.items += window.items
        row: dict[str, Any] = {}
        if progress.global_step % self.recorder.every == 0:
            self.optimization.guard.read()
            row = self.recorder.row() if self.recorder.wanted else {}
        for hook in run.events.on_step_end:
            hook(row)
        if row:
            self.recorder.write(row)
        if run.saves_in_flight:
            saving.report(run)
        if run.rewinding:
            return
        # Each step, so without a call of `progress.place`.
        if run.stop.reached(behind_window(progress.global_step + progress.empty_epochs)):
            self._leave(pending=["boundary"])
        else:
            self._boundary(run)

    def _pass_over_epoch(self, run: Run) -> None:
        """Ends an epoch for which a source of the user's own has collected nothing."""
        self.progress.empty_epochs += 1
        if run.stop.reached(behind_window(self.progress.place)):
            self._leave(pending=["boundary"])
        else:
            self._boundary(run)

    # Between two windows

    def _boundary(self, run: Run) -> None:
        """Validation, the epoch's end, one checkpoint: each part if due, in this order."""
        progress = self.progress
        step, progress.pending = progress.global_step, []
        by_step = isinstance(self.validate_every, int) and step % self.validate_every == 0
        saves = decisions.save_reasons(self, run)
        last = self.source.at_end(keep=by_step or bool(saves) or step == self.max_steps)
        ending = decisions.ending(self, run, epoch_ends=last)
        if not (by_step or saves or last or ending):
            return
        run.stop.hold(behind_boundary(progress.place))
        progress.epoch_ends = last
        improved = kept = False
        validates = by_step or bool(ending) or (last and decisions.validates(self, run))
        if validates and progress.validated_at != step and self.has_validation:
            metrics = self._measure(run)
            if metrics is None:
                return self._leave(pending=["validation"])
            improved = judge(self, run, metrics)
            kept = improved or decisions.worth_keeping(self, run)
        if last:
            self._end_epoch()
        if ending := ending or decisions.out_of_patience(self):
            lifecycle.end(self, run, ending)
        reasons = decisions.save_reasons(self, run, epoch_ended=last, improved=kept)
        if reasons or progress.ended_by:
            self._save(reasons + (["end"] if progress.ended_by else []), best=improved)
        if not run.is_over and run.stop.reached(behind_boundary(progress.place)):
            self._leave(pending=[])

    def _measure(self, run: Run) -> dict[str, float] | None:
        """Validates; if that fails, the state before it is saved, and a resumed run repeats it."""
        try:
            return measure(self, run)
        except Exception as error:
            if run.world.size == 1:  # other ranks may wait for this one elsewhere
                self.progress.pending = ["validation"]
                try:
                    self._save(["the validation failed"])
                except Exception as more:  # noqa: BLE001  the first error is the one to show
                    error.add_note(f"then, as its state was saved: {type(more).__name__}: {more}")
            raise

    @infers
    def evaluate(
        self,
        loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        *,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
    ) -> dict[str, float] | None:
        """Validates: each sample of every validation loader once over all ranks.

        Outside a run it places the models and loads weights first; the run's folder is only read.
        Afterwards the models have these weights, and all else is as before: `result`, the counters,
        the run's folder, what `paceline export` reads. An `on_metrics` of the Trainer's own is
        called with the metrics, those of callbacks are not. The next `evaluate()` or `predict()`
        without a checkpoint has the run's latest again, as has a `train()` that resumes it.

        One of your own takes no arguments. It is called on every rank when a validation is due,
        also without a `val_dataloader`. There models are in eval mode and gradients off, random
        numbers depend on seed, step and rank alone, and `log` gives means over all ranks. Modes and
        training's random numbers are as before afterwards. `super().evaluate()` validates on the
        loaders. Outside a run these arguments choose weights and data; your method is called
        without any.

        Args:
            loader: in place of `val_dataloader`; outside a run.
            checkpoint: "latest", "best" or the name of one in `run_dir`, or the path of a
                checkpoint or of another run's folder; None for the latest if there is one, else the
                weights at hand. Outside a run.
            weights: "auto" for the weights that the run validated with, averaged ones if a
                callback swapped them in; "live" for the trained, "averaged" for the
                averaged ones. Outside a run.

        Returns:
            The metrics, equal on every rank; of an `evaluate()` of your own, rank 0's. None if the
            run is to stop (`stopping()`) and this was abandoned: the resumed run validates.

        Raises:
            ConfigError: there is nothing to validate with, or no such checkpoint.
            CheckpointError: the checkpoint is damaged, or has no averaged weights.
            MismatchError: the checkpoint is of other models.
        """
        if self._run is None:
            return Trainer._evaluate_aside(self, loader, checkpoint=checkpoint, weights=weights)
        if Wanted(loader, checkpoint, weights) != Wanted():
            raise ConfigError(
                "evaluate() within a run takes no arguments: it validates on val_dataloader, with "
                "the weights at hand."
            )
        return validate(self, self._run)

    def _evaluate_aside(
        self,
        loader: Any = None,
        *,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
    ) -> dict[str, float]:
        with self._inference(Wanted(loader, checkpoint, weights)) as run:
            if not (self.validation or self.is_overridden("evaluate")):
                raise ConfigError(
                    "there is nothing to validate with: give evaluate() a loader, or the trainer a "
                    "val_dataloader."
                )
            metrics = measure(self, run) or {}
            if self.is_overridden("on_metrics"):
                self.on_metrics(metrics)  # which may add to them, as in training
            return metrics

    @contextmanager
    def _inference(self, wanted: Wanted) -> Iterator[Run]:
        """A run that does not train, with models placed and loaded, and data open."""
        run: Run | None = None
        try:
            with self._run_aside() as run, opened(self, run, wanted, not self._configured):
                self._configured = True
                yield run
        finally:
            if run is not None and run.loaded is not None:
                own = self._ended is not None and run.loaded == self.result.checkpoint
                self._lent = None if own and not averages(self, wanted) else run.loaded

    @infers
    def predict(
        self,
        loader: Iterable[Any] | None = None,
        *,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
    ) -> Any:
        """The outputs of `predict_step` for every sample, in the loader's order.

        As `evaluate` outside a run, it places the models and loads weights first. Of a loader that
        is iterated (a stream) each rank reads its own share; their batches take turns.

        Args:
            loader: what to predict; `val_dataloader` unless given.
            checkpoint, weights: as for `evaluate`.

        Returns:
            On every rank, what `predict_step` returns, for all samples: a tensor of [samples, ...]
            on the CPU, a list, or several of these by name.

        Raises:
            ConfigError: there is nothing to predict, or no such checkpoint; the loader shuffles; or
                it is called within a run.
            DataError: `predict_step` does not return one output a sample, or with
                `parallel.context` one for each of its positions.
            CheckpointError: the checkpoint is damaged, or has no averaged weights.
            MismatchError: the checkpoint is of other models.
        """
        with self.predicting(loader, checkpoint=checkpoint, weights=weights) as predictions:
            return predictions.together()

    @infers
    @contextmanager
    def predicting(
        self,
        loader: Iterable[Any] | None = None,
        *,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
    ) -> Iterator[Predictions]:
        """As `predict`, batch by batch: a context with an iterable of outputs, in order.

        Args:
            loader, checkpoint, weights: as for `predict`.

        Raises:
            ConfigError, DataError, CheckpointError, MismatchError: as for `predict`; what is wrong
                with a batch is raised as it is iterated.
        """
        if self._run is not None:
            raise ConfigError(
                "predict() works outside a run; within one, call the model in a hook of yours."
            )
        with self._inference(Wanted(loader, checkpoint, weights)) as run:
            yield Predictions(self, run)

    def _end_epoch(self) -> None:
        self.optimization.step_schedulers("epoch")
        for hook in self._at_hand.events.on_train_epoch_end:
            hook()
        self.recorder.end_epoch()
        self.progress.epoch += 1
        self.progress.begun, self.progress.epoch_ends, self.progress.batch = False, False, 0

    def checkpoint(self, reasons: Sequence[str] = ("asked for",), *, best: bool = False) -> None:
        """Saves all state at this boundary or, if called within a window, at the next one.

        If there are several ranks, all of them have to call it in the same window.

        Args:
            reasons: recorded in the manifest; with "stop" or "end", which end a run, the call
                returns only when the checkpoint is on the disk.
            best: whether it is the best checkpoint so far.
        """
        run = self._at_hand
        if run.saver is None or self.checkpoint_policy is None:
            return
        if run.settled:
            saving.save(self, run, list(reasons), best=best)
        else:
            run.asked_saves += reasons

    def _save(self, reasons: list[str], *, best: bool = False) -> None:
        run = self._at_hand
        run.settled, run.asked_saves = True, []
        self.checkpoint(reasons, best=best)
        run.settled = False

    def _leave(self, pending: list[str]) -> None:
        """Stops here, at the agreed boundary, with a checkpoint that says what is left to do."""
        self.progress.pending = pending
        self._save(["stop"])
        self.source.close()
        self._at_hand.stopped = True

    # The run around the loop

    @contextmanager
    def running(self, seed: int | None = None) -> Iterator[None]:
        """The life of a run around its loop; inside a run that is open already, nothing.

        Args:
            seed: of every random stream of the run; unless given the recipe's, or 0.

        Raises:
            Preempted: a signal stopped the run, which was saved (a SystemExit with code 75).
        """
        if self._run is not None:
            yield
            return
        check_settings(self)
        run = self._open_run(seed)
        boundary = partial(self._boundary, run)
        groups = groups_of(run, self, leave=self._leave, boundary=boundary)
        run.groups = self.replica_groups = groups
        try:
            with lifecycle.running(self, run):
                self._enter(run)
                yield
        finally:
            self._drop_run()

    def _enter(self, run: Run) -> None:
        """What is due before the first window: a stop, a pending boundary, a first checkpoint."""
        if run.is_over:
            return
        if run.stop.reached(lifecycle.first_point(run)):
            self._leave(self.progress.pending)
        elif self.progress.pending:
            self._boundary(run)
        elif self.on_nonfinite == "rewind" and run.sinks_state is None:
            self._save(["start"])  # there has to be one to go back to

    def is_overridden(self, name: str) -> bool:
        """Whether a method of the Trainer's is overridden, on the class or on the instance."""
        return overrides(self, name, Trainer)

    def configure(self) -> None:
        """Makes components; override it to assign models, optimizers and schedulers here."""

    def setup(self) -> None:
        """Places the components: device, compilation, replicas."""
        self._place_models()

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as one tree (`checkpoint/state.py` lists it).

        After a run it is that of its end, as long as no evaluation has loaded other weights.

        Raises:
            ConfigError: one has, or there has been no run.
        """
        if self._run is None and self._ended is not None and self._lent is not None:
            raise ConfigError(
                "state_dict(): the models have the weights that an evaluation has loaded from "
                f"{self._lent}, and the rest is as the run left it. Ask before, or evaluate() anew."
            )
        return gather_state(self, self._run or self._ended or self._at_hand)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, within a run."""
        load_state(self, self._at_hand, state_dict)


def _loading_weights_first(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an `evaluate()` of the user's own: outside a run, weights are loaded before it.

    The arguments choose the weights; the user's method gets none.
    """

    @wraps(evaluate)
    def wrapped(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:
            return evaluate(self, *args, **kwargs)
        return self._evaluate_aside(*args, **kwargs)

    return wrapped


_SETTINGS = tuple(inspect.signature(Trainer).parameters)[:-1]
as_dataclass.settings_as_fields(Trainer, _SETTINGS)


def _own(components: Any) -> Any:
    """A dictionary of the trainer's own, since placing replaces its values."""
    return dict(components) if isinstance(components, Mapping) else components
