"""What is sharded how, and models and data that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import CheckpointPolicy, Parallel, Trainer
from paceline.callbacks import AveragedWeights
from paceline.errors import ConfigError
from paceline.parallel.blocks import repeated_blocks
from paceline.testing import Ranks, bits
from paceline.trainer.callback import Callback
from paceline.world.dtensors import is_dtensor, whole


class Block(nn.Module):
    def __init__(self, shared: nn.Linear | None = None) -> None:
        super().__init__()
        self.inner = shared or nn.Linear(4, 4)
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.parts(self.inner(x).tanh())


class Deep(nn.Module):
    """Two blocks and a head whose weight is the stem's too."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, outputs, bias=False)
        if outputs == 4:
            self.head.weight = self.stem.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_are_the_outermost_repeated_parts() -> None:
    deep = Deep()
    assert repeated_blocks(deep) == list(deep.blocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())) == []


def test_a_block_that_shares_a_parameter_stays_with_the_rest() -> None:
    shared = nn.Linear(4, 4)
    blocks = nn.Sequential(Block(shared), Block(), Block(shared), Block())
    assert repeated_blocks(blocks) == [blocks[1], blocks[3]]


def data(rows: int) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(x, x.flip(1))


class Final(Callback):
    """The state in the end, gathered."""

    def on_train_end(self, trainer: Any) -> None:
        model = trainer.model
        if trainer.world.shards > 1:
            assert all(is_dtensor(p) for p in model.parameters())
        assert model.head.weight is model.stem.weight
        self.weights = {name: whole(p).detach() for name, p in model.state_dict().items()}


def fit(folder: Path | None, parallel: Parallel, max_steps: int = 6, **settings: Any) -> Any:
    model = settings.pop("model", None) or Deep()
    final = Final() if parallel.is_spread else Callback()
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.02, fused=True),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(data(24), 2, shuffle=True),
        val_dataloader=settings.pop("val_dataloader", DataLoader(data(7), 2)),
        callbacks=[final, AveragedWeights(decay=0.5), *settings.pop("callbacks", ())],
        parallel=parallel,
        global_batch_size=8,
        max_steps=max_steps,
        progress=False,
        run_dir=folder,
        checkpoint=CheckpointPolicy(every_steps=2),
        **settings,
    )
    trainer.train(seed=2)
    return getattr(final, "weights", None) or model.state_dict(), trainer.result.metrics


PLAN = {"blocks.*.inner": "colwise", "blocks.*.parts.0": "rowwise"}
SPLIT = Parallel(tensor=2, plan=PLAN)
LAYOUTS = [
    (2, Parallel()),
    (2, Parallel(dp_shard=2)),
    (2, SPLIT),
    (1, Parallel()),
    (4, Parallel(dp_shard=4)),
    (4, replace(SPLIT, dp_shard=2)),
    (4, Parallel(dp_shard=2)),
    (4, SPLIT),
    (1, Parallel()),
]


@pytest.mark.slow
def test_a_run_goes_on_at_any_other_layout(ranks: Ranks, tmp_path: Path) -> None:
    """DDP, FSDP2, split modules, HSDP and their combinations, on 1, 2 and 4 ranks, two steps each:
    weights and averages end as those of one process that never stopped."""
    for i, (size, parallel) in enumerate(LAYOUTS):
        weights, metrics = ranks(fit, size, tmp_path, parallel, 2 * (i + 1))[0]
    expected, plain = fit(None, Parallel(), 2 * len(LAYOUTS))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(plain, rel=1e-5)


class Peeks(Callback):
    """Calls the model before a step, as one that measures something would."""

    def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        with torch.no_grad():
            trainer.model(torch.ones(1, 4))

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        assert all(is_dtensor(p) for p in trainer.model.parameters())


def peek() -> tuple[Any, Any]:
    two = Parallel(dp_shard=2)
    plain, _ = fit(None, two)
    peeked, _ = fit(None, two, callbacks=[Peeks()])
    return bits(plain), bits(peeked)


@pytest.mark.slow
def test_a_call_in_a_hook_leaves_no_old_weights_behind(ranks: Ranks) -> None:
    for plain, peeked in ranks(peek, 2):
        assert plain == peeked


def refused(parallel: Parallel, **settings: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fit(None, parallel, **settings)
    return str(raised.value)


class Scaled(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def refuse_all() -> list[str]:
    two = Parallel(dp_shard=2)
    used = Deep()
    fit(None, two, model=used)
    return [
        refused(two, model=Scaled()),
        refused(two, model=used),
        refused(two, val_dataloader=DataLoader(data(1), 2)),
        refused(Parallel(dp_shard=4)),
    ]


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused(ranks: Ranks) -> None:
    scalar, twice, few, large = ranks(refuse_all, 2)[0]
    assert "the parameters scale of 'model' have no dimension to shard" in scalar
    assert "the model 'model' is spread already" in twice
    assert "each of the 2 ranks needs at least one sample, and there is 1" in few
    assert "parallel.dp_shard=4 does not fit 2 processes" in large
