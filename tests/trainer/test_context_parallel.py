"""Sequences in parts on several ranks: the same mathematics as whole ones on one."""

from __future__ import annotations

import warnings
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emulated_ring import emulate
from kept import Kept, assert_near, run
from paceline import Parallel, Trainer
from paceline.errors import ConfigError, DataError
from paceline.parallel.context_parallel import (
    Sequences,
    attention,
    part_of,
    positions,
    ring_attention,
    why_no_ring,
)
from paceline.testing import Ranks, assert_resumes_exactly, bits
from paceline.world.world import World
from small import settings

WORDS, LENGTH = 7, 8
RING = Parallel(context=2, context_attention="ring")


both_ways = pytest.mark.parametrize(
    "layout", [Parallel(context=2), RING], ids=["all to all", "ring"]
)


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
SOME = CASES[1:3]  # on four ranks: accumulation over ragged counts, and samples
RAGGED = SOME[:1]  # where parts meet another layout, and all else is as with parts alone


def make(
    case: Case,
    parallel: Parallel | None = None,
    run_dir: Path | None = None,
    *,
    model: nn.Module | None = None,
    rows: TensorDataset | None = None,
    **changes: Any,
) -> Fit:
    model = model or Reader(dropout=case.dropout)
    options = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "epochs": 1,
        "train_dataloader": DataLoader(rows or data(27), case.batch, shuffle=True),
        "val_dataloader": DataLoader(data(9), case.batch),
        "gradient_accumulation_steps": case.accumulation,
        "max_grad_norm": 1.0,
        "log_every": 1,
        "parallel": parallel,
        "run_dir": run_dir,
    }
    return case.kind(**settings(model, **options | changes))


def fit(*args: Any, **changes: Any) -> Kept:
    return run(make(*args, **changes), seed=3)


def fits(cases: list[Case], parallel: Parallel) -> list[Kept]:
    if parallel.rings:
        emulate(exact=True)
    return [fit(case, parallel) for case in cases]


@pytest.mark.parametrize(
    ("size", "cases", "parallel"),
    [
        pytest.param(2, CASES, Parallel(context=2), id="alone"),
        pytest.param(4, SOME, Parallel(context=2, dp_shard=2), id="with shards"),
        pytest.param(4, RAGGED, Parallel(context=2, tensor=2), id="with split modules"),
        pytest.param(2, CASES, RING, id="by ring"),
        pytest.param(4, RAGGED, replace(RING, context=4), id="by ring of four"),
        pytest.param(4, RAGGED, replace(RING, tensor=2), id="by ring, with split modules"),
    ],
)
def test_parts_of_sequences_equal_whole_ones(
    ranks: Ranks, size: int, cases: list[Case], parallel: Parallel
) -> None:
    """Losses, norms, metrics and weights, with accumulation, uneven last windows, ragged counts and
    parts in which nothing counts."""
    shares = size // (parallel.context * parallel.tensor)
    ones = [fit(replace(case, batch=case.batch * shares)) for case in cases]
    for outcomes in ranks(fits, size, cases, parallel):
        for one, kept in zip(ones, outcomes, strict=True):
            assert_near(kept, one, rtol=1e-10, atol=1e-10)
            assert [pytest.approx(row, rel=1e-10) for row in one.rows] == kept.rows
            assert kept.metrics == pytest.approx(one.metrics, rel=1e-10)


class Predicting(Fit):
    """Predicts logits, or for `pooled` their means."""

    pooled = False

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.model(batch[0])
        return {"logits": logits, "means": logits.mean(1)} if self.pooled else logits


def predictions(parallel: Parallel | None) -> torch.Tensor:
    if parallel is not None and parallel.rings:
        emulate(exact=True)
    trainer = make(Case(Predicting), parallel)
    outputs = trainer.predict(DataLoader(data(5), 2))
    if parallel is not None:
        trainer.pooled = True
        with pytest.raises(DataError, match=r"an output of shape \(2, 7\) is not one for each"):
            trainer.predict(DataLoader(data(5), 2))
    return outputs


