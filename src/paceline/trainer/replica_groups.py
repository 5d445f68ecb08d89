"""Replica groups: copies of a run that take each step together, and survive the death of any one.

Each group is a process of its own, with all of the model. Before each window those that are there
meet (`draw`), share out the window's rows among themselves, and afterwards (`commit`) add up their
gradients and agree whether the step counts. A window that does not count is taken once more, by
those who are there then, with the same samples. All but a window's rows is done by every group
alike: what one of them holds between two windows is the whole state of the run.

One of them writes: the one that has the lock of the run's folder. Each keeps the rows that stand
after the newest checkpoint, so that another can continue writing where it died.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from paceline.checkpoint import Checkpoint, load_tree, scan
from paceline.checkpoint.handover import HandOver
from paceline.data.indexed import IndexedSource
from paceline.data.loader import is_indexed, open_training
from paceline.data.source import Draw, WindowSize
from paceline.errors import CheckpointError, ConfigError
from paceline.log.lock import FolderLock
from paceline.log.run_record import RunRecord, read_run
from paceline.log.sinks import Sink
from paceline.trainer.nonfinite import NonFiniteGuard
from paceline.trainer.recorder import Recorder
from paceline.trainer.run import Run
from paceline.trainer.stop import behind_boundary
from paceline.world.environment import replica_group
from paceline.world.quorum import Quorum
from paceline.world.seeding import mix, stream
from paceline.world.world import World

FOLDER = ".groups"
"""Beside the checkpoints: one folder a group, for its lock and the state that it hands over."""

ROWS = 64
"""Rows kept at least before it is looked which of them a checkpoint counts on."""


class Host(Protocol):
    """The Trainer, as far as its groups ask it."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as one tree."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


