"""Stages beside other layouts: each of them split over ranks, or given parts of sequences."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.utils.data import DataLoader, TensorDataset

from builders import assert_each_says
from kept import Kept, assert_stages_equal, run
from paceline import CheckpointPolicy, Parallel, Trainer
from paceline.callbacks import GradientMonitor
from paceline.errors import ConfigError
from paceline.parallel import attention, positions
from paceline.testing import Ranks, assert_resumes_exactly
from small import settings

WORDS, LENGTH, SIZE = 8, 6, 8
IGNORED = -100  # what a cross-entropy does not count
PLAN = {
    "embedding.token": "rowwise",
    "blocks.*.qkv": "colwise",
    "blocks.*.out": "rowwise",
    "head": "colwise_loss",
}
SPLIT = Parallel(pipeline=2, tensor=2, plan=PLAN)
PARTS = Parallel(pipeline=2, context=2)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(WORDS, SIZE), nn.Embedding(LENGTH, SIZE)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.place(positions(tokens.shape[1]))


class Block(nn.Module):
    """Attention of four heads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(SIZE), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, 3, 2)).permute(3, 0, 2, 1, 4)
        seen = attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.out(self.between(seen))


class Writer(nn.Module):
    """Tokens to logits; the embedding is the head's weight too, so that two stages have it."""

    pipeline_order = ("embedding", "blocks", "head")

    def __init__(self, *blocks: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = Embedding()
        self.blocks = nn.ModuleList(blocks or [Block(dropout), Block(dropout)])
        self.head = nn.Linear(SIZE, WORDS, bias=False)
        self.head.weight = self.embedding.token.weight
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data(rows: int) -> TensorDataset:
    """Tokens and those to come, a ragged number of which counts: none at all in the first rows."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(WORDS - 1, (rows, LENGTH), generator=generator)
    counts = torch.randint(0, LENGTH + 1, (rows, 1), generator=generator)
    counts[:4] = 0
    targets = torch.where(torch.arange(LENGTH) < counts, x.roll(-1, 1), IGNORED)
    return TensorDataset(x, targets)


def next_word(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def exploding(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What comes of a word 7 is not finite."""
    return next_word(logits, targets) + torch.where(targets == WORDS - 1, torch.nan, 0.0).sum()


class Fit(Trainer):
    """Counts the words that count, and measures where they are, too."""

    def count_items(self, batch: Any) -> Any:
        return (batch[1] != IGNORED).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, targets = batch
        self.log("val/loss", next_word(self.model(tokens), targets))  # on every rank
        places = positions(tokens.shape[1]).double()
        self.log("val/place", places.mean(), weight=1)


def make(
    parallel: Parallel | None = None,
    steps: int | None = None,
    folder: Path | None = None,
    *,
    bad: bool = False,
    model: nn.Module | None = None,
    **changes: Any,
) -> Fit:
    """A run of windows of 3 batches of 4, the last one of 4, 4 and 2."""
    model, training = model or Writer(), data(22)
    if bad:
        training.tensors[1][13, 1] = WORDS - 1
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.02),
        "loss_fn": exploding if bad else next_word,
        "train_dataloader": DataLoader(training, 4),
        "val_dataloader": DataLoader(data(9), 4),
        "max_steps": steps,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.5,
        "parallel": parallel,
        "checkpoint": CheckpointPolicy(every_steps=1) if folder else None,
        "run_dir": folder,
        "loggers": [],
        "log_every": 1,
    }
    return Fit(**settings(model, **options | changes))


def fit(*args: Any, **changes: Any) -> Kept:
    return run(make(*args, **changes))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Writer()


def fit_in_ways(parallel: Parallel | None) -> list[Any]:
    """From values drawn for a model on the meta device; with a window that is left out."""
    skipping = {"on_nonfinite": "skip", "max_grad_norm": None, "callbacks": [GradientMonitor()]}
    return [fit(parallel, model=on_meta()), fit(parallel, bad=True, **skipping)]


