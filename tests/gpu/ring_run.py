"""A run whose attention is a ring over the ranks there are; rank 0 writes the weights it ends with.

torchrun --nproc-per-node 2 ring_run.py FILE
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.parallel import attention

HEADS, SIZE, LENGTH = 4, 16, 64


class Looking(nn.Module):
    """[batch, LENGTH, HEADS * SIZE] -> the same shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        return x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def main(file: str) -> None:
    ranks: Any = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("PACELINE_REHEARSE_GPU"):
        from emulated_ring import emulate

        emulate()
    x = torch.randn(32, LENGTH, HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    model = Looking()
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, fused=True),
        loss_fn=nn.functional.mse_loss,
        train_dataloader=DataLoader(TensorDataset(x, x.cumsum(1).tanh()), 8),
        epochs=2,
        precision="bf16",
        progress=False,
        parallel=Parallel(context=ranks, context_attention="ring"),
    )
    trainer.train(seed=3)
    if trainer.world.rank == 0:
        save_file({name: t.cpu() for name, t in model.state_dict().items()}, file)


if __name__ == "__main__":
    main(sys.argv[1])
