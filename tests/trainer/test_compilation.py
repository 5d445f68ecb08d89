"""Compiled block by block, sharded or not, within a budget of memory or without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits
from small import fitted


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh().sin().cos())


class Net(nn.Module):
    tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Fit(Trainer):
    """Counts the bytes that the last training step kept for its backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.ended = bits([*self.named_models()["model"].state_dict().values()])


def fit(
    compiles: Any,
    which: Any = None,
    shard: int = 1,
    model: nn.Module | None = None,
    tensor: int = 1,
) -> Fit:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    model = model or Net()
    trainer = fitted(
        Fit,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        loss_fn=nn.functional.mse_loss,
        train_dataloader=DataLoader(TensorDataset(x, x[:, :1]), 8),
        val_dataloader=DataLoader(TensorDataset(x, x[:, :1]), 8) if shard * tensor == 1 else None,
        epochs=1,
        compile=compiles,
        parallel=Parallel(dp_shard=shard, tensor=tensor, activation_checkpointing=which),
    )
    assert all("forward" not in vars(part) for part in model.modules()), "the model is as it was"
    return trainer


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    """No test finds what another has compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting() -> list[str]:
    """From now on blocks are compiled by a backend that notes what it gets and changes nothing."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(str(graph.graph))
        return graph.forward

    torch.compile = partial(torch.compile, backend=backend)
    return compiled


def plan(trainer: Trainer) -> list[str]:
    return [line["decision"] for line in trainer.plan.as_list()]


def test_blocks_of_a_kind_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for training and once for validation, where no gradient is kept."""
    monkeypatch.setattr(torch, "compile", torch.compile)  # to have it back in the end
    plain, compiled = fit(False), counting()
    trainer = fit("blocks")
    assert len(compiled) == 2
    assert trainer.ended == plain.ended
    assert trainer.result.metrics == plain.result.metrics
    assert "compiles 3 blocks one by one" in plan(trainer)


def fit_sharded() -> Any:
    plain = fit(False, shard=2)
    compiled = counting()
    trainer = fit(True, shard=2)
    blocks = len(compiled)
    fit(True, shard=2, model=nn.Linear(8, 1))  # no blocks: compiled as one
    return plain.ended, trainer.ended, blocks, len(compiled) - blocks, plan(trainer)


def test_sharded_models_are_compiled_by_blocks(ranks: Ranks) -> None:
    for plain, compiled, blocks, whole, lines in ranks(fit_sharded, 2):
        assert compiled == plain
        assert (blocks, whole) == (1, 1)
        assert "compiles 3 blocks one by one" in lines


def fit_split() -> Any:
    plain = fit(False, tensor=2)
    compiled = counting()
    trainer = fit(True, tensor=2)
    return plain.ended, trainer.ended, compiled, plan(trainer)


def test_split_modules_are_compiled_within_their_blocks(ranks: Ranks) -> None:
    for plain, ended, compiled, lines in ranks(fit_split, 2):
        assert ended == plain
        assert len(compiled) == 1
        assert "compiles 3 blocks one by one" in lines


def test_a_budget_keeps_less_for_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own choice, by a backend that needs no C++ compiler."""
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    runs = []
    for budget in (None, 0.5, 0.0):
        torch.compiler.reset()
        runs.append(fit("blocks", budget))
    whole, half, none = runs
    assert whole.kept > half.kept > none.kept
    assert whole.result.final_val_loss == half.result.final_val_loss == none.result.final_val_loss
    assert any(line.startswith("keeps 50% of the activations") for line in plan(half))
    from torch._functorch import config

    assert config.activation_memory_budget == 1.0, "torch is as it was"


def test_a_budget_without_the_compiler_and_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="a memory budget is the compiler's to keep"):
        fit(False, 0.5)
    with pytest.raises(ConfigError, match=r"activation_checkpointing=1\.5: expected"):
        Parallel(activation_checkpointing=1.5)
    with pytest.raises(ConfigError, match="compile='blocks': the model 'model' has no repeated"):
        fit("blocks", model=nn.Linear(8, 1))
