"""Ranks act as one: they stop together, fail together, and decide together."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import Small, small
from torch import nn

from paceline import MetricMonitor, Parallel
from paceline.errors import ConfigError, PeerError, PeerFailure
from paceline.testing import Ranks
from paceline.trainer import stop
from paceline.trainer.callback import Callback
from paceline.trainer.stop import behind_boundary, behind_window
from paceline.world.world import World, send

# Stopping


class AskSoon(Callback):
    """One rank asks for a stop at some moment between two validations, or within one."""

    def __init__(self, rank: int, event: int) -> None:
        self.rank, self.left = rank, event

    def count(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0 and trainer.world.rank == self.rank:
            trainer.request_stop("asked")

    on_train_batch_end = on_validation_batch_end = on_step_end = on_metrics = count


def stop_often(times: int, places: set[tuple[str, ...]]) -> list[Any]:
    """Runs that are asked to stop by any rank, at any event, with ranks out of step.

    There are `times` of them, and more until one has stopped at each of the places: where a run
    stops depends on how fast the machine is.
    """
    stop._POLL = 0.003
    draws, ends = random.Random(0), []
    World().open()  # ... a group of our own, in which run follows run
    while len(ends) < times or (len(ends) < 100 and not places <= {tuple(at) for _, at, _ in ends}):
        asker = AskSoon(draws.randrange(World().size), draws.randrange(1, 60))
        trainer = small(asker, validate_every=2, rows=46, max_steps=40)
        trainer.jitter = 0.004
        trainer.train(seed=1)
        ends.append((trainer.global_step, trainer.progress.pending, trainer.result.stopped_by))
    joined = dist.is_initialized()
    dist.destroy_process_group()
    assert joined, "a group that is the caller's own is left alone"
    return ends


def test_whoever_asks_and_whenever_all_stop_at_one_boundary(ranks: Ranks) -> None:
    """8 runs or more on 4 ranks, out of step on purpose, in one process group."""
    places = {("validation",), ()}
    first, *others = ranks(stop_often, 4, 8, places, limit=240)
    assert all(other == first for other in others)
    assert {reason for _, _, reason in first} == {"asked"}
    assert {tuple(pending) for _, pending, _ in first} >= places


def agree(in_validation: bool) -> list[bool]:
    """Rank 0 is a boundary ahead of rank 1, or in its validation, when the stop is asked for."""
    stop._POLL = 0.005
    world = World(Parallel(timeout=20)).open()
    agreement = stop.StopAgreement(world, None)
    agreement.watch(lambda: "here")
    agreement.open(behind_boundary(0))
    said = [agreement.reached(behind_boundary(0))]  # the first window begins
    if world.rank == 0:
        said.append(agreement.reached(behind_window(1)))  # and is done: on to the second, or ...
        if in_validation:
            agreement.hold(behind_boundary(1))
    world.barrier()
    if world.rank == 1:
        agreement.request("test")
    while not agreement._frozen:
        time.sleep(0.001)
    if world.rank == 1:
        said.append(agreement.reached(behind_window(1)))
        agreement.hold(behind_boundary(1))
    said.append(
        agreement.reached(behind_boundary(1))
        if in_validation
        else agreement.reached(behind_window(2))
    )
    said.append(agreement.abandons(behind_boundary(1)))
    world.barrier()
    agreement.close()
    world.close()
    return said


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_rank_that_is_behind_comes_to_where_the_other_is(
    ranks: Ranks, in_validation: bool
) -> None:
    assert ranks(agree, 2, in_validation) == [[False, False, True, in_validation]] * 2


class Exchanging(Small):
    """Its validation steps exchange something, as metrics and models spread over ranks do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        seen = torch.tensor(float(batch_idx))
        self.world.all_reduce(seen)
        assert seen == self.world.size * batch_idx
        super().validation_step(batch, batch_idx)
        time.sleep(random.Random(time.monotonic()).random() * 0.02)


def exchange_and_stop(times: int) -> list[tuple[int, list[str]]]:
    """Runs that are asked to stop somewhere in their one long validation."""
    stop._POLL = 0.003
    World().open()
    ends = []
    for i in range(times):
        trainer = small(AskSoon(i % 2, 3 + 2 * i), rows=80, max_steps=2, validate_every=1)
        trainer.__class__ = Exchanging
        trainer.train(seed=1)
        ends.append((trainer.global_step, trainer.progress.pending))
    dist.destroy_process_group()
    return ends


def test_a_validation_that_exchanges_something_is_left_at_the_same_batch(ranks: Ranks) -> None:
    first, second = ranks(exchange_and_stop, 2, 8)
    assert first == second
    assert (1, ["validation"]) in first


class Signalled(Callback):
    """The scheduler's signal reaches one rank only."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.world.rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def signalled(folder: Path) -> None:
    small(Signalled(), run_dir=folder, max_steps=10**6, epochs=None).train(seed=1)


def test_a_signal_to_one_rank_stops_all_with_code_75(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(signalled, 3, tmp_path)
    assert [outcome.code for outcome in outcomes] == [75] * 3, outcomes
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 1


# Being alike


class Looks(Callback):
    """Looks at rows, on one rank only."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.rows += [metrics] if metrics else []


class Taught(Small):
    """A frozen model beside the trained one, made without a seed."""

    def configure(self) -> None:
        torch.manual_seed(self.world.rank)
        self.teacher = nn.BatchNorm1d(3).requires_grad_(False).double()
        nn.init.normal_(self.teacher.weight)
        self.teacher.register_buffer("turns", torch.randn(2, 3, dtype=torch.complex64).t())


