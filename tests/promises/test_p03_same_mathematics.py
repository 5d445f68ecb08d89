"""P3 The same mathematics at any layout: how a window is split over micro-batches and ranks is
nobody's business but the clock's.

Models and data are in double precision and plain SGD keeps rounding errors as small as they are.
Stages are in a file of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mathematics import CASES, FEW, SOME, TOLERANCE, Case, Keep, assert_same, data
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

from mixture import Mixture
from paceline import Parallel, Trainer
from paceline.errors import LossError, NonFiniteError
from paceline.parallel.ddp import Replica
from paceline.testing import Ranks
from paceline.trainer.callback import Callback
from paceline.world.world import World


def network(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "norm":  # over 3 positions, so that a batch of one sample has a variance
        norm = nn.BatchNorm1d(2)
        return nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 5)).double()
    if kind == "experts":  # of which the last two get few rows
        return nn.Sequential(nn.Linear(6, 4), Mixture(4, favour=2.0), nn.Linear(4, 5)).double()
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()


class Fit(Trainer):
    """Squared error, the mean over samples."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _, ids = batch
        self.log("train/x", x.mean(), weight=len(ids))
        self.log("train/count", 1.0, weight=len(ids))
        return (self.model(x) - y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _, _ = batch
        self.take(x.sum(), x.numel())
        self.log("val/loss", (self.model(x) - y).square().mean(), weight=len(x))

    def on_validation_start(self) -> None:
        self.sums = [0.0, 0]

    def take(self, total: torch.Tensor, count: int) -> None:
        self.sums = [self.sums[0] + total.item(), self.sums[1] + count]

    def get_val_metrics(self) -> dict[str, Any]:
        return {"val/own": self.sums[0] / self.sums[1]}


class FitTokens(Fit):
    """Squared error, the mean over masked items: a loss without items is 0 / 0."""

    def count_items(self, batch: Any) -> Any:
        return batch[2].sum()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, mask, ids = batch
        self.log("train/x", x.mean(), weight=len(ids))
        self.log("train/y", (y * mask).sum() / mask.sum())
        return ((self.model(x) - y).square() * mask).sum() / mask.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, mask, _ = batch
        self.take(y[mask].sum(), mask.sum().item())
        self.log("val/tokens", ((self.model(x) - y).square() * mask).sum() / mask.sum())


def fit(case: Case, *callbacks: Callback, kind: type[Fit] | None = None, **settings: Any) -> Any:
    """Runs a case on this rank; returns all that is to be the same."""
    model, keep = network(case.model), Keep()
    if case.precision != "fp32":
        model = model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = (kind or (FitTokens if case.tokens else Fit))(
        model=model,
        optimizer=optimizer,
        train_dataloader=DataLoader(data(case.rows), case.batch, shuffle=case.shuffle),
        val_dataloader=DataLoader(data(23, 1), case.batch),
        epochs=case.epochs,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=1.0,
        precision=case.precision,
        log_every=1,
        progress=False,
        callbacks=[keep, *callbacks],
        **settings,
    )
    trainer.train(seed=4)
    return {
        "parameters": keep.parameters,
        "rows": keep.rows,
        "validations": keep.validations,
        "buffers": keep.buffers,
        "stood_in": keep.stood_in,
        "trainer": trainer if trainer.world.size == 1 else None,
    }


def fits(cases: list[Case], parallel: Parallel | None = None) -> list[Any]:
    """Runs cases one after another in one process, as a script with a loop would."""
    return [fit(case, parallel=parallel) for case in cases]


@pytest.mark.parametrize("tokens", [False, True])
def test_micro_batches_equal_one_batch(tokens: bool) -> None:
    """Given 97 samples (or ragged tokens, none at all in some batches), k micro-batches of b take
    the same steps as one batch of k x b, short last windows included."""
    whole = fit(Case(batch=20, tokens=tokens, shuffle=not tokens))
    for batch, accumulation in ((10, 2), (5, 4), (4, 5), (1, 20)):
        case = Case(97, batch, accumulation, tokens, shuffle=not tokens)
        assert_same(fit(case), whole, case)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_with_as_many_times_the_batch(ranks: Ranks, size: int) -> None:
    """Sizes that divide nothing, one sample, fewer samples than ranks, ragged tokens, accumulation:
    parameters, losses, gradient norms, metrics and counts are those of one rank."""
    check_ranks(ranks, size, CASES if size == 2 else SOME)


@pytest.mark.parametrize(("size", "shard"), [(2, 2), (4, 2)])
def test_sharded_ranks_equal_one_too(ranks: Ranks, size: int, shard: int) -> None:
    """FSDP2 over all ranks, and two copies of two shards (HSDP); 12 and 5 rows leave shards of
    unequal sizes, and empty ones."""
    check_ranks(ranks, size, CASES if size == 2 else FEW, Parallel(dp_shard=shard))


@pytest.mark.parametrize(("size", "shard"), [(2, 1), (4, 2)])
def test_ranks_with_split_modules_equal_one_too(ranks: Ranks, size: int, shard: int) -> None:
    """Tensor parallelism over two ranks: alone, and with FSDP2 over two shares."""
    plan = {"0": "colwise", "2": "rowwise"}
    check_ranks(ranks, size, FEW, Parallel(dp_shard=shard, tensor=2, plan=plan))


@pytest.mark.parametrize(("size", "shard", "experts"), [(2, 1, 2), (4, 1, 2), (4, 4, 2)])
def test_ranks_with_some_of_the_experts_equal_one_too(
    ranks: Ranks, size: int, shard: int, experts: int
) -> None:
    """Expert parallelism over two ranks, and over two of four: the others have copies or shards.
    Experts and whole ranks go without rows."""
    cases = [replace(case, model="experts") for case in FEW]
    plan = {"*.experts": "experts"}
    check_ranks(ranks, size, cases, Parallel(dp_shard=shard, expert=experts, plan=plan))


def check_ranks(
    ranks: Ranks, size: int, cases: list[Case], parallel: Parallel | None = None
) -> None:
    outcomes = ranks(fits, size, cases, parallel)
    shares = size // (parallel.tensor * parallel.pipeline if parallel else 1)
    for i, case in enumerate(cases):
        expected = fit(replace(case, batch=case.batch * shares))
        for rank in range(size):
            assert_same(outcomes[rank][i], expected, (case, f"rank {rank} of {size}"))


def test_metrics_are_means_over_all_items() -> None:
    """Rows and validations against the same means taken by hand."""
    case = Case(batch=10, accumulation=3, tokens=True, shuffle=False, epochs=1)
    outcome = fit(case)
    x, y, mask, _ = data(97).tensors
    for i, row in enumerate(outcome["rows"]):
        window = slice(30 * i, 30 * i + 30)
        assert row["train/x"] == pytest.approx(x[window].mean().item(), rel=1e-12)
        tokens = y[window][mask[window]]
        assert row["train/y"] == pytest.approx(tokens.mean().item(), rel=1e-12)
        assert row["samples"] == min(30 * i + 30, 97)
        assert row["items"] == mask[: 30 * i + 30].sum().item()
    x, y, mask, _ = data(23, 1).tensors
    model = outcome["trainer"].model
    metrics = outcome["validations"][-1]
    assert metrics["val/own"] == pytest.approx(y[mask].mean().item(), rel=1e-12)
    tokens = ((model(x) - y).square() * mask).sum() / mask.sum()
    assert metrics["val/tokens"] == pytest.approx(tokens.item(), rel=1e-12)


class Clamped(FitTokens):
    """A loss without items is zero."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, mask, ids = batch
        self.log("train/x", x.mean(), weight=len(ids))
        self.log("train/y", (y * mask).sum() / mask.sum(), weight=mask.sum())
        return ((self.model(x) - y).square() * mask).sum() / mask.sum().clamp(min=1)


def unread(batch: int, parallel: Parallel) -> Any:
    """As on an accelerator: counts stay where they are, and nothing waits for them."""
    World.reads_are_free = property(lambda self: False)  # pyright: ignore
    case = Case(batch=batch, accumulation=2, tokens=True, shuffle=False)
    with pytest.raises(NonFiniteError):
        fit(case, parallel=parallel)  # 0 / 0, which a weight of zero does not undo
    return {**fit(case, kind=Clamped, parallel=parallel), "trainer": None}


@pytest.mark.parametrize(("size", "shard"), [(1, 1), (2, 1), (2, 2)])
def test_counts_that_nobody_reads(ranks: Ranks, size: int, shard: int) -> None:
    expected = fit(Case(batch=10, accumulation=2, tokens=True, shuffle=False))
    for outcome in ranks(unread, size, 10 // size, Parallel(dp_shard=shard)):
        assert_same(outcome, expected)


class Exchanges(Callback):
    """Counts how often DDP exchanges all gradients of each model, by window."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_setup(self, trainer: Any) -> None:
        for replica in trainer.replicas:
            replica.register_comm_hook(self, _counted)

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.window.batch_idx == trainer.progress.batch:
            self.counts.append(0)


def _counted(state, bucket):  # DDP would accept no annotations but its own
    state.counts[-1] += bucket.is_last()
    return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)


