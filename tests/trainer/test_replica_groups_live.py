"""Replica groups, each a process: two are one run, and one may be killed and come back."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import CheckpointPolicy, Parallel, Trainer
from paceline.testing import Ranks, bits, rows
from paceline.trainer import replica_groups
from paceline.world import quorum
from paceline.world.quorum import Quorum
from small import batches, checkpoints, settings, weights

SAMPLES, EPOCHS = 49, 3
STEPS = EPOCHS * 7  # of 8 samples, the last of each epoch of 1, which one group goes without
DIES_AT, GOES_ON_TO = 9, 13  # steps done: in the second epoch; before the last one


@pytest.fixture(autouse=True)
def _needs_the_extra() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("torchft is packaged for Linux on x86-64 alone")
    assert quorum.missing() is None, 'not installed: pip install "paceline[torchft]"'


def whole(run_dir: Path, batch: int, **changes: Any) -> dict[str, Any]:
    """The settings of a run whose steps see 8 samples in micro-batches of `batch`."""
    return settings(
        train_dataloader=batches(SAMPLES, batch, shuffle=True),
        val_dataloader=batches(),
        epochs=EPOCHS,
        run_dir=run_dir,
        log_every=2,
        checkpoint=CheckpointPolicy(every_steps=5, asynchronous=False),
        **changes,
    )


class Weighed(Trainer):
    """Counts as many items as it likes in a sample, and weighs them so."""

    def count_items(self, batch: Any) -> float:
        return _weights(batch).sum().item()

    def loss(self, batch: Any) -> torch.Tensor:
        error = (self.model(batch[0]) - batch[1]).square()
        return (_weights(batch) * error).sum() / _weights(batch).sum()


def _weights(batch: Any) -> torch.Tensor:
    return 1.0 + (batch[0][:, :1] > 0)


class Member(Weighed):
    """Notes which samples each step that counted has seen here, and how many groups took it."""

    folder: Path
    life = ""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.life == "dies" and self.global_step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch_idx == self.progress.batch:
            self.seen: list[int] = []
        self.seen += [] if self.muted else self.window.ids()
        return super().training_step(batch, batch_idx)

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        assert self.replica_groups is not None
        note = {
            "step": self.global_step,
            "groups": self.replica_groups._quorum.size,
            "ids": self.seen,
        }
        with open(self.folder / f"notes_{self.replica_groups._quorum.place.number}", "a") as file:
            file.write(json.dumps(note) + "\n")
        if self.life == "lives" and self.global_step == GOES_ON_TO:
            (self.folder / "went on").touch()
            _await(self.folder / "back")


def keep_lighthouse(folder: Path, at_least: int) -> None:
    """A lighthouse, until it is killed, with its address in a file."""
    os.environ["RUST_LOG"] = "error"
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="[::]:0", min_replicas=at_least, join_timeout_ms=30000, heartbeat_timeout_ms=3000
    )
    (folder / "address.new").write_text(server.address())
    (folder / "address.new").rename(folder / "address")
    time.sleep(1000)


def be_a_group(folder: Path, number: int, life: str, timeout: float = 600.0) -> Any:
    """One group's life; returns its weights, and whether it has written."""
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHFT_LIGHTHOUSE": (folder / "address").read_text(),
        "REPLICA_GROUP_ID": str(number),
        "NUM_REPLICA_GROUPS": "2",
    }
    joins = Quorum.open

    def and_tell(self: Quorum, *arguments: Any) -> None:
        joins(self, *arguments)
        (folder / (life if life == "back" else f"joined_{number}")).touch()
        _await(folder / f"joined_{1 - number}")

    Quorum.open = and_tell
    replica_groups.ROWS = 3
    parallel = Parallel(timeout=timeout)
    trainer = Member(**whole(folder / "run", 2, gradient_accumulation_steps=2, parallel=parallel))
    trainer.folder, trainer.life = folder, life
    trainer.fit(seed=1)
    assert trainer.replica_groups is not None
    return weights(trainer), trainer.replica_groups.writes


class Groups:
    """Starts groups, and ends what is left of them."""

    def __init__(self, ranks: Ranks, folder: Path, at_least: int) -> None:
        self._ranks, self._folder = ranks, folder
        self._lighthouse = ranks.start(keep_lighthouse, 1, folder, at_least)
        _await(folder / "address")

    def start(self, number: int, life: str = "") -> Any:
        return self._ranks.start(be_a_group, 1, self._folder, number, life)

    def notes(self) -> list[dict[str, Any]]:
        files = sorted(self._folder.glob("notes_*"))
        return [json.loads(text) for file in files for text in file.read_text().splitlines()]

    def close(self) -> None:
        self._lighthouse.signal(signal.SIGKILL)
        self._lighthouse.wait(10)


