"""One replica group of a run, with the others and their lighthouse played."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builders import Noisy, Regression, loader
from paceline import CheckpointPolicy, Trainer
from paceline.checkpoint.handover import HandOver
from paceline.errors import CheckpointError, ConfigError, MissingExtraError, NonFiniteError
from paceline.log.lock import FolderLock
from paceline.testing import StopAt, bits, rows
from paceline.trainer import replica_groups
from paceline.world import quorum
from paceline.world.environment import ReplicaGroup
from paceline.world.world import World
from small import line, settings, weights

SOON = timedelta(seconds=0.1)


MISSING = quorum.missing


class Played:
    """A quorum of this group and, if they say anything, others whose part is played.

    Attributes:
        votes: whether each attempt counts, in their order; then, all do.
        behind_at: a step before which the group gets a state: its own, handed over.
        others: what each of the others tells in a step, by steps done.
        told: what this group has told.
    """

    votes: list[bool]
    behind_at: int | None
    others: dict[int, list[dict[str, Any]]]
    told: list[dict[str, Any]]
    rank, size, is_open = 0, 1, False

    def __init__(self, place: ReplicaGroup, timeout: float) -> None:
        self.place = place

    def open(self, step: int, state: Any, load: Any, transport: Any) -> None:
        self.is_open, self.step = True, step
        self.heal = state, load, transport

    def meet(self, stops: Any) -> bool:
        if self.behind_at == self.step:
            state, load, transport = self.heal
            both = {"user": {"default": state()}, "torchft": {"step": self.step}}
            transport.send_checkpoint([0], self.step, both, SOON)
            load(transport.recv_checkpoint(0, "0", self.step, SOON)["user"]["default"])
            Played.behind_at = None
        return not stops()

    def stands_at(self, step: int) -> None:
        self.step = step

    def give_up(self, why: str) -> None:
        self.votes.insert(0, False)

    def gather(self, text: str) -> list[str]:
        self.told.append(json.loads(text))
        return [text, *map(json.dumps, self.others.get(self.step, []))]

    def add_up(self, tensors: Any) -> None: ...

    def agree(self) -> bool:
        counts = self.votes.pop(0) if self.votes else True
        self.step += counts
        return counts

    def close(self) -> None: ...


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    """Has every trainer be the one replica group of a run, without torchft."""
    for name, value in (("LIGHTHOUSE", "TORCHFT_LIGHTHOUSE"), ("0", "REPLICA_GROUP_ID")):
        monkeypatch.setenv(value, name)
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "1")
    monkeypatch.setattr(replica_groups, "Quorum", Played)
    monkeypatch.setattr(quorum, "missing", lambda: None)
    Played.votes, Played.others, Played.told, Played.behind_at = [], {}, [], None
    return Played


def noisy(run_dir: Path, workers: int, **changes: Any) -> Regression:
    """Dropout, batch norm, augmentation, momentum, clipping: all that a window could change."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1)
        )
    data = loader(Noisy(43), 5, num_workers=workers)
    return Regression(
        **settings(model, train_dataloader=data, gradient_accumulation_steps=2, max_grad_norm=1.0),
        run_dir=run_dir,
        log_every=2,
        **changes,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_window_that_does_not_count_leaves_no_trace(
    workers: int, played: type[Played], tmp_path: Path
):
    undisturbed = noisy(tmp_path / "one", workers)
    undisturbed.fit(seed=1)
    played.votes = [False, True, True, False, False, True, True, True, False]
    again = noisy(tmp_path / "two", workers)
    again.fit(seed=1)
    assert not played.votes
    assert bits(weights(again)) == bits(weights(undisturbed))
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    # Each attempt has seen the same samples.
    first, twice = undisturbed.seen[0], again.seen[0]
    assert twice == first * 2
    assert again.seen[2] == undisturbed.seen[2] * 3


@pytest.mark.parametrize("saves", [True, False])
def test_the_group_that_writes_may_fall_behind(saves: bool, played: type[Played], tmp_path: Path):
    """Given another group's state in the middle of an epoch, then it goes on from there, with all
    rows as if it had never been behind."""
    policy = CheckpointPolicy(every_steps=4) if saves else None
    undisturbed = noisy(tmp_path / "one", 0, checkpoint=policy)
    undisturbed.fit(seed=1)
    played.behind_at = 7
    again = noisy(tmp_path / "two", 0, checkpoint=policy)
    again.fit(seed=1)
    assert played.behind_at is None
    assert bits(weights(again)) == bits(weights(undisturbed))
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


class NotBefore(FolderLock):
    """One that another group holds until a moment."""

    free = False

    def try_to_take(self, folder: Path) -> bool:
        return self.free and super().try_to_take(folder)


@pytest.mark.parametrize("died_at", [5, 7])  # at an epoch's end, which is yet to be seen to; within
def test_a_group_that_takes_over_goes_on_from_a_later_checkpoint(
    died_at: int, played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Given a group that had written further than this one has come when it died, then this one
    goes on there; and what it has not seen is seen by nobody twice."""
    undisturbed, folder = noisy(tmp_path / "one", 0), tmp_path / "two"
    undisturbed.fit(seed=1)
    ahead = noisy(tmp_path / "ahead", 0, callbacks=[StopAt(died_at)])
    ahead.fit(seed=1)
    monkeypatch.setattr("paceline.trainer.run.FolderLock", NotBefore)
    behind = noisy(folder, 0)

    def dies(metrics: dict[str, Any]) -> None:
        if behind.global_step == 4:
            assert not (folder / "metrics.jsonl").exists()
            shutil.copytree(tmp_path / "ahead", folder, dirs_exist_ok=True)
            NotBefore.free = True

    behind.on_step_end = dies
    monkeypatch.setattr(NotBefore, "free", False)
    behind.fit(seed=1)
    assert bits(weights(behind)) == bits(weights(undisturbed))
    assert rows(folder) == rows(tmp_path / "one")
    assert sorted(behind.seen) == [0, 1, 2, 3, *range(died_at, 10)]
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"]) == ("complete", 10)


def test_groups_of_one_are_a_run_without_groups(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Given a run that was stopped, when it goes on without groups, then it ends as it would."""
    whole_run = noisy(tmp_path / "one", 0)
    whole_run.fit(seed=1)
    noisy(tmp_path / "two", 0, callbacks=[StopAt(5)]).fit(seed=1)
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE")
    alone = noisy(tmp_path / "two", 0)
    alone.fit(seed=1)
    assert alone.replica_groups is None
    assert bits(weights(alone)) == bits(weights(whole_run))
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


def test_what_another_group_finds_ends_this_one_too(played: type[Played], tmp_path: Path):
    found = {"loss": float("nan"), "rank": 1, "batch_idx": 0, "samples": [4, 7], "batch": "x"}
    played.others = {3: [{"sums": {}, "found": found, "stop": None, "buffers": []}]}
    trainer = noisy(tmp_path / "run", 0)
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.fit(seed=1)
    assert trainer.global_step == 3


def test_a_group_that_hears_of_a_stop_stops_at_the_same_step(played: type[Played], tmp_path: Path):
    played.others = {3: [{"sums": {}, "found": None, "stop": "time limit", "buffers": []}]}
    trainer = noisy(tmp_path / "run", 0)
    trainer.fit(seed=1)
    assert (trainer.global_step, trainer.result.stopped_by) == (4, "time limit")


@pytest.mark.parametrize(("reason", "is_shared"), [("time limit", True), ("signal SIGTERM", False)])
def test_a_group_tells_of_a_stop_but_of_a_signal_to_it_alone(
    reason: str, is_shared: bool, played: type[Played], tmp_path: Path
):
    trainer = noisy(tmp_path / "run", 0)
    trainer.on_before_backward = lambda loss: trainer.request_stop(reason)
    with pytest.raises(SystemExit) if not is_shared else nullcontext():
        trainer.fit(seed=1)
    assert [each["stop"] for each in played.told] == [reason if is_shared else None]


def test_rows_that_a_checkpoint_counts_on_are_forgotten(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica_groups, "ROWS", 2)
    policy = CheckpointPolicy(every_steps=4, asynchronous=False)
    trainer = noisy(tmp_path / "run", 0, checkpoint=policy)
    trainer.fit(seed=1)
    assert trainer.replica_groups is not None
    kept = trainer.replica_groups._rows
    written = rows(tmp_path / "run")
    assert 0 < len(kept.kept) < len(written) == kept.count
    assert [row for row, _ in kept.behind(len(written) - 1)] == written[-1:]


class OwnStep(Trainer):
    def step(self, window: Any) -> None: ...


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "fp16"}, "precision='fp16' does not exist yet with replica groups"),
        ({"on_nonfinite": "rewind"}, "on_nonfinite='rewind' does not exist yet"),
        ({"run_dir": None}, "run_dir=None, through which the groups hand over their state"),
        ({"resume": "fresh"}, "resume='fresh' does not exist yet"),
        ({"kind": OwnStep}, r"a step\(\) of your own does not exist yet"),
        ({"train_dataloader": [(torch.ones(2, 3), torch.ones(2, 1))]}, "keeps its own order"),
        ({"optimizer": 2}, "several optimizers do not exist yet"),
    ],
)
def test_what_does_not_exist_yet_is_refused(
    changes: dict[str, Any], told: str, played: type[Played], tmp_path: Path
):
    model, kind = line(), changes.get("kind", Trainer)
    changes = {"run_dir": tmp_path / "run", **changes}
    if "optimizer" in changes:
        each = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
        changes["optimizer"] = dict(zip("ab", each, strict=True))
    changes.pop("kind", None)
    with pytest.raises(ConfigError, match=told):
        kind(**settings(model, **changes)).fit(seed=1)


