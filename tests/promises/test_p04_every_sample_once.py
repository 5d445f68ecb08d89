"""P4 Every sample exactly once a pass, at any number of ranks, also if that number changes.

Real runs on real ranks; `test_p04_arithmetic.py` tries many more layouts without any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
)

from paceline import Trainer
from paceline.errors import DataError, ResumeError
from paceline.testing import Ranks
from paceline.trainer.callback import Callback
from paceline.world.world import World


@dataclass(frozen=True)
class Case:
    """One run over `rows` samples: how they are loaded, and what each pass has to hold."""

    rows: int = 97
    batch: int = 10
    accumulation: int = 1
    sampler: str = "shuffle"
    drop_last: bool = False
    length: int | None = None
    workers: int = 0
    epochs: int = 2


class Rows(Dataset):
    """(a number, index)"""

    def __init__(self, n: int) -> None:
        self.x = torch.linspace(-1, 1, n).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], index


class Halves:
    """A sampler of one's own: all even indices in some order, then all odd ones."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.n).tolist()
        return iter(sorted(order, key=lambda i: i % 2))


def load(case: Case) -> DataLoader:
    rows, n = Rows(case.rows), case.rows
    options: dict[str, Any] = {"num_workers": case.workers}
    batches = {"batch_size": case.batch, "drop_last": case.drop_last}
    if case.sampler == "batches":
        own = BatchSampler(RandomSampler(rows), case.batch, case.drop_last)
        return DataLoader(rows, batch_sampler=Bucketed(own), **options)
    if case.sampler == "distributed":
        options["sampler"] = DistributedSampler(rows, 2, 0)  # as a script for DDP has it
    elif case.sampler == "own":
        options["sampler"] = Halves(n)
    else:
        options["shuffle"] = case.sampler == "shuffle"
    return DataLoader(rows, **batches, **options)


class Bucketed:
    """A batch sampler of one's own: another's batches, sorted."""

    def __init__(self, inner: BatchSampler) -> None:
        self.inner, self.sampler = inner, inner.sampler

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(sorted(batch) for batch in self.inner)


class Counting(Trainer):
    """Notes which samples it trains on and validates with, by epoch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.trained: list[list[int]] = []
        self.validated: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def on_validation_start(self) -> None:
        self.validated.append([])

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.muted:
            self.trained[-1] += batch[1].tolist()
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated[-1] += batch[1].tolist()
        self.log("val/loss", self.loss(batch))
        self.log("val/ones", 1.0)


def count(cases: list[Case]) -> list[Any]:
    return [counted(case) for case in cases]


def counted(case: Case, **settings: Any) -> Any:
    model = nn.Linear(1, 1)
    loaders = load(case), DataLoader(Rows(case.rows), case.batch, drop_last=case.drop_last)
    trainer = Counting(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        epochs=case.epochs,
        epoch_length=case.length,
        gradient_accumulation_steps=case.accumulation,
        progress=False,
        **settings,
    )
    trainer.train(seed=3)
    return trainer.trained, trainer.validated, trainer.plan.as_list(), trainer.progress.samples


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def together(outcomes: list[Any], part: int) -> list[list[int]]:
    """What all ranks saw, epoch by epoch."""
    return [flat(parts) for parts in zip(*(outcome[part] for outcome in outcomes), strict=True)]


CASES = [Case(n, 2) for n in (1, 2, 3, 7, 10, 97)] + [Case(n) for n in (7, 10, 97)]
CASES += [
    Case(sampler="sequential", accumulation=3),
    Case(sampler="own"),
    Case(sampler="batches"),
    Case(sampler="distributed"),
    Case(drop_last=True),
    Case(sampler="own", drop_last=True),
    Case(7, 2, workers=1),
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_and_validation_see_every_sample_once(ranks: Ranks, size: int) -> None:
    check_runs(ranks, size, CASES)


def check_runs(ranks: Ranks, size: int, cases: list[Case]) -> None:
    outcomes = ranks(count, size, cases)
    for i, case in enumerate(cases):
        check_counts(case, [outcome[i] for outcome in outcomes])


def check_counts(case: Case, outcomes: list[Any]) -> None:
    kept = case.rows - case.rows % case.batch if case.drop_last else case.rows
    trained, validated = together(outcomes, 0), together(outcomes, 1)
    for ids in trained + validated:
        assert max(Counter(ids).values()) == 1, case
        assert len(ids) == kept, case
    assert all(set(ids) == set(range(kept)) for ids in validated), case
    assert {outcome[3] for outcome in outcomes} == {kept * case.epochs}
    if case.drop_last:
        said = [line for line in map(str, outcomes[0][2]) if "drop_last leaves out 7 of 97" in line]
        assert len(said) == 2, "of training, and of validation"


LENGTHS = [Case(length=n, epochs=4, sampler=s) for n in (1, 7) for s in ("shuffle", "own")]


def test_epochs_of_any_length_repeat_nothing(ranks: Ranks) -> None:
    """`epoch_length` shorter and longer than the loader: passes go on from epoch to epoch."""
    outcomes = ranks(count, 2, LENGTHS)
    for i, case in enumerate(LENGTHS):
        assert case.length is not None
        epochs = together([outcome[i] for outcome in outcomes], 0)
        assert [len(ids) for ids in epochs] == [20 * case.length] * 4
        whole = Counter(flat(epochs))
        passes, rest = divmod(80 * case.length, 97)
        assert set(whole.values()) <= {passes, passes + 1}
        assert sum(times == passes + 1 for times in whole.values()) == rest or passes == 0


def refused(kind: str) -> str:
    rows, rank = Rows(10), World().open().rank
    sampler: Any = {
        "share": Subset(rows, range(rank, 10, 2)).indices,
        "restless": Restless(),
    }[kind]
    with pytest.raises(DataError) as caught:
        counted_from(DataLoader(rows, 2, sampler=sampler))
    return str(caught.value)


class Restless:
    """Another order each time, whatever the seeds."""

    orders = iter([[0, 1, 2], [2, 1, 0], [1, 0, 2]])

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(next(self.orders))


def counted_from(loader: Any, validation: Any = None, **settings: Any) -> Counting:
    model = nn.Linear(1, 1)
    trainer = Counting(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=loader,
        val_dataloader=validation,
        **{"epochs": 1, "progress": False, **settings},
    )
    trainer.train(seed=3)
    return trainer


def test_a_sampler_that_shares_out_the_data_itself_is_refused(ranks: Ranks) -> None:
    """It would be shared out twice, and half the samples lost without a word."""
    for message in ranks(refused, 2, "share"):
        assert "does not give every rank the same order" in message


def test_a_sampler_that_cannot_be_drawn_again_is_refused() -> None:
    assert "another order each time" in refused("restless")


class Stream:
    """A rank's own batches; rank 3 has none, and rank 0 the most."""

    def __init__(self, rank: int, batches: int) -> None:
        self.rank, self.batches = rank, batches

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.batches):
            ids = torch.arange(2) + 2 * i + 100 * self.rank
            yield ids.unsqueeze(1).float() / 400, ids


