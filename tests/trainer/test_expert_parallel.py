"""Experts shared out over ranks: what is kept where, what is exchanged, and what cannot be."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils.data import TensorDataset

from builders import assert_each_says
from kept import Kept, assert_near, fit, flipped
from mixture import Experts, Mixture
from paceline import Parallel
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, DataError
from paceline.parallel.expert_parallel import distribute_experts
from paceline.testing import Ranks
from paceline.world.world import World


class Deep(nn.Module):
    """Two mixtures of experts, as blocks between a stem and a head."""

    ep_plan = {"blocks.*.experts": "experts"}

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Mixture(4, experts), Mixture(4, experts)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fit_deep(*args: Any, **changes: Any) -> Kept:
    return fit(changes.pop("model", Deep()), *args, **{"max_grad_norm": 1.0, **changes})


LAYOUTS = [
    (2, Parallel(expert=2), (1, 4, 8)),
    (1, Parallel(), (2, 4, 8)),
    (4, Parallel(dp_shard=4, expert=2), (1, 2, 8)),  # one expert is sharded within itself
    (4, Parallel(expert=2), (1, 4, 8)),
    (1, Parallel(), (2, 4, 8)),
]


def test_a_run_goes_on_with_its_experts_elsewhere(ranks: Ranks, tmp_path: Path) -> None:
    """Checkpoints know whole parameters by the names they have on one process: two steps at each
    layout end as those of one process that never stopped, weights and averages."""
    for i, (size, parallel, here) in enumerate(LAYOUTS):
        kept = ranks(fit_deep, size, parallel, tmp_path, 2 * (i + 1))[0]
        assert kept.shapes["blocks.0.experts.up"] == here
        folder = tmp_path / f"checkpoints/step_{2 * (i + 1):08}"
        saved = load_tree(folder, parts=("models",))["models"]["model"]
        assert {key: t.shape for key, t in saved.items()} == {
            key: t.shape for key, t in Deep().state_dict().items()
        }
    assert_near(kept, fit_deep(Parallel(), None, 2 * len(LAYOUTS)), rtol=1e-4)


def reductions() -> int:
    """How often gradients are exchanged in a window of four micro-batches."""
    made, reduce = [], _fsdp_param_group.foreach_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return reduce(*args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted
    fit_deep(Parallel(expert=2), max_steps=1, rows=flipped(8))
    return len(made)


def with_a_bad_row() -> bool:
    x = torch.ones(24, 4)
    x[5] = torch.nan
    rows = TensorDataset(x, x)
    kept = fit_deep(Parallel(expert=2), max_steps=2, rows=rows, on_nonfinite="skip")
    return all(bool(tensor.isfinite().all()) for tensor in kept.weights.values())


def on_two_ranks() -> Any:
    return reductions(), with_a_bad_row()


def test_gradients_are_exchanged_once_and_a_bad_row_stops_nobody(ranks: Ranks) -> None:
    """One reduction a window for each of two blocks, their experts and what is left."""
    for reduced, finite in ranks(on_two_ranks, 2):
        assert reduced == 5
        assert finite


def refused(model: nn.Module, plan: Any = None, expert: int = 2) -> str:
    with pytest.raises((ConfigError, DataError)) as raised:
        fit_deep(Parallel(expert=expert, plan=plan), model=model)
    return str(raised.value)


def refuse_all() -> list[str]:
    tied, buffered, odd = Deep(), Deep(), Deep(3)
    tied.blocks[1] = tied.blocks[0]
    buffered.blocks[0].experts.register_buffer("seen", torch.zeros(2))  # pyright: ignore
    return [
        refused(nn.Linear(4, 4)),
        refused(Deep(), {"blocks.*.expert": "experts"}),
        refused(Deep(), {"blocks.*.experts": "colwise"}),
        refused(nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))), {"0": "experts"}),
        refused(tied),
        refused(buffered),
        refused(odd),
        refused(Deep(), expert=4),
        *wrong_calls(),
    ]


def wrong_calls() -> list[str]:
    experts, rows, counts = Experts(4, 4, 8), torch.ones(2, 4), torch.tensor([1, 0, 0, 1])
    messages = []
    with closing(World(Parallel(expert=2)).open()) as world:
        assert world.expert_mesh is not None
        distribute_experts(experts, "moe.experts", world.expert_mesh["expert"])
        for call in ((rows, counts, rows), (rows, counts + 1), (rows, counts / 1), (rows, rows[0])):
            with pytest.raises(DataError) as raised:
                experts(*call)
            messages.append(str(raised.value))
    return messages


def test_what_cannot_be_shared_out_is_refused(ranks: Ranks) -> None:
    for found in ranks(refuse_all, 2):
        assert_each_says(
            found,
            "parallel.expert=2: nothing says which modules of 'model' hold experts",
            "'model' has no module 'blocks.*.expert'",
            "parallel.plan['blocks.*.experts'] is 'colwise'",
            "'0' cannot be shared out by experts: all it holds has to be parameters of the "
            "shape [experts, ...]. There are 0.0.weight [8, 4], ",
            "blocks.0.experts.down is found in more than one place of the model",
            "and 1 buffers",
            "parallel.expert=2 does not divide the 3 experts of 'blocks.0.experts'",
            "parallel.expert=4 does not divide dp_replicate=2 x dp_shard=1, the 2 processes",
            "'moe.experts' is called with 3 arguments: experts that are shared out are called "
            "as experts(rows, rows for each expert)",
            "'moe.experts': the counts add up to 6 rows, and there are 2",
            "'moe.experts': the counts of rows by expert are float32 [4]: expected integers",
            "expected integers, one for each expert of 2 ranks",
        )