def count_exchanges() -> tuple[list[int], int]:
    exchanges = Exchanges()
    fit(Case(batch=5, accumulation=4, epochs=1), exchanges)
    return exchanges.counts, torch.distributed.is_initialized()


def test_gradients_are_exchanged_once_a_window(ranks: Ranks) -> None:
    for counts, joined in ranks(count_exchanges, 2):
        assert counts == [1] * 3  # 97 samples in windows of 40
        assert not joined  # and the group is left


@pytest.mark.parametrize(("size", "shard"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_stand_ins_leave_running_statistics_alone(ranks: Ranks, size: int, shard: int) -> None:
    """21 samples in batches of 5: the last window has one sample, and stand-ins beside it. Their
    forward pass moves no running statistics, and validation's uneven batches wait for no one."""
    case = Case(size * 10 + 1, 5, model="norm", epochs=1)
    outcomes = ranks(fits, size, [case], Parallel(dp_shard=shard))
    for rank, (outcome,) in enumerate(outcomes):
        before, after = outcome["buffers"][-2:]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert outcome["stood_in"] == [False, False, rank > 0]
        assert moved == (rank == 0)
        assert outcome["rows"][-1]["train/count"] == 1.0
        assert outcome["validations"] == outcomes[0][0]["validations"]


class Adversaries(Fit):
    """Two models and two optimizers in one window; the judge has two losses in it."""

    def step(self, window: Any) -> None:
        for real, noise, *_ in (batch for batch, _ in window):
            made = self.model["net"](real)
            judge = self.model["judge"]
            self.backward((judge(made.detach()) - judge(noise)).square().mean())
        self.optimizer_step("judge")
        self.backward((made - noise).square().mean())
        self.optimizer_step("net")


def adversaries(batch: int) -> Any:
    torch.manual_seed(2)
    models = {"net": network("plain"), "judge": nn.Linear(5, 1).double()}
    trainer = Adversaries(
        model=models,
        optimizer={name: torch.optim.SGD(m.parameters(), lr=0.05) for name, m in models.items()},
        train_dataloader=DataLoader(data(27), batch, shuffle=True),
        epochs=2,
        progress=False,
    )
    trainer.train(seed=1)
    return [p.detach() for m in models.values() for p in m.parameters()]


def test_two_models_that_take_turns_are_exchanged_too(ranks: Ranks) -> None:
    expected = adversaries(8)
    for parameters in ranks(adversaries, 4, 2):
        for a, b in zip(parameters, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


class Bypassing(Fit):
    """Uses the model's parts without calling it, so that DDP never hears of it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, *_ = batch
        for layer in self.model.module if isinstance(self.model, Replica) else self.model:
            x = layer(x)
        return (x - y).square().mean()


def bypassed() -> str:
    with pytest.raises(LossError) as caught:
        fit(Case(), kind=Bypassing)
    return str(caught.value)


def test_gradients_that_nobody_exchanged_are_refused(ranks: Ranks) -> None:
    for message in ranks(bypassed, 2):
        assert "did not exchange" in message


class Halved(Fit):
    """Single precision data; the first windows overflow at the scale that fp16 begins with."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, *_ = batch
        factor = 1e4 if self.precision == "fp16" and self.global_step < 2 else 1.0
        return factor * (self.model(x.float()) - y.float()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def get_val_metrics(self) -> dict[str, Any]:
        return {}


def low_precision(precision: str, batch: int) -> Any:
    scales: list[float] = []

    class Scales(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            scales.append(trainer.optimization.scaler.get_scale() if precision == "fp16" else 1.0)

    case = Case(batch=batch, accumulation=2, precision=precision)
    return fit(case, Scales(), kind=Halved)["parameters"], scales


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_on_two_ranks(ranks: Ranks, precision: str) -> None:
    """Equal on both ranks and, to the precision, to one; an overflow of float16 on the way is the
    scaler's business and no error."""
    expected, _ = low_precision(precision, 10)
    for parameters, scales in ranks(low_precision, 2, precision, 5):
        for a, b in zip(parameters, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.002)
        assert scales[0] == (2**15 if precision == "fp16" else 1)