@pytest.mark.parametrize(("size", "parallel"), [(2, Parallel(context=2)), (4, RING)])
def test_parts_of_sequences_are_predicted_whole(
    ranks: Ranks, size: int, parallel: Parallel
) -> None:
    """All logits in order, on 4 ranks of two copies; what has no positions is refused."""
    whole = predictions(None)
    assert whole.shape == (5, LENGTH, WORDS)
    for outputs in ranks(predictions, size, parallel):
        torch.testing.assert_close(outputs, whole, rtol=1e-10, atol=1e-10)


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


def fits_with_less(layout: Parallel, kinds: list[Any]) -> list[Any]:
    if layout.rings:
        emulate()
    layouts = [replace(layout, activation_checkpointing=kind) for kind in kinds]
    return [fit(Case(), each, model=Readers()).weights for each in layouts]


@both_ways
def test_blocks_that_are_computed_twice_see_whole_sequences_both_times(
    ranks: Ranks, layout: Parallel
) -> None:
    kept, *recomputed = ranks(fits_with_less, 2, layout, [None, "full", "selective"])[0]
    assert [bits(weights) for weights in recomputed] == [bits(kept)] * 2


def fit_compiled() -> Any:
    """Without and with compiled blocks, by a backend that changes nothing."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile = partial(torch.compile, backend=backend)
    layout, rows = Parallel(context=2), data(16)
    plain = fit(Case(), layout, model=Readers(), rows=rows)
    assert not graphs
    compiled = fit(Case(), layout, model=Readers(), rows=rows, compile="blocks")
    return plain, compiled, len(graphs)


def test_compiled_blocks_see_whole_sequences_too(ranks: Ranks) -> None:
    for plain, compiled, graphs in ranks(fit_compiled, 2):
        assert graphs
        assert bits(compiled.weights) == bits(plain.weights)
        assert (compiled.rows, compiled.metrics) == (plain.rows, plain.metrics)


def with_dropout(layout: Parallel, run_dir: Path) -> Trainer:
    if layout.rings:
        emulate()
    return make(Case(dropout=0.3), layout, run_dir)


@both_ways
def test_stopped_and_resumed_it_ends_the_same(tmp_path: Path, layout: Parallel) -> None:
    assert_resumes_exactly(partial(with_dropout, layout), tmp_path, stop_at=3, ranks=2)


def dropped() -> torch.Tensor:
    """What dropout leaves of this rank's part."""
    left: list[torch.Tensor] = []
    model = Reader(dropout=0.5)
    model.dropout.register_forward_hook(lambda m, args, out: left.append(out != 0))
    fit(Case(), Parallel(context=2), model=model)
    return left[0]


def test_each_part_drops_places_of_its_own(ranks: Ranks) -> None:
    one, other = ranks(dropped, 2)
    assert one.shape == other.shape
    assert not torch.equal(one, other)


def warned_of() -> list[list[str]]:
    """For a model that knows of parts, and for one that does not."""
    strange = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)).double()
    told = []
    for model in (Reader(), strange):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Case(FitSamples), Parallel(context=2), model=model)
        told.append([str(w.message) for w in caught if "parallel.context" in str(w.message)])
    return told


def test_a_model_that_never_asks_for_attention_is_warned_of_once(ranks: Ranks) -> None:
    known, (strange,) = ranks(warned_of, 2)[0]
    assert known == []
    assert "this model has not called paceline.parallel.attention" in strange


# torch's ring


def fit_in_float32_and_with_one_head() -> Kept:
    emulate()
    return fit(Case(), RING, model=Reader(heads=1))


def test_the_ring_adds_up_in_float32_and_takes_any_number_of_heads(ranks: Ranks) -> None:
    expected = fit(Case(), model=Reader(heads=1))
    for kept in ranks(fit_in_float32_and_with_one_head, 2):
        assert_near(kept, expected, rtol=1e-5, atol=1e-5)