def _await(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.05)


def alone(folder: Path) -> Trainer:
    """One process that takes the same steps."""
    trainer = Weighed(**whole(folder, 8))
    trainer.fit(seed=1)
    return trainer


def check_like_one(folder: Path, one: Trainer, of_groups: list[dict[str, Any]]) -> None:
    """Equal weights in all groups, near those of one process; the same rows; all is recorded."""
    assert bits(of_groups[0]) == bits(of_groups[1])
    for name, value in weights(one).items():
        torch.testing.assert_close(of_groups[0][name], value, rtol=0, atol=1e-6)
    ours, theirs = rows(folder / "run"), rows(folder / "one")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, abs=2e-6)
    record = json.loads((folder / "run/run.json").read_text())
    assert (record["status"], record["step"]) == ("complete", STEPS)
    assert not (folder / "run/.groups").exists()


def check_each_once(notes: list[dict[str, Any]]) -> None:
    """Every sample once in each epoch, in steps of the samples that they have in one process."""
    for epoch in range(EPOCHS):
        steps = range(7 * epoch + 1, 7 * epoch + 8)
        seen = Counter(i for note in notes if note["step"] in steps for i in note["ids"])
        assert seen == Counter(range(SAMPLES))


def test_without_a_lighthouse_nothing_is_trained(ranks: Ranks, tmp_path: Path):
    (tmp_path / "address").write_text("http://localhost:1")
    outcome = ranks.start(be_a_group, 1, tmp_path, 0, "", 1.0).wait(60)[0]
    assert outcome.code == 1
    assert "TORCHFT_LIGHTHOUSE=http://localhost:1: there is no lighthouse" in outcome.output


def test_a_group_that_nobody_joins_gives_up(ranks: Ranks, tmp_path: Path):
    groups = Groups(ranks, tmp_path, at_least=2)
    try:
        (tmp_path / "joined_1").touch()
        outcome = ranks.start(be_a_group, 1, tmp_path, 0, "", 1.0).wait(60)[0]
    finally:
        groups.close()
    assert outcome.code == 1
    assert "PeerError: replica group 0 has not found the others within 0:00:01" in outcome.output


def test_a_group_that_waits_for_others_stops_at_a_signal(ranks: Ranks, tmp_path: Path):
    groups = Groups(ranks, tmp_path, at_least=2)
    try:
        (tmp_path / "joined_1").touch()
        waiting = groups.start(0)
        _await(tmp_path / "joined_0")
        waiting.signal(signal.SIGTERM)
        ended = waiting.wait(60)[0]
    finally:
        groups.close()
    assert ended.code == 75, ended.output
    assert checkpoints(tmp_path / "run") == ["step_00000000"]
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], record["stopped_by"]) == ("stopped", "signal SIGTERM")


def test_two_groups_are_one_run(ranks: Ranks, tmp_path: Path):
    groups = Groups(ranks, tmp_path, at_least=2)
    try:
        started = [groups.start(number) for number in (0, 1)]
        ended = [each.wait(150)[0] for each in started]
    finally:
        groups.close()
    assert [one.code for one in ended] == [0, 0], "\n".join(one.output for one in ended)
    check_like_one(tmp_path, alone(tmp_path / "one"), [one.value[0] for one in ended])
    assert sorted(one.value[1] for one in ended) == [False, True]
    check_each_once(groups.notes())
    assert {note["groups"] for note in groups.notes()} == {2}


def test_a_group_that_is_killed_comes_back(ranks: Ranks, tmp_path: Path):
    """Given two groups, when the one that writes is killed within a step, then the other takes that
    step and the next ones alone, and goes on writing; and the first, started again, goes on with
    it, to the end of one process's run."""
    groups = Groups(ranks, tmp_path, at_least=1)
    try:
        first = groups.start(0, "dies")
        _await(tmp_path / "run/.lock")  # so that it is the one that writes
        other = groups.start(1, "lives")
        dead = first.wait(150)[0]
        _await(tmp_path / "went on")
        again = groups.start(0, "back").wait(150)[0]
        lived = other.wait(150)[0]
    finally:
        groups.close()
    assert dead.code == -signal.SIGKILL, dead.output
    assert (lived.code, again.code) == (0, 0), lived.output + again.output
    check_like_one(tmp_path, alone(tmp_path / "one"), [lived.value[0], again.value[0]])
    assert (lived.value[1], again.value[1]) == (True, False)
    check_each_once(groups.notes())
    taken = {note["step"]: note["groups"] for note in groups.notes()}
    assert [taken[step] for step in (DIES_AT, DIES_AT + 1, GOES_ON_TO, STEPS)] == [2, 1, 1, 2]