def streamed() -> Any:
    rank = World().rank
    trainer = counted_from(Stream(rank, 6 - 2 * rank), Stream(rank, 3 - rank if rank < 3 else 0))
    return trainer.trained, trainer.validated, trainer.progress.metrics["val/ones"]


def test_streams_of_any_lengths_end_together(ranks: Ranks) -> None:
    """Ranks of 6, 4, 2 and 0 batches: a rank that has run out stands in with what it has, or with
    a batch lent by another. In validation nobody stands in and nobody waits."""
    outcomes = ranks(streamed, 4)
    for rank, (trained, validated, ones) in enumerate(outcomes):
        begin = 100 * rank
        assert trained == [list(range(begin, begin + 2 * (6 - 2 * rank)))]
        assert validated == [list(range(begin, begin + 2 * (3 - rank if rank < 3 else 0)))]
        assert ones == 1.0


def all_alike() -> None:
    with pytest.warns(UserWarning, match="each sample is seen 2 times a pass"):
        counted_from(Stream(0, 3))


def test_a_stream_that_every_rank_reads_whole_is_said(ranks: Ranks) -> None:
    ranks(all_alike, 2)


class Losses(Callback):
    """The loss and samples of each step, and a stop after some."""

    def __init__(self, until: int | None) -> None:
        self.until, self.rows = until, {}

    def on_train_start(self, trainer: Any) -> None:
        trainer.seen = {}

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        trainer.seen.setdefault(trainer.global_step, []).extend(batch[1].tolist())

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.rows[trainer.global_step - 1] = metrics["train/loss"]
        if trainer.global_step == self.until:
            trainer.stop_agreement.request("test", everywhere=True)


GIVEN = {"global_batch_size": 24}
COUNTED = {"gradient_accumulation_steps": 4}  # which is 24 on the 2 ranks that begin the run


def elastic(
    folder: Path, shuffle: bool, until: int | None, size: dict[str, int], **settings: Any
) -> Any:
    """24 samples a step, whoever computes them: from where the run stands to `until`."""
    losses = Losses(until)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    rows = Rows(97)
    rows.x = rows.x.double()
    trainer = Counting(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        train_dataloader=DataLoader(rows, 3, shuffle=shuffle),
        val_dataloader=DataLoader(rows, 7),
        epochs=3,
        callbacks=[losses],
        log_every=1,
        progress=False,
        run_dir=folder,
        **size,
        **settings,
    )
    trainer.trained = [[]]  # resumed in mid-epoch
    trainer.train(seed=5)
    weights = [p.detach() for p in model.parameters()]
    return trainer.seen, losses.rows, weights, trainer.progress.metrics


@pytest.mark.parametrize(("shuffle", "size"), [(False, GIVEN), (True, GIVEN), (True, COUNTED)])
def test_resumed_on_other_numbers_of_ranks(
    ranks: Ranks, shuffle: bool, size: dict[str, int], tmp_path: Path
) -> None:
    """2 ranks, then 1, then 4, changed in mid-epoch: each step has the samples and the loss, and
    the end has the weights and metrics, of a run on one rank that never stopped."""
    (whole,) = ranks(elastic, 1, tmp_path / "whole", shuffle, None, GIVEN)
    steps: dict[int, Counter[int]] = {}
    for number, until in ((2, 3), (1, 7), (4, None)):
        outcomes = ranks(elastic, number, tmp_path / "elastic", shuffle, until, size)
        for step, loss in outcomes[0][1].items():
            steps[step] = Counter(flat(outcome[0].get(step, []) for outcome in outcomes))
            assert loss == pytest.approx(whole[1][step], rel=1e-9)
    assert steps == {step: Counter(ids) for step, ids in whole[0].items()}
    for a, b in zip(outcomes[0][2], whole[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert outcomes[0][3] == pytest.approx(whole[3], rel=1e-9)


def refused_epoch(folder: Path) -> str:
    with pytest.raises(ResumeError) as caught:
        elastic(folder, True, None, GIVEN, epoch_length=8)
    return str(caught.value)


def test_an_epoch_of_other_samples_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """`epoch_length` counts a rank's micro-batches: on more ranks an epoch would be longer."""
    ranks(stopped_early, 1, tmp_path)
    for message in ranks(refused_epoch, 2, tmp_path):
        assert "data.units: 24 then, 48 now" in message


def stopped_early(folder: Path) -> None:
    elastic(folder, True, 2, GIVEN, epoch_length=8)