def groups_of(
    run: Run, host: Host, *, leave: Callable[[list[str]], None], boundary: Callable[[], None]
) -> ReplicaGroups | None:
    """This run's replica groups, if it has any.

    Args:
        run: just made.
        host: the Trainer whose state is handed over.
        leave: stops the run here, with these parts of the boundary pending.
        boundary: does what is pending at a boundary.
    """
    place = replica_group()
    if place is None:
        return None
    quorum = Quorum(place, run.world.timeout)
    return ReplicaGroups(run, quorum, host, leave=leave, boundary=boundary)


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
        source: the position in the data.
        sums: the open sums of logged values.
        buffers: a copy of every buffer of the models.
    """

    source: dict[str, Any]
    sums: dict[str, Any]
    buffers: list[torch.Tensor]


class ReplicaGroups:
    """One group's part in the life of all.

    Args:
        run: this group's.
        quorum: the groups that are there.
        host: the Trainer whose state is handed over.
        leave: stops the run here, with these parts of the boundary pending.
        boundary: does what is pending at a boundary.

    Attributes:
        committed: whether the window at hand counts.
        writes: whether this is the group that writes rows, checkpoints and run.json.
    """

    def __init__(
        self,
        run: Run,
        quorum: Quorum,
        host: Host,
        *,
        leave: Callable[[list[str]], None],
        boundary: Callable[[], None],
    ) -> None:
        self._run = run
        self._quorum = quorum
        self._host = host
        self._leave = leave
        self._boundary = boundary
        self._folder = Path()
        self._recorder: Recorder | None = None
        self._guard: NonFiniteGuard | None = None
        self._source: IndexedSource | None = None
        self._rows = KeptRows(run)
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
        """Opens the training data, split over the groups.

        Args:
            loader: a DataLoader over a map-style dataset.
            size: samples in a window and micro-batches in an epoch.
            seed: the run's seed.
            world: this group's ranks.

        Raises:
            ConfigError: something about the components does not exist yet with groups.
        """
        if not is_indexed(loader):
            raise ConfigError(
                "train_dataloader: one that keeps its own order does not exist yet with replica "
                "groups: give a DataLoader over a map-style dataset."
            )
        if len(self._run.components.named_optimizers()) > 1:
            raise ConfigError("several optimizers do not exist yet with replica groups.")
        everybody = copy.copy(world)
        everybody.dp_rank, everybody.dp_size = 0, self._quorum.place.groups
        source = open_training(loader, size, seed, everybody)
        assert isinstance(source, IndexedSource)
        self._source = source
        return SharedSource(source, self)

    def attach(self, recorder: Recorder, guard: NonFiniteGuard) -> None:
        """Gives the groups the parts of the run that hold what a window has found.

        Args:
            recorder: whose sums and rows are those of all groups.
            guard: which learns what the others found that is not finite.
        """
        self._recorder, self._guard = recorder, guard
        self._sinks = recorder.sinks
        recorder.sinks = [*self._sinks, self._rows] if self.writes else [self._rows]

    def open_folder(self, folder: Path) -> None:
        """Takes the run's folder to write to, if no other group has it."""
        run, place = self._run, self._quorum.place
        self._folder = folder
        mine = folder / FOLDER / str(place.number)
        mine.mkdir(parents=True, exist_ok=True)
        run.cleanup.callback(self.close)
        self._lock.take(mine, run.world.say)
        self.writes = run.folder_lock.try_to_take(folder)
        if self.writes:
            run.record = RunRecord(folder)
        run.plan.add(
            f"group {place.number} of {place.groups} that meet at {place.lighthouse}; "
            "each step is shared out among those that are there",
            "TORCHFT_LIGHTHOUSE, REPLICA_GROUP_ID, NUM_REPLICA_GROUPS",
        )

    def newest(self) -> Checkpoint | None:
        """The checkpoint to start from, for a group that may not change anything there."""
        found, _ = scan(self._folder / "checkpoints")
        return found[-1] if found else None

    def hand_saver_over(self) -> None:
        """All is loaded: from now on only the group that writes saves.

        Raises:
            ConfigError: the run has windows to pass over, which does not exist yet with groups.
        """
        if self._run.progress.skips:
            raise ConfigError("a run that was rewound cannot resume with replica groups.")
        self._saver = self._run.saver
        if not self.writes:
            self._run.saver = None

    def close(self) -> None:
        """Leaves the other groups, which continue without it."""
        self._quorum.close()
        self._lock.release()

    # A window

    def draw(self, source: IndexedSource) -> Draw | None:
        """Meets the other groups and draws this one's part of the next window."""
        run, quorum = self._run, self._quorum
        if not self._met and not self._meet():
            return None
        source.repartition(quorum.rank, quorum.size)
        run.model_key = mix(stream(run.seed, "model"), quorum.rank)
        train = self._of_run.train
        copies = [buffer.clone() for buffer in run.buffers()]
        self._before = _Before(source.state_dict(), train.state_dict(), copies)
        self.committed = False
        if (drawn := source.draw()) is not None:
            train.reset()
        return drawn

    def commit(self, optimizer: torch.optim.Optimizer) -> bool:
        """Adds up the window's gradients; whether the groups agree that it counts.

        If not, all is as before the window, which is to be drawn again.
        """
        quorum, before, buffers = self._quorum, self._before, self._run.buffers()
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
        self._merge(told, before)
        return True

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sums a tensor over the groups, in place, within a window."""
        self._quorum.add_up([tensor])

    def _telling(self, changed: list[int]) -> str:
        """What the other groups have to know of this one's part of the window."""
        wish = self._run.stop.wish
        assert self._guard is not None
        found = self._guard.found
        return json.dumps(
            {
                "sums": self._of_run.train.sums(),
                "found": None if found is None else {**found, "rank": self._quorum.place.number},
                # A signal stops one group; the others continue without it.
                "stop": None if wish is None or wish.startswith("signal ") else wish,
                "buffers": changed,
            },
            default=str,
        )

    def _merge(self, told: list[dict[str, Any]], before: _Before) -> None:
        sums = before.sums
        assert self._guard is not None
        for part in told:
            for name, (total, weight) in part["sums"].items():
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + total, pair[1] + weight
            if part["found"] is not None:
                self._guard.add_found(part["found"])
            if part["stop"] is not None:
                self._run.stop.request(part["stop"])
        self._of_run.train.load_state_dict(sums)

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
        run = self._run
        self._data.close()
        self._data.load_state_dict(before.source)
        self._of_run.train.load_state_dict(before.sums)
        for buffer, value in zip(run.buffers(), before.buffers, strict=True):
            buffer.copy_(value)
        run.world.say(f"step {run.global_step + 1} did not count in every group; once more.")

    @property
    def _of_run(self) -> Recorder:
        assert self._recorder is not None
        return self._recorder

    @property
    def _data(self) -> IndexedSource:
        assert self._source is not None
        return self._source

    # Meeting

    def _meet(self) -> bool:
        """Finds those who take the next window; False where the epoch or the run ends."""
        run, quorum = self._run, self._quorum
        if not quorum.is_open:
            self._join()
        epoch = run.progress.epoch
        while quorum.meet(lambda: run.stop.wish is not None):
            if not self._takes_over():
                self._met = True
                # Another group's state may be that of another epoch, which then is to begin.
                return run.progress.epoch == epoch
            if run.is_over:
                return False
            quorum.stands_at(run.global_step)
            quorum.give_up("this group has gone on from a checkpoint")
            quorum.agree()
        if run.stop.reached(behind_boundary(run.progress.place)):
            self._leave([])
        return False

    def _join(self) -> None:
        run, quorum = self._run, self._quorum
        transport = HandOver(self._folder / FOLDER, str(quorum.place.number), run.world)
        transport.disallow_checkpoint()
        quorum.open(run.global_step, self._state, self._load, transport)

    def _state(self) -> dict[str, Any]:
        """This group's state, for one that is behind."""
        tree = self._host.state_dict()
        rows = {"rows": self._rows.count, "kept": self._rows.kept}
        return tree | {"replica_groups": rows}

    def _load(self, tree: dict[str, Any]) -> None:
        """Takes another group's state."""
        run = self._run
        self._data.close()
        self._host.load_state_dict(tree)
        if self.writes:
            for sink in self._sinks:
                sink.close("running")
            self._write_on(self._found())
        run.world.say(f"has got another group's state, at step {run.global_step}.")
        for hook in run.events.on_load_checkpoint:
            hook(tree)

    # Writing

    def state_dict(self) -> dict[str, Any]:
        """How many rows the run has."""
        return {"rows": self._rows.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, and rows behind the newest checkpoint if any came."""
        self._rows.restore(state.get("rows", 0), state.get("kept", []))

    def _takes_over(self) -> bool:
        """Begins to write if nobody does; whether the folder holds a later state, now loaded."""
        run = self._run
        if self.writes or self._quorum.rank != 0:
            return False
        if not run.folder_lock.try_to_take(self._folder):
            return False
        self.writes = True
        run.saver, run.record = self._saver, RunRecord(self._folder)
        found = self._found()
        goes_on = False
        if found is not None and found.step > run.global_step:
            self._data.close()
            self._host.load_state_dict(self._saver.load(found.path))
            goes_on = True
        self._of_run.sinks = [*self._sinks, self._rows]
        self._write_on(found)
        run.start_record()
        run.world.say(f"writes from step {run.global_step} on, in place of another group.")
        if goes_on and run.progress.pending:
            self._boundary()
        return goes_on

    def _found(self) -> Checkpoint | None:
        """The run's newest intact checkpoint, for the group that writes."""
        saver = self._run.saver
        if saver is None:
            return None
        saver.recover()
        return saver.newest()

    def _write_on(self, found: Checkpoint | None) -> None:
        """Has the sinks stand where they would if this group had written from the beginning."""
        tree = None
        if found is not None:
            tree = load_tree(found.path, parts=("rank", "replica_groups"))
        with contextlib.suppress(OSError, ValueError):  # another group has begun the run
            self._run.id = read_run(self._folder).get("id") or self._run.id
        self._of_run.open(None if tree is None else tree["rank"])
        for row, timing in self._rows.behind(_rows_of(tree)):
            for sink in self._sinks:
                sink.write(row)
                sink.write_timing(timing)


class KeptRows(Sink):
    """The rows that stand behind the newest checkpoint.

    Args:
        run: whose they are.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
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

    @property
    def count(self) -> int:
        """How many rows there have been."""
        return self._dropped + len(self.kept)

    def restore(self, rows: int, kept: list[list[Any]]) -> None:
        """Restores the rows of another group.

        Args:
            rows: their number since the beginning of the run.
            kept: the last of them, pairs of a metrics row and a timing row.
        """
        self._dropped, self.kept = rows - len(kept), list(kept)

    def behind(self, rows: int) -> list[list[Any]]:
        """The rows after so many."""
        if rows < self._dropped:
            self._run.world.say(f"the rows {rows + 1} to {self._dropped} are lost.")
        return self.kept[max(0, rows - self._dropped) :]

    def _drop(self) -> None:
        """Forgets what the newest checkpoint counts on."""
        folder = self._run.settings.run_dir
        assert folder is not None
        with contextlib.suppress(OSError, CheckpointError):  # it may be pruned at this moment
            found, _ = scan(folder / "checkpoints")
            if found:
                rows = _rows_of(load_tree(found[-1].path, parts=("replica_groups",)))
                self.kept = self.kept[max(0, rows - self._dropped) :]
                self._dropped = max(self._dropped, rows)


def _rows_of(tree: dict[str, Any] | None) -> int:
    """Rows before a checkpoint, of those that count; none before one of a run without groups."""
    return (tree or {}).get("replica_groups", {}).get("rows", 0)