def test_several_processes_in_a_group_are_refused(
    played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes in a group does not exist yet"):
        Trainer(**settings(run_dir=tmp_path / "run")).fit(seed=1)


def test_torchft_is_an_extra(played: type[Played], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quorum, "missing", MISSING)
    monkeypatch.setattr(quorum.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "paceline\[torchft\]"'):
        Trainer(**settings(run_dir=tmp_path / "run")).fit(seed=1)


def test_a_state_is_handed_over_whole_or_not_at_all(tmp_path: Path):
    """Given a state that one group hands over, then another gets its bits; and nothing from a name
    that is no group's, nor of a file that was damaged, nor once it is withdrawn."""
    tree = {"models": {"model": {"w": torch.randn(3)}}, "rank": {"0": {"sums": {"a": [0.1, 2.0]}}}}
    state = {"user": {"default": tree}, "torchft": {"step": 7, "batches_committed": 9}}
    ours, theirs = (HandOver(tmp_path, name, World()) for name in "01")
    ours.send_checkpoint([1], 7, state, SOON)
    assert bits(theirs.recv_checkpoint(0, ours.metadata(), 7, SOON)) == bits(state)
    with pytest.raises(CheckpointError, match="no replica group's name"):
        theirs.recv_checkpoint(0, "../0", 7, SOON)
    (file,) = tmp_path.glob("0/state/step_00000007/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="has changed"):
        theirs.recv_checkpoint(0, ours.metadata(), 7, SOON)
    ours.disallow_checkpoint()
    with pytest.raises(CheckpointError, match="can all replica groups read the run's folder"):
        theirs.recv_checkpoint(0, ours.metadata(), 7, SOON)
    ours.shutdown()
    assert not tmp_path.exists()
