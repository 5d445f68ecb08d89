"""Run: what exists only while a run is open. It is made at its start and dropped at its end.

The parts of a run (`Window`, `Optimization`, `NonFiniteGuard`, `Recorder`, `ReplicaGroups`) are
given it in place of the Trainer. What outlasts a run (settings, components, counters, the result)
is the Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from paceline.checkpoint import CheckpointEngine
from paceline.checkpoint.state import Made, load_model_state
from paceline.log.lock import FolderLock
from paceline.log.plan import Plan
from paceline.log.run_record import RunRecord
from paceline.parallel.placement import Placement
from paceline.trainer.events import Events, Hooks
from paceline.trainer.identity_keys import Identity
from paceline.trainer.progress import Progress
from paceline.trainer.stop import StopAgreement, behind_draw
from paceline.world.world import World


class Settings(Protocol):
    """The Trainer's settings, as far as the parts of a run read them."""

    precision: str
    max_grad_norm: float | None
    check_gradients: bool
    lr_scheduler_interval: str
    on_nonfinite: str
    run_dir: Path | None
    resolved_recipe: Mapping[str, Any] | None


class Components(Protocol):
    """The Trainer's components by name; a name may stand for another object after `setup`."""

    def named_models(self) -> Mapping[str, torch.nn.Module]:
        """The models."""
        ...

    def named_optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """The optimizers."""
        ...

    def named_schedulers(self) -> Mapping[str, Any] | None:
        """The learning-rate schedulers."""
        ...

    def get_name_by_optimizer(self, optimizer: torch.optim.Optimizer) -> str:
        """The name of one of the optimizers."""
        ...

    def is_overridden(self, name: str) -> bool:
        """Whether a method of the Trainer's is overridden."""
        ...


class Groups(Protocol):
    """The replica groups that share each step, as far as the parts of a run ask them."""

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the groups, in place, within a window."""
        ...

    def commit(self, optimizer: torch.optim.Optimizer) -> bool:
        """Adds up the window's gradients; whether the groups agree that it counts."""
        ...


