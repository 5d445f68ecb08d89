"""Sharded models in a lower precision, and in host memory: what is kept, sent and computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits
from paceline.trainer.callback import Callback
from small import fitted


class Block(nn.Module):
    """A linear layer and norms of both kinds: with statistics of their own, and without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.batch_norm(self.linear(x))).relu()


class Seen(Callback):
    """What parts of the model compute in, the bytes gathered, the mean loss of each epoch."""

    def on_setup(self, trainer: Any) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self.gathered = 0
        for name, part in trainer.get_module("model.1").named_children():
            part.register_forward_hook(lambda m, i, o, name=name: self.see(name, m.weight))
            part.register_forward_hook(lambda m, i, o, name=name: self.see(f"{name} gives", o))
        gather = dist.all_gather_single

        def counting(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.gathered += output.nbytes
            return gather(output, *args, **kwargs)

        dist.all_gather_single = counting

    def see(self, name: str, tensor: torch.Tensor) -> None:
        self.dtypes[name] = tensor.dtype

    def on_train_end(self, trainer: Any) -> None:
        self.kept = {p.dtype for p in trainer.model.parameters()}
        self.kept |= {v.dtype for state in trainer.optimizer.state.values() for v in state.values()}
        self.bits = bits([dict(trainer.model.state_dict()), *trainer.optimizer.state.values()])


def fit(precision: str, **parallel: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(8, 1))
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    seen = Seen()
    trainer = fitted(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        train_dataloader=DataLoader(TensorDataset(x, x[:, :1]), 4, shuffle=True),
        val_dataloader=DataLoader(TensorDataset(x, x[:, :1]), 8),
        gradient_accumulation_steps=2,
        epochs=3,
        max_grad_norm=1.0,
        precision=precision,
        callbacks=[seen],
        parallel=Parallel(**parallel),
    )
    state: Any = model._get_fsdp_state() if parallel else None  # pyright: ignore
    offload = [type(g.offload_policy).__name__ for g in state._fsdp_param_groups] if state else []
    return {
        "dtypes": seen.dtypes,
        "gathered": seen.gathered,
        "kept": seen.kept,
        "bits": seen.bits,
        "loss": trainer.result.final_val_loss,
        "plan": [line["decision"] for line in trainer.plan.as_list()],
        "offload": offload,
    }


def test_half_the_bytes_are_gathered_and_the_weights_stay_float32(ranks: Ranks) -> None:
    """The blocks compute in bfloat16, their batch norms as precisely as their statistics are."""
    full, half, replicated = ranks(fit_all, 2)[0]
    assert full["kept"] == half["kept"] == {torch.float32}
    assert half["gathered"] < 0.6 * full["gathered"]
    assert half["dtypes"]["linear"] == half["dtypes"]["linear gives"] == torch.bfloat16
    assert half["dtypes"]["norm"] == torch.bfloat16
    assert half["dtypes"]["batch_norm"] == torch.float32
    assert set(full["dtypes"].values()) == {torch.float32}
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert half["loss"] == pytest.approx(replicated["loss"], rel=0.05)
    assert half["loss"] != full["loss"]
    assert "gathers weights in bfloat16, sums their gradients in float32" in half["plan"]


def fit_all() -> list[Any]:
    return [fit("fp32", dp_shard=2), fit("bf16", dp_shard=2), fit("bf16")]


def fit_offloaded() -> list[Any]:
    return [fit("fp32", dp_shard=2, cpu_offload=offload) for offload in (False, True)]


def test_offloaded_weights_end_with_the_same_bits(ranks: Ranks) -> None:
    for plain, offloaded in ranks(fit_offloaded, 2):
        assert plain["bits"] == offloaded["bits"]
        assert plain["offload"] == ["OffloadPolicy"]
        assert offloaded["offload"] == ["CPUOffloadPolicy"]
        assert "keeps weights in host memory, and steps there" in offloaded["plan"]


def test_what_is_not_sharded_is_not_offloaded() -> None:
    with pytest.raises(ConfigError, match="shard them with"):
        Parallel(cpu_offload=True)
