"""Sequences in parts on several ranks: the same mathematics as whole ones on one."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import StopAt, bits
from paceline import Parallel, Trainer
from paceline.errors import ConfigError, DataError
from paceline.world.context import attention, part_of, positions
from paceline.world.dtensors import whole
from paceline.world.world import World
from ranks import Ranks

WORDS, LENGTH = 7, 8


class Reader(nn.Module):
    """A transformer block over tokens whose order matters, in double precision."""

    tp_plan = {"qkv": "colwise", "out": "rowwise"}

    def __init__(self, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = 8 // heads
        self.token, self.place = nn.Embedding(WORDS, 8), nn.Embedding(LENGTH, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, WORDS)
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place(positions(tokens.shape[1]))
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.size)).permute(3, 0, 2, 1, 4)
        x = x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.dropout(x))


def data(rows: int, length: int = LENGTH) -> TensorDataset:
    """Tokens, the tokens to come, and how many of these count: ragged, none in some rows."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(WORDS, (rows, length), generator=generator)
    counts = torch.randint(0, length + 1, (rows, 1), generator=generator)
    return TensorDataset(x, x.roll(-1, 1), torch.arange(length) < counts)


class Fit(Trainer):
    """The mean over tokens that count."""

    def count_items(self, batch: Any) -> Any:
        return batch[2].sum()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, counts = batch
        losses = nn.functional.cross_entropy(
            self.model(x).flatten(0, 1), y.flatten(), reduction="none"
        )
        return (losses * counts.flatten()).sum() / counts.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.rows = [*getattr(self, "rows", []), dict(metrics)]

    def on_train_end(self) -> None:
        parameters = self.named_models()["model"].parameters()
        self.weights = [whole(p).detach().clone() for p in parameters]


class FitSamples(Fit):
    """The mean over samples, each of which has as many tokens."""

    count_items = Trainer.count_items

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Case:
    kind: type[Fit] = Fit
    batch: int = 8
    accumulation: int = 1
    dropout: float = 0.0


CASES = [Case(), Case(batch=4, accumulation=3), Case(FitSamples), Case(FitSamples, 2, 3)]


def fit(case: Case, parallel: Parallel | None = None, *callbacks: Any, **settings: Any) -> Any:
    model = settings.pop("model", None) or Reader(dropout=case.dropout)
    training = settings.pop("data", None) or data(27)
    trainer: Any = case.kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_dataloader=DataLoader(training, case.batch, shuffle=True),
        val_dataloader=DataLoader(data(9), case.batch),
        epochs=2,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=1.0,
        log_every=1,
        progress=False,
        callbacks=callbacks,
        parallel=parallel,
        **settings,
    )
    trainer.train(seed=3)
    return getattr(trainer, "weights", None), trainer.rows, trainer.result.metrics


def fits(parallel: Parallel) -> list[Any]:
    return [fit(case, parallel) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, Parallel(context=2)),
        (4, Parallel(context=2)),
        (4, Parallel(context=2, dp_shard=2)),
        (4, Parallel(context=2, tensor=2)),
    ],
    ids=["alone", "in copies", "with shards", "with split modules"],
)
def test_parts_of_sequences_equal_whole_ones(ranks: Ranks, size: int, parallel: Parallel) -> None:
    """Losses, norms, metrics and weights, with accumulation, uneven last windows, ragged counts and
    parts in which nothing counts."""
    shares = size // (2 * parallel.tensor)
    ones = [fit(replace(case, batch=case.batch * shares)) for case in CASES]
    for outcomes in ranks(fits, size, parallel):
        for one, (weights, rows, metrics) in zip(ones, outcomes, strict=True):
            for a, b in zip(weights, one[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            assert [pytest.approx(row, rel=1e-10) for row in one[1]] == rows
            assert metrics == pytest.approx(one[2], rel=1e-10)


class Readers(nn.Module):
    """Two blocks of attention, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Embedding(WORDS, WORDS)
        self.blocks = nn.ModuleList([Looking() for _ in range(2)])
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WORDS, 24), nn.Linear(8, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, 2)).permute(3, 0, 2, 1, 4)
        return x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def fits_with_less(kinds: list[Any]) -> list[Any]:
    layouts = [Parallel(context=2, activation_checkpointing=kind) for kind in kinds]
    return [fit(Case(), layout, model=Readers())[0] for layout in layouts]


@pytest.mark.slow
def test_blocks_that_are_computed_twice_see_whole_sequences_both_times(ranks: Ranks) -> None:
    kept, *recomputed = ranks(fits_with_less, 2, [None, "full", "selective"])[0]
    assert [bits(weights) for weights in recomputed] == [bits(kept)] * 2


def resumed(folder: Path, stop_after: int | None) -> Any:
    callbacks = [StopAt(stop_after)] if stop_after else []
    case = Case(dropout=0.3)
    weights, rows, _ = fit(case, Parallel(context=2), *callbacks, run_dir=folder)
    return bits(weights), rows


@pytest.mark.slow
def test_stopped_and_resumed_it_ends_the_same(ranks: Ranks, tmp_path: Path) -> None:
    unbroken = ranks(resumed, 2, tmp_path / "whole", None)
    first = ranks(resumed, 2, tmp_path / "broken", 3)
    second = ranks(resumed, 2, tmp_path / "broken", None)
    for rank in range(2):
        assert second[rank][0] == unbroken[rank][0]
        assert first[rank][1] + second[rank][1] == unbroken[rank][1]


def dropped() -> torch.Tensor:
    """What dropout leaves of this rank's part."""
    left: list[torch.Tensor] = []
    model = Reader(dropout=0.5)
    model.dropout.register_forward_hook(lambda m, args, out: left.append(out != 0))
    fit(Case(), Parallel(context=2), model=model)
    return left[0]


@pytest.mark.slow
def test_each_part_drops_places_of_its_own(ranks: Ranks) -> None:
    one, other = ranks(dropped, 2)
    assert one.shape == other.shape
    assert not torch.equal(one, other)


class Hidden:
    """Tensors that only their holder knows of."""

    def to(self, device: Any) -> Any:
        return self


def refuse_all() -> list[str]:
    two, messages = Parallel(context=2), []
    for error, settings in (
        (DataError, {"data": data(9, 5)}),
        (ConfigError, {"model": Reader(heads=1)}),
        (ConfigError, {"parallel": Parallel(context=4)}),
    ):
        with pytest.raises(error) as raised:
            fit(Case(), **{"parallel": two, **settings})
        messages.append(str(raised.value))
    with closing(World(two).open()) as world:
        assert world.context_mesh is not None
        with pytest.raises(DataError) as raised:
            part_of([Hidden()], world.context_mesh)
    return [*messages, str(raised.value)]


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused(ranks: Ranks) -> None:
    for length, heads, size, hidden in ranks(refuse_all, 2):
        assert (
            "context=2 does not divide the second dimension of a tensor of shape (8, 5)" in length
        )
        assert "parallel.context=2: 1 heads cannot be shared out evenly" in heads
        assert "parallel.context=4 does not fit 2 processes" in size
        assert "the parts of a Hidden are not known" in hidden
