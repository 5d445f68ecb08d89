"""Experts shared out, beside what else is done to a model."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import Count
from kept import EachStep, Kept, run
from mixture import Mixture
from paceline import Parallel, Trainer
from paceline.parallel import attention
from paceline.testing import Ranks, StopAt, assert_continues, bits, traced_run
from paceline.world.dtensors import local_part
from small import settings


class Block(nn.Module):
    """Attention, then two of four experts for each position; the last two get few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mixture = Mixture(8, favour=1.0)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training:
            self.calls += 1
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, 3, 4)).permute(3, 0, 2, 1, 4)
        rows = x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        z = z + self.mixture.router(rows).logsumexp(-1).square().mean()
        return rows + self.mixture(rows.flatten(0, 1)).view_as(x), z


class Net(nn.Module):
    """Its second output is a mean over positions: the routers' z-loss."""

    ep_plan = {"blocks.*.mixture.experts": "experts"}
    tp_plan = {"blocks.*.qkv": "colwise", "blocks.*.out": "rowwise"}

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, z = self.stem(x), x.new_zeros(())
        for block in self.blocks:
            x, z = block(x, z)
        return self.head(x), z


class Fit(Trainer):
    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        out, z = self.model(x)
        self.log("train/z", z.detach())
        return (out - y).square().mean() + 0.01 * z


ADAM = partial(torch.optim.AdamW, lr=0.02, fused=True)


def make(
    run_dir: Path | None = None, kind: type[Fit] = Fit, blocks: int = 2, **changes: Any
) -> Any:
    """Four steps of eight sequences, the third of six; in float64 where nothing else is asked."""
    model, optimizer = Net(blocks), changes.pop("optimizer", ADAM)
    x = torch.randn(22, 4, 8, generator=torch.Generator().manual_seed(1))
    if changes.get("precision", "fp32") == "fp32":
        model, x = model.double(), x.double()
    options = {
        "optimizer": optimizer(model.parameters()),
        "train_dataloader": DataLoader(TensorDataset(x, x[..., :1]), 2, shuffle=True),
        "val_dataloader": DataLoader(TensorDataset(x[:10], x[:10, :, :1]), 4),
        "global_batch_size": 8,
        "epochs": None,
        "max_steps": 4,
        "max_grad_norm": 1.0,
        "log_every": 1,
        "run_dir": run_dir,
    }
    return kind(**settings(model, **options | changes))


def fit(parallel: Parallel | None = None, **changes: Any) -> Kept:
    return run(make(parallel=parallel, **changes), seed=3)


def assert_parameters_near(kept: Kept, expected: Kept, **tolerance: float) -> None:
    """How often a block is called, a buffer, is another number at each layout."""
    for name in expected.weights:
        if not name.endswith(".calls"):
            torch.testing.assert_close(kept.weights[name], expected.weights[name], **tolerance)


# Recomputed


class Counting(Fit):
    """Counts the operations of its last backward pass."""

    def backward(self, loss: Any, only: str | None = None) -> None:
        with Count() as count:
            super().backward(loss, only)
        self.calls = count.calls


def fit_recomputed() -> Any:
    whiches: Any = (None, "full", "selective")
    layouts = [Parallel(expert=2, activation_checkpointing=which) for which in whiches]
    made = [make(kind=Counting, parallel=layout, precision="bf16") for layout in layouts]
    ended = [bits(run(each, seed=3).weights) for each in made]
    sent = [m.calls["_c10d_functional.all_to_all_single"] for m in made]
    products = [m.calls["aten.mm"] + m.calls.get("aten.addmm", 0) for m in made]
    return ended, sent, products


def test_recomputed_blocks_send_their_rows_again_or_keep_what_came(ranks: Ranks) -> None:
    """Rows go to other experts on each rank, whose passes are repeated all the same: not a bit of
    the result is different. In a backward pass two blocks send gradients twice; "full" sends
    counts, rows and results once more."""
    for (plain, full, selective), sent, products in ranks(fit_recomputed, 2):
        assert full == selective == plain
        assert sent == [4, 10, 4]
        assert products[2] == products[0] < products[1]


# Compiled


class Compiling(Fit):
    """Notes after each step how much has been compiled."""

    graphs: list[str]

    def on_train_start(self) -> None:
        self.numbers: list[int] = []

    def on_step_end(self, metrics: Any) -> None:
        self.numbers.append(len(self.graphs))