def unlike() -> Any:
    Small.configure = Taught.configure  # pyright: ignore
    looks = Looks()
    trainer = small(*([looks] if World().rank == 0 else []), log_every=2)
    trainer.train(seed=1)
    threads = [thread.name for thread in threading.enumerate()]
    return trainer.teacher.weight.tolist(), trainer.teacher.turns.tolist(), len(looks.rows), threads


def test_ranks_that_differ_are_made_alike(ranks: Ranks) -> None:
    """A callback on one rank holds up no other, frozen models are rank 0's, and no thread stays."""
    first, *others = ranks(unlike, 3)
    assert first[2] == 6
    assert first[3] == ["MainThread"]
    for other in others:
        assert other[:2] == first[:2]


def sent() -> Any:
    with closing(World().open()) as world:
        torch.manual_seed(world.rank)
        tensors = [
            nn.Parameter(torch.randn(2, 3).t()),
            nn.Parameter(torch.randn(2, 3, dtype=torch.complex64)),
            nn.Parameter(torch.randn(2, 3, dtype=torch.complex64).t()),
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        ]
        send(tensors)
    return [(t.tolist(), t.stride(), t.requires_grad, t.is_leaf) for t in tensors]


def test_what_is_sent_is_written_in_place_however_it_lies(ranks: Ranks) -> None:
    """Trainable or not, complex, transposed, channels last: it stays what it was, with rank 0's
    values."""
    first, other = ranks(sent, 2)
    assert other == first
    assert [(requires_grad, leaf) for *_, requires_grad, leaf in first[:3]] == [(True, True)] * 3


# Failing


class Fails(Callback):
    """Something happens to one rank at some event."""

    def __init__(self, rank: int, event: str, what: str) -> None:
        self.rank, self.what = rank, what
        setattr(self, event, self.happen)

    def happen(self, trainer: Any, *_: Any) -> None:
        if trainer.world.rank != self.rank or trainer.global_step < self.what.count("later"):
            return
        if self.what.startswith("raise"):
            raise ValueError("the disk of rank 7")
        if self.what.startswith("exit"):
            sys.exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def fail(folder: Path, rank: int, event: str, what: str) -> None:
    stop._PEER_GRACE = 5.0
    small(Fails(rank, event, what), run_dir=folder, log_every=1).train(seed=1)


@pytest.mark.parametrize(
    ("rank", "event", "what"),
    [
        (1, "on_train_batch_start", "raise later later"),
        (0, "on_before_optimizer_step", "raise later"),
        (2, "on_validation_batch_end", "raise"),
        (1, "on_setup", "raise"),
        (1, "on_train_batch_start", "exit"),
        (1, "on_train_batch_start", "killed later"),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    ranks: Ranks, tmp_path: Path, rank: int, event: str, what: str
) -> None:
    """Within seconds; and each says who it was."""
    outcomes = ranks.outcomes(fail, 3, tmp_path, rank, event, what)
    for other, outcome in enumerate(outcomes):
        assert outcome.code is not None, "nobody hangs"
        assert outcome.seconds < 30
        if other == rank:
            code = {"raise": 1, "exit": 0, "killed": -signal.SIGKILL}[what.split()[0]]
            assert outcome.code == code
        elif not what.startswith("killed"):
            assert outcome.code == 1, outcome.output
            error = "ValueError: the disk of rank 7" if "raise" in what else "SystemExit: 0"
            assert f"rank {rank} failed: {error}" in outcome.output
        else:
            assert outcome.code != 0


# Deciding


class Biased(Small):
    """An evaluation of its own, which forgets to reduce: each rank has another value."""

    def evaluate(self) -> dict[str, float]:
        return {"val/loss": 1.0 + self.world.rank * self.global_step}


def decide(folder: Path) -> Any:
    Small.evaluate = Biased.evaluate  # pyright: ignore
    trainer = small(
        validate_every=1, metric_monitor=MetricMonitor(), early_stop=3, run_dir=folder, max_steps=20
    )
    trainer.train(seed=1)
    return (
        trainer.global_step,
        trainer.result.best,
        trainer.result.metrics,
        trainer.result.stopped_by,
    )


def test_what_is_best_is_decided_by_rank_0_for_all(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(decide, 2, tmp_path)
    assert first == second == (4, 1.0, {"val/loss": 1.0}, "early stop")


def hear_of_peer() -> PeerError | None:
    """What Python code sees if it is not stuck in a collective."""
    world = World(Parallel(timeout=20)).open()
    agreement = stop.StopAgreement(world, None)
    agreement.watch(lambda: "here")
    if world.rank == 1:
        agreement.fail(RuntimeError("boom"))
    seen = None
    give_up = time.monotonic() + 10
    while world.rank == 0 and not seen and time.monotonic() < give_up:
        time.sleep(0.01)
        try:
            agreement.reached(behind_window(1))
        except PeerError as error:
            seen = error
    agreement.close()
    world.close()
    return seen


def test_the_next_boundary_hears_of_a_failed_rank(ranks: Ranks) -> None:
    error = ranks(hear_of_peer, 2)[0]
    assert str(error) == "rank 1 failed: RuntimeError: boom"
    assert error.failure == PeerFailure(1, "failed", "RuntimeError: boom")


def write_apart(folder: Path) -> str:
    rank = World(Parallel()).open().rank
    try:
        small(run_dir=folder / str(rank)).train(seed=1)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_ranks_write_to_one_folder(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(write_apart, 2, tmp_path):
        assert "run_dir has to be the same on every rank" in said
        assert f"'{tmp_path}/1' on rank 1" in said
