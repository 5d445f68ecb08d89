"""P1 Exact resume on 2 and 4 ranks: stopped by one of them, resumed in new processes.

Each chain stops a run after several steps in turn, resumes it in new processes each time, and ends
with the bits of one run that never stopped: parameters, buffers, optimizer state, averaged weights,
rows, sample ids and events, on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from builders import Noisy, Regression, loader
from mixture import Mixture
from paceline import CheckpointPolicy, MetricMonitor, Parallel, Trainer
from paceline.callbacks import AveragedWeights
from paceline.testing import Ending, Ranks, assert_continues, bits, traced_run
from paceline.trainer import stop
from paceline.trainer.callback import Callback


@dataclass(frozen=True)
class Plan:
    """What to train on and how far.

    97 samples in batches of 5 on 2 ranks (3 on 4), accumulation 3: windows of 30 (36), the last one
    short, on 4 ranks with stand-ins.
    """

    data: str = "indexed"
    batch: int = 5
    steps: int = 9
    epoch_length: int | None = None
    workers: int = 0
    stopper: int = 1
    shard: int = 1
    precision: Any = "fp32"
    tensor: int = 1
    expert: int = 1
    stages: int = 1

    def parallel(self) -> Parallel:
        halves = {"5": "colwise", "7": "rowwise"} if self.tensor > 1 else None
        plan = {"0.1.experts": "experts"} if self.expert > 1 else halves
        sizes = {"dp_shard": self.shard, "tensor": self.tensor, "pipeline": self.stages}
        return Parallel(**sizes, expert=self.expert, plan=plan)


def model(plan: Plan) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        stem = nn.Linear(8, 16)
        return nn.Sequential(
            stem if plan.expert == 1 else nn.Sequential(stem, Mixture(16)),
            nn.Unflatten(1, (4, 4)),
            nn.BatchNorm1d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16, 24),
            nn.Tanh(),
            nn.Linear(24, 1),
        )


class StopFrom(Callback):
    """One rank asks for a stop after `step` windows; the others wait until they have heard of it,
    so that the test stops where it means to."""

    def __init__(self, step: int | None, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_start(self, trainer: Any) -> None:
        self.ask(trainer)

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.ask(trainer)

    def ask(self, trainer: Any) -> None:
        if trainer.global_step != self.step:
            return
        if trainer.world.rank == self.rank:
            trainer.request_stop("test")
        give_up = time.monotonic() + (5 if trainer.world.size > 1 else 0)
        while not trainer.stop_agreement._frozen and time.monotonic() < give_up:
            time.sleep(0.002)


class Share(IterableDataset):
    """A rank's share of a permutation that depends on the pass; it knows where it stands. The
    ranks' shares are uneven: rank 0 has twice what the others have."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.at, self.epoch = rank, size, 0, 0
        self.rows = Noisy()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng(self.epoch).permutation(60)
        own = [i for i, n in enumerate(order) if n % (self.size + 1) in owned(self.rank, self.size)]
        while self.at < len(own):
            self.at += 1
            yield self.rows[int(order[own[self.at - 1]])]
        self.at = 0


def owned(rank: int, size: int) -> tuple[int, ...]:
    return (0, size) if rank == 0 else (rank,)


class Plain:
    """Batches of a rank's share of a permutation drawn from torch's generator, augmented."""

    def __init__(self, rank: int, size: int, batch: int) -> None:
        self.rank, self.size, self.batch = rank, size, batch
        self.rows = Noisy()

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(60).tolist()
        own = [n for n in order if n % (self.size + 1) in owned(self.rank, self.size)]
        for i in range(0, len(own), self.batch):
            x, y, ids = zip(*(self.rows[n] for n in own[i : i + self.batch]), strict=True)
            yield torch.stack(x), torch.stack(y), torch.tensor(ids)


def training_data(plan: Plan, world: Any) -> Any:
    if plan.data == "indexed":
        workers = {"num_workers": plan.workers, "persistent_workers": plan.workers > 0}
        return loader(Noisy(), plan.batch, **workers)
    if plan.data == "stateful":
        return StatefulDataLoader(Share(world.rank, world.size), plan.batch)
    return Plain(world.rank, world.size, plan.batch)


class OnRanks(Regression):
    def configure(self) -> None:
        self.train_dataloader = training_data(self.data_plan, self.world)


