"""Replica groups: copies of a run that take each step together, and go on when one of them dies.

Each group is a process of its own, with all of the model. Before each window those that are there
meet (`draw`), share out the window's rows among themselves, and afterwards (`commit`) add up their
gradients and agree whether the step counts. A window that does not count is taken once more, by
those who are there then, with the same samples. All but a window's rows is done by every group
alike: what one of them holds between two windows is the whole state of the run.

One of them writes: the one that has the lock of the run's folder. Each keeps the rows that stand
behind the newest checkpoint, so that another can go on writing where it died.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.checkpoint import Checkpoint, load_tree, scan
from paceline.checkpoint.handover import HandOver
from paceline.data.indexed import IndexedSource
from paceline.data.loader import WindowSize, is_indexed, open_training
from paceline.data.source import Draw
from paceline.errors import CheckpointError, ConfigError
from paceline.log.lock import FolderLock
from paceline.log.provenance import RunRecord
from paceline.log.sinks import Sink
from paceline.trainer import resume
from paceline.world.environment import replica_group
from paceline.world.quorum import Quorum, missing
from paceline.world.seeding import mix, stream
from paceline.world.world import World

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

FOLDER = ".groups"
"""Beside the checkpoints: one folder a group, for its lock and the state that it hands over."""

ROWS = 64
"""Rows kept at least before it is looked which of them a checkpoint counts on."""


def wrong_with_groups(trainer: Trainer) -> list[str]:
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
    }
    return [
        f"TORCHFT_LIGHTHOUSE is set: {what} does not exist yet with replica groups."
        for what, is_so in refused.items()
        if is_so
    ]


def missing_for_groups() -> str | None:
    """What is not installed and this run's replica groups need; None if nothing is missing."""
    return None if replica_group() is None else missing()


def groups_of(trainer: Trainer) -> ReplicaGroups | None:
    """This run's replica groups, if it has any."""
    place = replica_group()
    return (
        None if place is None else ReplicaGroups(trainer, Quorum(place, trainer.parallel.timeout))
    )


class SharedSource:
    """A source whose windows the groups share out among those that take part."""

    def __init__(self, source: IndexedSource, groups: ReplicaGroups) -> None:
        self._source = source
        self._groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def draw(self) -> Draw | None:
        """This group's part of the next window; None where the epoch or the run ends."""
        return self._groups.draw(self._source)


@dataclass(frozen=True)
class _Before:
    """What a window changes although it may not count.

    Attributes:
        source: where the data stood.
        sums: the open sums of logged values.
        buffers: a copy of every buffer of the models.
    """

    source: dict[str, Any]
    sums: dict[str, Any]
    buffers: list[torch.Tensor]