def test_each_stage_is_split(ranks: Ranks) -> None:
    """Losses, norms, metrics and weights are those of one process: with accumulation, an uneven
    last window, batches in which nothing counts, and a weight of two stages, split in both."""
    inner = ["out.bias", "out.weight", "qkv.bias", "qkv.weight"]
    expected = fit_in_ways(None)
    for i, outcome in enumerate(zip(*ranks(fit_in_ways, 4, SPLIT), strict=True)):
        assert_stages_equal(list(outcome), expected[i])
        for rank, kept in enumerate(outcome):
            mine = [f"blocks.{rank // 2}.{name}" for name in inner]
            assert kept.split == sorted(["embedding.token.weight", *mine, "head.weight"])
            assert len(kept.weights) < len(expected[i].weights)


def fit_parts_in_ways(parallel: Parallel | None) -> list[Any]:
    """With blocks that compute their forward pass twice; with a window that is left out."""
    twice = None if parallel is None else replace(parallel, activation_checkpointing="full")
    return [fit(twice), fit(parallel, bad=True, on_nonfinite="skip")]


def test_each_stage_gets_parts_of_sequences(ranks: Ranks) -> None:
    """The same with sequences in two parts, in some of which nothing counts."""
    expected = fit_parts_in_ways(None)
    for i, outcome in enumerate(zip(*ranks(fit_parts_in_ways, 4, PARTS), strict=True)):
        assert_stages_equal(list(outcome), expected[i])


def with_dropout(folder: Path) -> Trainer:
    return make(PARTS, None, folder, model=Writer(dropout=0.3), loggers=None)


def test_stages_with_parts_of_sequences_stop_and_go_on(tmp_path: Path) -> None:
    """They end to the bit as those that never stopped."""
    assert_resumes_exactly(with_dropout, tmp_path, stop_at=2, ranks=4)


def warned_of(attends: bool) -> list[str]:
    """A stage without attention is nothing to warn of, unless no other one has any."""
    layers = [nn.Embedding(WORDS, SIZE), *[Block()] * attends, nn.Linear(SIZE, WORDS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(PARTS, model=nn.Sequential(*layers).double())
    return [str(w.message) for w in caught if "has not called paceline" in str(w.message)]


def test_stages_without_attention_are_warned_of_once(ranks: Ranks) -> None:
    assert ranks(warned_of, 4, True) == [[]] * 4
    assert [len(told) for told in ranks(warned_of, 4, False)] == [1] * 4


@pytest.mark.parametrize("parallel", [pytest.param(SPLIT, id="split modules")])
def test_a_checkpoint_is_read_in_any_layout(
    ranks: Ranks, parallel: Parallel, tmp_path: Path
) -> None:
    """Given a run stopped at step 1 on one process and at step 2 on four, it ends on either as one
    that never stopped."""
    expected = fit()
    fit(None, 1, tmp_path / "one")
    ranks(fit, 4, parallel, 2, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    assert_stages_equal(ranks(fit, 4, parallel, None, tmp_path / "four"), expected, from_step=2)
    assert_stages_equal([fit(None, None, tmp_path / "one")], expected, from_step=2)


class Scaled(Block):
    """A parameter in the middle of what is split: each rank sees half of what it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def refused(parallel: Parallel, **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fit(parallel, 1, **changes)
    return str(raised.value)


def refuse_all() -> list[str]:
    return [
        refused(SPLIT, model=Writer(Block(), Scaled())),
        refused(replace(SPLIT, plan={"head": "colwise_rep"})),
        refused(replace(SPLIT, plan=None)),
    ]


def test_a_stage_that_cannot_be_split_is_refused(ranks: Ranks) -> None:
    """On all ranks, also where it is another stage's."""
    expected = (
        "the ranks have different gradients of model.blocks.1.scale, which no entry",
        "embedding.token.weight and head.weight of 'model' are one parameter",
        "nothing says how the model 'model' splits",
    )
    for found in ranks(refuse_all, 4):
        assert_each_says(found, *expected)


def hand_on_a_part() -> None:
    style = RowwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    plan = {"0": "colwise", "1": style}
    model = nn.Sequential(*(nn.Embedding(WORDS, 4), nn.Linear(4, 4), nn.Linear(4, WORDS))).double()
    fit(replace(SPLIT, plan=plan), 1, model=model)


def test_a_stage_that_hands_on_a_split_tensor_is_named(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(hand_on_a_part, 4)
    assert all(one.code for one in outcomes)
    assert (
        "a stage ends with the Linear, which gives a split tensor (DTensor)" in outcomes[0].output
    )