class InStages(Trainer):
    """What is trained in stages takes pairs, and has no step of its own."""

    def configure(self) -> None:
        self.seen: dict[int, list[int]] = {}
        self.loss_fn = lambda outputs, targets: ((outputs - targets[0]) ** 2).mean()
        for name in ("train_dataloader", "val_dataloader"):
            rows = getattr(self, name) or loader(Noisy(), self.data_plan.batch)
            setattr(self, name, loader(rows.dataset, rows.batch_size, collate_fn=paired))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(self.global_step, []).extend(batch[1][1].tolist())


def paired(rows: list[Any]) -> Any:
    x, y, ids = zip(*rows, strict=True)
    return torch.stack(x), (torch.stack(y), torch.tensor(ids))


@dataclass(frozen=True)
class Part:
    """A run, or its part up to a stop, on one rank: what came of it, its weights and sample ids."""

    ending: Ending
    weights: Any
    seen: list[tuple[int, list[int]]]


def train(folder: Path, plan: Plan, stop_after: int | None = None, *callbacks: Callback) -> Part:
    """Trains on this rank from where the folder's run stands."""
    stop._POLL = 0.01
    network = model(plan)
    # Where parameters are spread torch plans each operation of a step in each process anew.
    spread = plan.shard * plan.tensor * plan.expert > 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=spread)
    trainer = (InStages if plan.stages > 1 else OnRanks)(
        model=network,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
        train_dataloader=[],
        val_dataloader=loader(Noisy(23), 4, shuffle=False),
        max_steps=plan.steps,
        epoch_length=plan.epoch_length,
        gradient_accumulation_steps=3,
        max_grad_norm=1.0,
        metric_monitor=MetricMonitor(),
        callbacks=[AveragedWeights(decay=0.9), StopFrom(stop_after, plan.stopper), *callbacks],
        checkpoint=CheckpointPolicy(every_steps=4),
        progress=False,
        log_every=2,
        parallel=plan.parallel(),
        precision=plan.precision,
        run_dir=folder,
    )
    trainer.data_plan = plan
    ending = traced_run(lambda _: trainer, folder, seed=11)
    return Part(ending, bits(dict(network.state_dict())), list(trainer.seen.items()))


def check_chain(ranks: Ranks, size: int, folder: Path, plan: Plan, stops: list[int]) -> None:
    """Stopped after each of `stops` in turn, the run ends as one that never stopped."""
    whole, parts = [], []
    for stop_after in stops:
        if parts:
            parts.append(ranks(train, size, folder / "broken", plan, stop_after))
        else:
            whole, first = begin(ranks, size, folder, plan, stop_after)
            parts = [first]
        steps = {part.ending.result.global_step for part in parts[-1]}
        assert steps == {stop_after}, "the ranks stop at one step, the one that was meant"
        assert {part.ending.result.stopped_by for part in parts[-1]} == {"test"}
    parts.append(ranks(train, size, folder / "broken", plan))
    check_parts(parts, whole, folder)


def begin(
    ranks: Ranks, size: int, folder: Path, plan: Plan, *stops: Any
) -> tuple[list[Part], list[Part]]:
    """The whole run and the first part of one that is stopped, one after the other in the same
    processes: these have planned the operations of spread parameters by then, which is slow."""
    both = ranks(train_both, size, folder, plan, *stops)
    return [whole for whole, _ in both], [first for _, first in both]


def train_both(folder: Path, plan: Plan, *stops: Any) -> tuple[Part, Part]:
    return train(folder / "whole", plan), train(folder / "broken", plan, *stops)