class ReplicaGroups:
    """One group's part in the life of all.

    Args:
        trainer: this group's.
        quorum: the groups that are there.

    Attributes:
        committed: whether the window at hand counts.
        writes: whether this is the group that writes rows, checkpoints and run.json.
    """

    def __init__(self, trainer: Trainer, quorum: Quorum) -> None:
        self._trainer = trainer
        self._quorum = quorum
        self._rows = KeptRows(trainer)
        self._sinks: list[Any] = []
        self._saver: Any = None
        self._lock = FolderLock()  # of this group's number
        self._met = False
        self._before: _Before | None = None
        self.committed = False
        self.writes = False

    # The run's beginning and end

    def open_training(
        self, loader: Iterable[Any], size: WindowSize, seed: int, world: World
    ) -> Any:
        """The training data; the arguments are those of `open_training` without groups.

        Raises:
            ConfigError: something about the components does not exist yet with groups.
        """
        if not is_indexed(loader):
            raise ConfigError(
                "train_dataloader: one that keeps its own order does not exist yet with replica "
                "groups: give a DataLoader over a map-style dataset."
            )
        if len(self._trainer.named_optimizers()) > 1:
            raise ConfigError("several optimizers do not exist yet with replica groups.")
        everybody = copy.copy(world)
        everybody.dp_rank, everybody.dp_size = 0, self._quorum.place.groups
        source = open_training(loader, size, seed, everybody)
        assert isinstance(source, IndexedSource)
        return SharedSource(source, self)

    def open_folder(self) -> None:
        """Takes the run's folder to write to, if no other group has it."""
        trainer, place = self._trainer, self._quorum.place
        assert trainer.run_dir is not None
        mine = trainer.run_dir / FOLDER / str(place.number)
        mine.mkdir(parents=True, exist_ok=True)
        trainer.while_placed.callback(self.close)
        self._lock.take(mine, trainer.say)
        self._sinks = trainer.recorder.sinks
        self.writes = trainer.folder_lock.try_to_take(trainer.run_dir)
        if self.writes:
            trainer.record = RunRecord(trainer.run_dir)
        trainer.recorder.sinks = [*self._sinks, self._rows] if self.writes else [self._rows]
        trainer.plan.add(
            f"group {place.number} of {place.groups} that meet at {place.lighthouse}; "
            "each step is shared out among those that are there",
            "TORCHFT_LIGHTHOUSE, REPLICA_GROUP_ID, NUM_REPLICA_GROUPS",
        )

    def newest(self) -> Checkpoint | None:
        """The checkpoint to start from, for a group that may not change anything there."""
        assert self._trainer.run_dir is not None
        found, _ = scan(self._trainer.run_dir / "checkpoints")
        return found[-1] if found else None

    def settle(self) -> None:
        """All is loaded: from now on only the group that writes saves.

        Raises:
            ConfigError: the run has windows to pass over, which does not exist yet with groups.
        """
        trainer = self._trainer
        if trainer.progress.skips:
            raise ConfigError("a run that was rewound cannot go on with replica groups.")
        self._saver = trainer.saver
        if not self.writes:
            trainer.saver = None

    def close(self) -> None:
        """Leaves the other groups, who go on."""
        self._quorum.close()
        self._lock.release()

    # A window

    def draw(self, source: IndexedSource) -> Draw | None:
        """Meets the other groups and draws this one's part of the next window."""
        trainer, quorum = self._trainer, self._quorum
        if not self._met and not self._meet():
            return None
        source.share_out(quorum.rank, quorum.size)
        trainer.model_key = mix(stream(trainer.seed, "model"), quorum.rank)
        train = trainer.recorder.train
        copies = [buffer.clone() for buffer in self._buffers()]
        self._before = _Before(source.state_dict(), train.state_dict(), copies)
        self.committed = False
        if (drawn := source.draw()) is not None:
            train.reset()
        return drawn

    def commit(self, optimizer: torch.optim.Optimizer) -> bool:
        """Adds up the window's gradients; whether the groups agree that it counts.

        If not, all is as before the window, which is to be drawn again.
        """
        quorum, before, buffers = self._quorum, self._before, self._buffers()
        assert before is not None
        self._met = False
        changed = [
            i
            for i, (now, old) in enumerate(zip(buffers, before.buffers, strict=True))
            if not torch.equal(now, old)
        ]
        told = [json.loads(text) for text in quorum.gather(self._telling(changed))]
        indices = sorted({i for part in told for i in part["buffers"]})
        firsts = [
            buffers[i].clone() if quorum.rank == 0 else torch.zeros_like(buffers[i])
            for i in indices
        ]
        self._add_up_gradients(optimizer, firsts)
        self.committed = quorum.agree()
        if not self.committed:
            self._take_back(before)
            return False
        with torch.no_grad():
            for i, value in zip(indices, firsts, strict=True):
                buffers[i].copy_(value)
        self._hear(told, before)
        return True

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the groups, in place, within a window."""
        self._quorum.add_up([tensor])

    def _telling(self, changed: list[int]) -> str:
        """What the other groups have to know of this one's part of the window."""
        trainer = self._trainer
        wish = trainer.stop_agreement.wish
        found = trainer.optimization.guard.found
        return json.dumps(
            {
                "sums": trainer.recorder.train.sums(),
                "found": None if found is None else {**found, "rank": self._quorum.place.number},
                # A signal speaks to one group; the others go on without it.
                "stop": None if wish is None or wish.startswith("signal ") else wish,
                "buffers": changed,
            },
            default=str,
        )

    def _hear(self, told: list[dict[str, Any]], before: _Before) -> None:
        trainer, sums = self._trainer, before.sums
        for part in told:
            for name, (total, weight) in part["sums"].items():
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + total, pair[1] + weight
            if part["found"] is not None:
                trainer.optimization.guard.hear(part["found"])
            if part["stop"] is not None:
                trainer.request_stop(part["stop"])
        trainer.recorder.train.load_state_dict(sums)

    @torch.no_grad()
    def _add_up_gradients(
        self, optimizer: torch.optim.Optimizer, others: list[torch.Tensor]
    ) -> None:
        """Sums gradients, and other tensors, over the groups; what none has stays without one."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        there = torch.tensor([float(p.grad is not None) for p in parameters])
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._quorum.add_up([there, *gradients, *others])
        for parameter, groups in zip(parameters, there.tolist(), strict=True):
            if not groups:
                parameter.grad = None

    @torch.no_grad()
    def _take_back(self, before: _Before) -> None:
        trainer = self._trainer
        trainer.source.close()
        trainer.source.load_state_dict(before.source)
        trainer.recorder.train.load_state_dict(before.sums)
        for buffer, value in zip(self._buffers(), before.buffers, strict=True):
            buffer.copy_(value)
        trainer.say(f"step {trainer.global_step + 1} did not count in every group; once more.")

    def _buffers(self) -> list[torch.Tensor]:
        models = self._trainer.named_models().values()
        return [buffer for model in models for buffer in model.buffers()]

    # Meeting

    def _meet(self) -> bool:
        """Finds those who take the next window; False where the epoch or the run ends."""
        trainer, quorum = self._trainer, self._quorum
        if not quorum.is_open:
            self._join()
        epoch = trainer.progress.epoch
        while quorum.meet(lambda: trainer.stop_agreement.wish is not None):
            if not self._takes_over():
                self._met = True
                # Another group's state may be that of another epoch, which then is to begin.
                return trainer.progress.epoch == epoch
            if trainer.is_over:
                return False
            quorum.stands_at(trainer.global_step)
            quorum.give_up("this group has gone on from a checkpoint")
            quorum.agree()
        if trainer.stop_agreement.reached(2 * trainer.global_step + 1):
            trainer._leave(pending=[])
        return False

    def _join(self) -> None:
        trainer, quorum = self._trainer, self._quorum
        assert trainer.run_dir is not None
        transport = HandOver(trainer.run_dir / FOLDER, str(quorum.place.number), trainer.world)
        transport.disallow_checkpoint()
        quorum.open(trainer.global_step, self._state, self._load, transport)

    def _state(self) -> dict[str, Any]:
        """This group's state, for one that is behind."""
        tree = self._trainer.state_dict()
        return tree | {"replica_groups": self._rows.state_dict() | {"kept": self._rows.kept}}

    def _load(self, tree: dict[str, Any]) -> None:
        """Takes another group's state."""
        trainer = self._trainer
        trainer.source.close()
        trainer.load_state_dict(tree)
        if self.writes:
            for sink in self._sinks:
                sink.close("running")
            self._write_on(resume.find(trainer))
        trainer.say(f"has got another group's state, at step {trainer.global_step}.")
        for hook in trainer.events.on_load_checkpoint:
            hook(tree)

    # Writing

    def state_dict(self) -> dict[str, Any]:
        """How many rows the run has."""
        return {"rows": self._rows.state_dict()["rows"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, and rows behind the newest checkpoint if any came."""
        self._rows.restore(state.get("rows", 0), state.get("kept", []))

    def _takes_over(self) -> bool:
        """Begins to write if nobody does; whether the folder holds a later state, now loaded."""
        trainer = self._trainer
        assert trainer.run_dir is not None
        if self.writes or self._quorum.rank != 0:
            return False
        if not trainer.folder_lock.try_to_take(trainer.run_dir):
            return False
        self.writes = True
        trainer.saver, trainer.record = self._saver, RunRecord(trainer.run_dir)
        found = resume.find(trainer)
        goes_on = False
        if found is not None and found.step > trainer.global_step:
            trainer.source.close()
            trainer.load_state_dict(self._saver.load(found.path))
            goes_on = True
        trainer.recorder.sinks = [*self._sinks, self._rows]
        self._write_on(found)
        plan = trainer.plan.as_list()
        trainer.record.start(seed=trainer.seed, plan=plan, world_size=trainer.world.size)
        trainer.say(f"writes from step {trainer.global_step} on, in place of another group.")
        if goes_on and trainer.progress.pending:
            trainer._boundary()
        return goes_on

    def _write_on(self, found: Checkpoint | None) -> None:
        """Has the sinks stand where they would if this group had written from the beginning."""
        trainer, tree = self._trainer, None
        if found is not None:
            tree = load_tree(found.path, parts=("rank", "replica_groups"))
        for sink in self._sinks:
            sink.open(trainer.run_dir, trainer.identity, fresh=tree is None)
        if tree is not None:
            trainer.recorder.load_sinks(tree["rank"])
        for row, timing in self._rows.behind(_rows_of(tree)):
            for sink in self._sinks:
                sink.write(row)
                sink.write_timing(timing)


class KeptRows(Sink):
    """The rows that stand behind the newest checkpoint.

    Args:
        trainer: whose run they are of.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._dropped = 0
        self._limit = ROWS
        self.kept: list[list[Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write`."""
        if len(self.kept) >= self._limit:
            self._drop()
            self._limit = 2 * len(self.kept) + ROWS
        self.kept.append([dict(row), {}])

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write_timing`."""
        self.kept[-1][1] = dict(row)

    def state_dict(self) -> dict[str, Any]:
        """How many rows there have been."""
        return {"rows": self._dropped + len(self.kept)}

    def restore(self, rows: int, kept: list[list[Any]]) -> None:
        """Stands behind so many rows, the last of which are kept."""
        self._dropped, self.kept = rows - len(kept), list(kept)

    def behind(self, rows: int) -> list[list[Any]]:
        """The rows after so many."""
        if rows < self._dropped:
            self._trainer.say(f"the rows {rows + 1} to {self._dropped} are lost.")
        return self.kept[max(0, rows - self._dropped) :]

    def _drop(self) -> None:
        """Forgets what the newest checkpoint counts on."""
        assert self._trainer.run_dir is not None
        with contextlib.suppress(OSError, CheckpointError):  # it may be pruned at this moment
            found, _ = scan(self._trainer.run_dir / "checkpoints")
            if found:
                rows = _rows_of(load_tree(found[-1].path, parts=("replica_groups",)))
                self.kept = self.kept[max(0, rows - self._dropped) :]
                self._dropped = max(self._dropped, rows)


def _rows_of(tree: dict[str, Any] | None) -> int:
    """Rows before a checkpoint, of those that count; none before one of a run without groups."""
    return (tree or {}).get("replica_groups", {}).get("rows", 0)