def attend_in_groups() -> tuple[Any, Any]:
    """What this rank computes of queries that share keys, and what one process does."""
    emulate(exact=True)
    torch.manual_seed(0)
    whole = [torch.randn(2, heads, LENGTH, 4, dtype=torch.float64) for heads in (6, 2, 2)]
    options: Any = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    with closing(World(RING).open()) as world, ring_attention():
        assert world.context_mesh is not None
        with Sequences(world.context_mesh, nullcontext(), ring=True):
            here = positions(LENGTH // 2)
            parts = [t[:, :, here].requires_grad_() for t in whole]
            out = attention(*parts, **options)
        out.square().sum().backward()
    for t in whole:
        t.requires_grad_()
    wanted = attention(*whole, **options)
    wanted.square().sum().backward()
    gradients = [t.grad for t in whole if t.grad is not None]
    return [out.detach(), *[t.grad for t in parts]], [
        t[:, :, here] for t in (wanted.detach(), *gradients)
    ]


def test_queries_of_the_ring_may_share_keys(ranks: Ranks) -> None:
    for found, wanted in ranks(attend_in_groups, 2):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Asking(Reader):
    """Asks for attention with other options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q = self.token(tokens).unsqueeze(1)
        return self.head(attention(q, q, q, **self.options).squeeze(1))


def refuse_rings() -> list[str]:
    messages = []
    for changes in (
        {"rows": data(9, 6)},
        {"model": Asking()},
        {"model": Asking(is_causal=True, dropout_p=0.1)},
    ):
        emulate()
        with pytest.raises((ConfigError, DataError)) as raised:
            fit(Case(), RING, **changes)
        messages.append(str(raised.value))
    return messages


def test_what_the_ring_cannot_do_is_refused(ranks: Ranks) -> None:
    for length, mask, dropout in ranks(refuse_rings, 2):
        assert "context=2, in two pieces each for the ring, does not divide" in length
        assert "shape (8, 6)" in length
        assert "attention(is_causal=False) does not exist with parallel.context_attention" in mask
        assert "attention(dropout_p=...) does not exist" in dropout


class Configured(Fit):
    """Would make its parts by itself."""

    def configure(self) -> None:
        raise AssertionError("it came so far")


def ring_without_emulation() -> str:
    with pytest.raises(ConfigError) as raised:
        fit(Case(Configured), RING)
    return str(raised.value)


def test_a_cpu_has_no_ring_and_says_so_before_anything_is_made(ranks: Ranks) -> None:
    for message in ranks(ring_without_emulation, 2):
        assert "context_attention='ring': torch's ring attention has no CPU kernel" in message
        assert "say 'all_to_all'" in message


def test_a_torch_without_a_ring_and_a_compiled_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert why_no_ring(torch.device("cuda")) is None
    name = "torch.distributed.tensor.experimental._attention._enable_context_parallel_dispatcher"
    monkeypatch.delattr(name)
    assert "is too old for its ring" in str(why_no_ring(torch.device("cuda")))
    with pytest.raises(ConfigError, match=r"compile=True: does not exist yet with parallel\.conte"):
        fit(Case(), RING, compile=True)
    with pytest.raises(ConfigError, match=r"context_attention='rings': expected 'all_to_all' or"):
        Parallel(context_attention="rings")  # pyright: ignore[reportArgumentType]


def test_one_process_has_no_use_for_a_ring() -> None:
    alone = Parallel(context_attention="ring")
    assert bits(fit(Case(), alone).weights) == bits(fit(Case()).weights)


class Hidden:
    """Tensors that only their holder knows of."""

    def to(self, device: Any) -> Any:
        return self


def refuse_all() -> list[str]:
    two, messages = Parallel(context=2), []
    for error, changes in (
        (DataError, {"rows": data(9, 5)}),
        (ConfigError, {"model": Reader(heads=1)}),
        (ConfigError, {"parallel": Parallel(context=4)}),
    ):
        with pytest.raises(error) as raised:
            fit(Case(), **{"parallel": two, **changes})
        messages.append(str(raised.value))
    with closing(World(two).open()) as world:
        assert world.context_mesh is not None
        with pytest.raises(DataError) as raised:
            part_of([Hidden()], world.context_mesh)
    return [*messages, str(raised.value)]


def test_what_cannot_be_shared_out_is_refused(ranks: Ranks) -> None:
    for length, heads, size, hidden in ranks(refuse_all, 2):
        assert (
            "context=2 does not divide the second dimension of a tensor of shape (8, 5)" in length
        )
        assert "parallel.context=2: 1 heads cannot be shared out evenly" in heads
        assert "parallel.context=4 does not fit 2 processes" in size
        assert "the parts of a Hidden are not known" in hidden