def check_parts(parts: list[list[Part]], whole: list[Part], folder: Path) -> None:
    """On each rank the parts add up to the whole, and so do the rows."""
    for rank, one in enumerate(whole):
        mine = [part[rank] for part in parts]
        assert_continues([part.ending for part in mine], one.ending)
        assert mine[-1].weights == one.weights, f"rank {rank}: weights"
        seen = [entry for part in mine for entry in part.seen]
        assert seen == one.seen, f"rank {rank}: sample ids"
    rows = [(folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("size", "batch", "stops"), [(2, 5, [0, 1, 3, 4, 8]), (4, 3, [1, 3])])
def test_stopped_again_and_again(
    ranks: Ranks, size: int, batch: int, stops: list[int], tmp_path: Path
) -> None:
    """Before the first step, within an epoch, at its end (step 4 on 2 ranks, 3 on 4), which is at
    a checkpoint on 2 ranks, before the last step; 4 ranks show what DDP's buckets do."""
    check_chain(ranks, size, tmp_path, Plan(batch=batch), stops)


@pytest.mark.parametrize(("size", "batch", "stops"), [(2, 5, [0, 3]), (4, 3, [2])])
def test_sharded_and_stopped_again_and_again(
    ranks: Ranks, size: int, batch: int, stops: list[int], tmp_path: Path
) -> None:
    """FSDP2 on 2 ranks, and two copies of two shards on 4."""
    check_chain(ranks, size, tmp_path, Plan(batch=batch, steps=5, shard=2), stops)


def test_sharded_in_bfloat16_and_stopped_again(ranks: Ranks, tmp_path: Path) -> None:
    """What is gathered is rounded; what is kept and saved is not."""
    check_chain(ranks, 2, tmp_path, Plan(steps=4, shard=2, precision="bf16"), [2])


@pytest.mark.parametrize(
    ("size", "plan"),
    [(2, Plan(batch=10, steps=5, tensor=2)), (4, Plan(steps=3, shard=2, tensor=2))],
)
def test_split_and_stopped_again_and_again(
    ranks: Ranks, size: int, plan: Plan, tmp_path: Path
) -> None:
    """Modules split over two ranks, alone and with FSDP2."""
    check_chain(ranks, size, tmp_path, plan, [3 if size == 2 else 2])


@pytest.mark.parametrize(("size", "plan"), [(2, Plan(steps=5, expert=2))])
def test_with_some_of_the_experts_and_stopped_again(
    ranks: Ranks, size: int, plan: Plan, tmp_path: Path
) -> None:
    """Experts on one rank each; `test_expert_combinations.py` has them beside other layouts."""
    check_chain(ranks, size, tmp_path, plan, [3])


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (2, Plan(batch=10, stages=2)),
        (4, Plan(steps=3, stages=2, shard=2)),
    ],
)
def test_in_stages_and_stopped_again_and_again(
    ranks: Ranks, size: int, plan: Plan, tmp_path: Path
) -> None:
    """Two stages, the first with running statistics, the second with dropout; on four ranks two
    shards of each. `test_stage_layouts.py` has them with split modules and parts of sequences."""
    check_chain(ranks, size, tmp_path, plan, [2, 5] if size == 2 else [2])


class StopInValidation(Callback):
    """Rank 1 asks for a stop in the validation at the end of the first epoch."""

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4 and batch_idx == 0:
            if trainer.world.rank == 1:
                trainer.request_stop("test")
            trainer.stop_agreement._agreed.wait(5)


@pytest.mark.parametrize("shard", [1, 2])
def test_stopped_in_validation(ranks: Ranks, shard: int, tmp_path: Path) -> None:
    """It is abandoned on every rank, and the resumed run begins with it."""
    plan = Plan(shard=shard)
    whole, first = begin(ranks, 2, tmp_path, plan, None, StopInValidation())
    second = ranks(train, 2, tmp_path / "broken", plan)
    for before, after in zip(first, second, strict=True):
        assert before.ending.result.global_step == 4
        assert before.ending.state["progress"]["pending"] == ["validation"]
        assert ("on_validation_start", 4) in after.ending.events
    check_parts([first, second], whole, tmp_path)


def test_loader_workers_change_nothing(ranks: Ranks, tmp_path: Path) -> None:
    check_chain(ranks, 2, tmp_path, Plan(workers=1, steps=6), [2])


@pytest.mark.parametrize("epoch_length", [None, 4])
@pytest.mark.parametrize("data", ["stateful", "replayed"])
def test_streams_of_uneven_shares(
    ranks: Ranks, data: str, epoch_length: int | None, tmp_path: Path
) -> None:
    """Rank 0's share is twice the other's: without `epoch_length` the other stands in until the
    epoch ends, also when resumed there; with it, each rank's loader begins its next pass alone."""
    check_chain(ranks, 2, tmp_path, Plan(data, 5, 8, epoch_length), [1, 5])


def test_a_stream_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    for data, length in (("stateful", None), ("replayed", None), ("stateful", 4)):
        plan = Plan(data, 7, 8, length, stopper=0)
        check_chain(ranks, 1, tmp_path / f"{data}{length}", plan, [1, 4])
