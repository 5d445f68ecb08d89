"""Evaluating and predicting outside a run: the trainer's models and data, and no training.

The models are placed as for training, so that sharded ones work as well, and weights are loaded
into them first. Nothing is written: no row, no checkpoint, nothing in the run's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from paceline.checkpoint.engine import Checkpoint
from paceline.checkpoint.export import Weights, check_weights, find_checkpoint, read_weights
from paceline.checkpoint.native_engine import load_tree
from paceline.checkpoint.state import load_tensors
from paceline.errors import ConfigError, MismatchError, PacelineError, PeerError
from paceline.log.files import shown
from paceline.parallel.outline import copies_to_place, is_spread, take_over
from paceline.trainer import error_context, lifecycle
from paceline.trainer.base import TrainerBase
from paceline.trainer.checks import check_validation
from paceline.trainer.events import Events
from paceline.trainer.run import Run
from paceline.trainer.state_tree import load_for_inference
from paceline.world import meeting
from paceline.world.seeding import random_state_kept, seed_everything

# Of a checkpoint, beside the weights.
_LOADED = ("identity", "objects", "progress", "settings", "made", "rank")


@dataclass(frozen=True)
class Wanted:
    """What is evaluated or predicted with.

    Args:
        loader: in place of the trainer's `val_dataloader`; None for that.
        checkpoint: "latest", "best" or the name of one in the run's folder, or the path of a
            checkpoint or of another run; None for the latest if there is one, else the weights at
            hand.
        weights: which of its weights.
    """

    loader: Any = None
    checkpoint: str | Path | None = None
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        check_weights(self.weights)


@runtime_checkable
class SwapsWeights(Protocol):
    """A callback that validates with weights other than those being trained."""

    def applied(self) -> AbstractContextManager[None]:
        """A context in which the models have the other weights."""
        ...


def averages(trainer: TrainerBase, wanted: Wanted) -> bool:
    """Whether weights from a checkpoint may be others than those that were trained.

    Args:
        trainer: whose callbacks may keep an average.
        wanted: which weights.
    """
    swaps = any(isinstance(each, SwapsWeights) for each in trainer.callbacks)
    return wanted.weights == "averaged" or (wanted.weights == "auto" and swaps)


@contextmanager
def opened(trainer: TrainerBase, run: Run, wanted: Wanted, configures: bool) -> Iterator[None]:
    """The models placed and loaded, and the data open, for as long as the context lasts.

    Args:
        trainer: whose models, data and steps these are. It is left as it was, but for the weights
            that were loaded.
        run: just made for this.
        wanted: with which data and weights.
        configures: whether `configure()` has to make the components first.

    Raises:
        PacelineError: it cannot be done so.
    """
    failure: BaseException | None = None
    given = trainer.val_dataloader, trainer.max_val_batches
    with random_state_kept(), ExitStack() as swapped:
        try:
            _start(trainer, run, wanted, swapped, configures)
            yield
        except BaseException as error:
            failure = run.stop.fail(error) or error
            for hook in run.events.on_exception:
                hook(failure)
            if failure is error:
                raise
            raise failure from (None if isinstance(failure, PeerError) else error)
        finally:
            try:
                swapped.close()
            finally:
                if wanted.loader is not None:
                    trainer.val_dataloader, trainer.max_val_batches = given
                lifecycle.teardown(trainer, run, failure)


def _start(
    trainer: TrainerBase, run: Run, wanted: Wanted, swapped: ExitStack, configures: bool
) -> None:
    run.world.open()
    meeting.end()  # a signal ends this rank at once: there is nothing to save
    run.stop.watch(partial(error_context.whereabouts, trainer, run))
    if trainer.deterministic:
        lifecycle.set_determinism(run)
    found = _find(trainer, run, wanted)
    tree = {} if found is None else load_tree(found.path, parts=_LOADED)
    run.seed = int(tree.get("identity", {}).get("seed", run.seed))  # of the run that saved it
    seed_everything(run.seed)
    if configures:
        run.open_data = partial(_open_training_data, trainer, run)
        trainer.configure()
    if wanted.loader is not None:
        trainer.val_dataloader, trainer.max_val_batches = wanted.loader, None
    check_validation(trainer)
    if not trainer.named_models():
        raise ConfigError("model: there is no model, neither given nor made in configure().")
    lifecycle.open_validation_data(trainer, run)
    whole = trainer.named_models()
    spread: dict[str, tuple[torch.nn.Module, torch.nn.Module]] = {}
    if trainer.parallel.partitions_state or any(map(is_spread, whole.values())):
        spread = _swap_copies_in(trainer, swapped)
    trainer.setup()
    swapping = [each for each in trainer.callbacks if isinstance(each, SwapsWeights)]
    if found is None and wanted.weights == "averaged" and len(swapping) != 1:
        raise ConfigError(
            "weights='averaged': there is no checkpoint, and no callback here keeps an average."
        )
    with ExitStack() as exchanged:
        if spread and found is None and wanted.weights != "live":
            for each in swapping:  # which have the weights of the models that were trained
                if wanted.weights == "averaged" or getattr(each, "evaluate", True):
                    exchanged.enter_context(each.applied())
        for name, (model, copied) in spread.items():
            take_over(model, copied, name)
    heard = trainer.callbacks
    if found is not None or wanted.weights != "auto" or spread:
        heard = [each for each in heard if each not in swapping]
    run.events = Events(trainer, heard)
    for hook in run.events.on_setup:
        hook()
    if found is not None:
        weights = read_weights(found, wanted.weights)
        try:
            load_for_inference(trainer, run, tree, weights)
            run.loaded = found.path
        except MismatchError as error:
            raise MismatchError(
                f"{error}\n{shown(found.path)} is of another model: make the model as the run did, "
                "or give checkpoint= one of this model's."
            ) from error
        for name, model in whole.items() if trainer.parallel.partitions_state else ():
            if name in spread:
                take_over(spread[name][1], model, name)
            else:
                load_tensors(model, weights[name])
    elif wanted.weights == "averaged" and not spread:
        swapped.enter_context(swapping[0].applied())


def _swap_copies_in(
    trainer: TrainerBase, swapped: ExitStack
) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """Has copies of the models spread: a spread model stays so, and could not be placed again.

    Returns:
        By name, the models that are spread already, each with its copy, which lacks the values.
    """
    modules = {n: v for n, v in vars(trainer).items() if isinstance(v, (torch.nn.Module, dict))}
    held = {
        name: value
        for name, value in modules.items()
        if not isinstance(value, dict)
        or (value and all(isinstance(each, torch.nn.Module) for each in value.values()))
    }
    copies, spread = copies_to_place(held)
    for name, copied in copies.items():
        setattr(trainer, name, copied)
    swapped.callback(vars(trainer).update, held)
    return spread


def _open_training_data(trainer: TrainerBase, run: Run) -> None:
    """For a `configure()` that asks how long a run is."""
    run.open_data = lambda: None
    # Nothing is trained: the ranks need not be able to make the run's windows.
    lifecycle.open_training_data(trainer, run, None)


def _find(trainer: TrainerBase, run: Run, wanted: Wanted) -> Checkpoint | None:
    """The checkpoint to load, verified by rank 0; None for the weights at hand.

    Raises:
        PacelineError: there is none, or it is damaged; on every rank.
    """
    found: Checkpoint | PacelineError | None = None
    if run.world.is_main:
        try:
            found = _look_up(trainer.run_dir, wanted.checkpoint)
        except PacelineError as error:
            found = error
    found = run.world.broadcast_object(found)
    if isinstance(found, PacelineError):
        raise found
    return found


def _look_up(run_dir: Path | None, checkpoint: str | Path | None) -> Checkpoint | None:
    if checkpoint is None:
        has_one = run_dir is not None and any((run_dir / "checkpoints").glob("step_*"))
        return find_checkpoint(run_dir) if run_dir is not None and has_one else None
    if Path(checkpoint).is_dir():
        return find_checkpoint(checkpoint)
    if run_dir is None:
        raise ConfigError(
            f"checkpoint={str(checkpoint)!r}: the trainer has no run_dir to look in; give that, or "
            "the path of a run or of a checkpoint."
        )
    return find_checkpoint(run_dir, str(checkpoint))