@dataclass(eq=False)
class Run:
    """A run from its start to its end.

    Args:
        settings: of the Trainer.
        components: of the Trainer.
        world: the ranks.
        seed: of every random stream.
        progress: the Trainer's counters.
        plan: takes what is decided without being asked.
        placement: puts models where they compute, and knows how they lie.
        stop: the ranks' agreement on where to stop.

    Attributes:
        id: the same over all resumes of the run.
        device: where this rank computes.
        on_cpu: whether that is a CPU.
        events: which methods listen to which event.
        saver: the engine that writes checkpoints and finds them; None if nothing is written.
        record: run.json.
        folder_lock: keeps other processes from the run's folder.
        identity: what a resumed run must find unchanged.
        scaler: scales losses in fp16, else None.
        model_key: the stream that models' random numbers come from.
        count_items: counts a batch's items, if the user does so; else None.
        groups: the replica groups that take each step together, if there are any.
        batch_items: items of the batch at hand, the weight of what is logged; None between batches.
        muted: whether nothing is logged: a stand-in micro-batch runs, or a loss is evaluated anew.
        validating: whether a validation is under way.
        started_validation: whether a validation has started for its listeners, and not ended.
        val_name: the validation loader at hand, if it has a name.
        loaded: whose weights an evaluation has loaded; None for those at hand.
        predicted: the batch that is predicted, from 0; None if nothing is predicted.
        open_data: opens the data, unless that is done.
        take_settings: has changed settings count; raises if one has an invalid value.
        trained: whether this process has something to train.
        settled: whether the loop is between two windows with nothing pending, so that state may be
            saved.
        stopped: whether the run stops before training is over.
        lacks_end: whether a pruned run was killed behind its last checkpoint, before its last row.
        rewinding: whether to go back to a checkpoint behind this window, to skip `rewind_step`.
        asked_saves: reasons of checkpoints that were asked for within a window.
        saved_at: step and pending parts of the last checkpoint.
        saves_in_flight: how many saves have not been reported as saved or failed.
        sinks_state: positions of the sinks in the checkpoint that the run resumed from, by rank.
        made: how models and optimizers were made, before anything was loaded or trained.
        attributes: of the objects then, beside their state (`attributes.py`).
        proven: the optimizers whose state was there when it was last proven that it can be loaded.
        waiting: states of models that the resumed run has not made yet, by name.
        waiting_objects: those of checkpoint objects.
        made_with: the settings of callbacks and checkpoint objects at the run's start.
        fixed: attributes of the Trainer that the run has read, so that setting them is refused.
        cleanup: what is undone at the end.
    """

    settings: Settings
    components: Components
    world: World
    seed: int
    progress: Progress
    plan: Plan
    placement: Placement
    stop: StopAgreement

    id: str = ""
    events: Events = field(default_factory=lambda: Events(Hooks(), ()))
    saver: CheckpointEngine | None = None
    record: RunRecord = field(default_factory=lambda: RunRecord(None))
    folder_lock: FolderLock = field(default_factory=lambda: FolderLock())
    identity: Identity = field(default_factory=Identity)
    scaler: torch.amp.GradScaler | None = None
    model_key: int = 0
    count_items: Callable[[Any], Any] | None = None
    groups: Groups | None = None
    batch_items: int | float | torch.Tensor | None = None
    muted: bool = False
    validating: bool = False
    started_validation: bool = False
    val_name: str | None = None
    loaded: Path | None = None
    predicted: int | None = None
    open_data: Callable[[], None] = lambda: None
    take_settings: Callable[[], None] = lambda: None
    trained: bool = False
    settled: bool = False
    stopped: bool = False
    lacks_end: bool = False
    rewinding: bool = False
    rewind_step: int = -1
    asked_saves: list[str] = field(default_factory=list)
    saved_at: tuple[int, list[str]] | None = None
    saves_in_flight: int = 0
    sinks_state: dict[str, dict[str, Any]] | None = None
    made: Made = field(default_factory=Made)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)
    waiting: dict[str, Any] = field(default_factory=dict)
    waiting_objects: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    cleanup: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.device = self.world.device
        self.on_cpu = self.device.type == "cpu"

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do in this process."""
        return self.stopped or self.progress.ended_by is not None

    @property
    def global_step(self) -> int:
        """Optimizer steps (windows) done."""
        return self.progress.global_step

    def load_waiting(self, assigned: Mapping[str, Any]) -> None:
        """Gives models that training makes on its way what the checkpoint holds of them.

        Args:
            assigned: what the trainer has just got, by name.
        """
        for name in self.waiting.keys() & assigned.keys():
            if isinstance(assigned[name], torch.nn.Module):
                load_model_state(assigned[name], self.waiting.pop(name), f"model {name!r}")

    def request_rewind(self, step: int) -> None:
        """Asks to go back to the newest checkpoint, and to skip the window of `step` then."""
        self.rewinding, self.rewind_step = True, step

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer of the models, as it is now: a model may assign them anew."""
        return [b for model in self.components.named_models().values() for b in model.buffers()]

    def start_record(self) -> None:
        """Writes run.json for this start of the run; one that was complete stays as it is."""
        if self.is_over and self.record.was_complete:
            return
        self.record.start(
            seed=self.seed,
            plan=self.plan.as_list(),
            world_size=self.world.size,
            id=self.id,
            checkpoint_engine=None if self.saver is None else self.saver.policy.engine,
        )


class KeptBuffers:
    """The models' buffers as they are now, to be put back.

    By name: a model may change a buffer in place, or assign another tensor.

    Args:
        run: whose models these are.
    """

    def __init__(self, run: Run) -> None:
        models = run.components.named_models().values()
        self._held = [
            (part._buffers, name, buffer, None if buffer is None else buffer.clone())
            for model in models
            for part in model.modules()
            for name, buffer in part._buffers.items()
        ]

    @torch.no_grad()
    def put_back(self, if_bad: torch.Tensor | None = None) -> None:
        """Gives every buffer its tensor and values back.

        Args:
            if_bad: on the device, whether to do so at all; None for yes.
        """
        for owner, name, buffer, value in self._held:
            now = owner.get(name)
            if buffer is None or value is None:
                # A device is asked where a buffer has only come since, which it does once.
                if now is not None and (if_bad is None or bool(if_bad)):
                    owner[name] = None
            elif if_bad is None:
                buffer.copy_(value)
                owner[name] = buffer
            elif now is not None and now.shape == value.shape:
                now.copy_(torch.where(if_bad, value, now))
            elif bool(if_bad):
                owner[name] = value


class StopBeforeWindow:
    """A run's agreement on stopping before the next window (`data.source.Stopping`).

    Args:
        run: whose training source collects windows.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def global_step(self) -> int:
        return self._run.global_step

    def asked(self) -> bool:
        run = self._run
        return run.stop.agreed_on(behind_draw(run.progress.place))

    def decided(self) -> bool:
        run = self._run
        return run.stop.reached(behind_draw(run.progress.place))