def fit_compiled() -> Any:
    """Blocks are compiled by a backend that notes what it gets and changes nothing."""
    Compiling.graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        Compiling.graphs.append(str(graph.graph))
        return graph.forward

    short: Any = {"max_steps": 2, "val_dataloader": None}
    plain = fit(Parallel(expert=2), **short)
    torch.compile = partial(torch.compile, backend=backend)
    found = []
    for which, how in (None, "blocks"), ("selective", True):
        torch.compiler.reset()
        Compiling.graphs.clear()
        parallel: Any = Parallel(expert=2, activation_checkpointing=which)
        made = make(kind=Compiling, parallel=parallel, compile=how, **short)
        ended = bits(run(made, seed=3).weights)
        found.append((made.numbers, ended))
    return bits(plain.weights), found, made.graphs, [line.decision for line in made.plan]


def test_compiled_blocks_leave_their_experts_out_and_later_steps_compile_nothing(
    ranks: Ranks,
) -> None:
    """Other numbers of rows in each step are none of the compiler's business."""
    for plain, found, graphs, plan in ranks(fit_compiled, 2):
        for numbers, ended in found:
            assert numbers == [len(graphs)] * 2
            assert ended == plain
        assert any("scaled_dot_product_attention" in graph for graph in graphs)
        assert not any("all_to_all" in graph or "matmul" in graph for graph in graphs)
        assert "compiles 2 blocks one by one, but for their experts" in plan


# In float16


class Overflowing(Fit):
    """In the second step the last rank's experts, and no other parameter, have an infinite gradient
    in that rank's part."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) / 256  # so that nothing else overflows

    def on_after_backward(self) -> None:
        if self.global_step == 1 and self.world.rank == self.world.size - 1:
            up = self.get_module("model.blocks.0.mixture.experts").up
            if up.grad is not None:
                local_part(up.grad)[-1] = torch.inf


HALF: dict[str, Any] = {"precision": "fp16", "val_dataloader": None, "on_nonfinite": "skip"}
SGD = partial(torch.optim.SGD, lr=8.0, momentum=0.9)


def overflow(parallel: Parallel | None = None) -> tuple[Kept, EachStep]:
    each = EachStep()
    made = {"kind": Overflowing, "optimizer": SGD, "callbacks": [each], **HALF}
    return fit(parallel, **made), each


def fit_half() -> Any:
    return [overflow(layout) for layout in (Parallel(dp_shard=4, expert=2),)]


def test_what_overflows_in_one_ranks_experts_skips_the_step_on_all(ranks: Ranks) -> None:
    """Two shards of the experts: the ranks do what one process does."""
    alone, once = overflow()
    assert once.scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
    for found in ranks(fit_half, 4):
        for kept, each in found:
            assert each.scales == once.scales
            assert [a == b for a, b in pairwise(each.weights)] == [True, False, False]
            assert_parameters_near(kept, alone, rtol=0.02, atol=1e-3)


# Sequences in parts, and split modules

LAYOUTS = [
    Parallel(tensor=2, expert=2, dp_shard=2, plan=Net.tp_plan | Net.ep_plan),
    Parallel(context=2, expert=4),
    Parallel(context=2, expert=2, dp_shard=2),
]


ONE_BLOCK: dict[str, Any] = {"blocks": 1, "max_steps": 3}  # the last step is the uneven one


def fit_layouts() -> Any:
    return [fit(parallel, **ONE_BLOCK) for parallel in LAYOUTS]


def test_rows_may_be_those_of_parts_of_sequences_and_of_split_modules(ranks: Ranks) -> None:
    """In copies, shards and over all four ranks: losses, those of the routers too, norms and
    weights are those of one process."""
    alone = fit(**ONE_BLOCK)
    for found in ranks(fit_layouts, 4):
        for parallel, kept in zip(LAYOUTS, found, strict=True):
            assert_parameters_near(kept, alone, rtol=1e-10, atol=1e-10)
            assert kept.metrics == pytest.approx(alone.metrics, rel=1e-10), parallel


# Resumed

BESIDE: list[dict[str, Any]] = [
    HALF | {"parallel": Parallel(expert=2, activation_checkpointing="selective")},
    {"parallel": Parallel(context=2, expert=2, activation_checkpointing="full")},
]


def resume(folder: Path, beside: list[dict[str, Any]]) -> None:
    for i, layout in enumerate(beside):
        build = partial(make, **layout | {"max_steps": 2, "val_dataloader": None})
        whole = traced_run(build, folder / f"whole-{i}")
        parts = [traced_run(build, folder / str(i), *stop) for stop in ([StopAt(1)], [])]
        assert_continues(parts, whole)


@pytest.mark.parametrize(
    ("size", "beside"),
    [
        pytest.param(2, BESIDE, id="in float16 and parts of sequences"),
        pytest.param(
            4, [{"parallel": Parallel(tensor=2, expert=2), "blocks": 1}], id="split modules"
        ),
    ],
)
def test_stopped_and_resumed_they_end_with_the_same_bits(
    ranks: Ranks, size: int, beside: list[dict[str, Any]], tmp_path: Path
) -> None:
    ranks(resume, size, tmp_path, beside)
