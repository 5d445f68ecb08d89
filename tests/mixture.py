"""A small mixture of experts, as its author would write it for one process."""

from __future__ import annotations

import torch
from torch import nn


class Experts(nn.Module):
    """Two layers each, for rows that are sorted by expert."""

    def __init__(self, experts: int, size: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, size, hidden) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, size) / hidden**0.5)

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        parts = zip(rows.split(counts.tolist()), self.up, self.bias, self.down, strict=True)
        # As authors do: nothing is computed for experts without rows.
        done = [torch.tanh(x @ up + bias) @ down for x, up, bias, down in parts if len(x)]
        return torch.cat(done)


class Mixture(nn.Module):
    """Each row goes to its two best experts.

    Args:
        size: of a row.
        experts: how many there are.
        favour: added to the scores of the first two; with much of it few rows go to the others.
    """

    ep_plan = {"experts": "experts"}

    def __init__(self, size: int, experts: int = 4, favour: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(size, experts)
        self.experts = Experts(experts, size, 2 * size)
        with torch.no_grad():
            self.router.bias[:2] += favour

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.router.out_features)
        results = self.experts(x[order // 2], counts) * weights.flatten()[order, None]
        return x.index_add(0, order // 2, results.to(x.dtype))
