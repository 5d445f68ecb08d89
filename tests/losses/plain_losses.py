"""The formulas of `paceline.losses` as loops over numbers, one line for each symbol of a paper."""

from __future__ import annotations

import math
from typing import Any

import torch

Rows = list[list[float]]


def double(values: Any) -> torch.Tensor:
    """Numbers as a tensor in double precision."""
    return torch.tensor(values, dtype=torch.float64)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def grpo(
    logps: Rows,
    old: Rows,
    advantages: Rows,
    mask: list[list[bool]],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref: Rows | None = None,
    beta: float = 0.0,
    ratio: str = "clip",
    cap: float | None = None,
    aggregation: str = "grpo",
    max_length: int | None = None,
    level: str = "token",
) -> float:
    """The loss of `grpo_loss`."""
    sequences = []
    for i, row in enumerate(logps):
        tokens = [t for t in range(len(row)) if mask[i][t]]
        shifts = {t: row[t] - old[i][t] for t in tokens}
        if level == "sequence" and tokens:
            mean = sum(shifts.values()) / len(tokens)
            shifts = dict.fromkeys(tokens, mean)
        losses = []
        for t in tokens:
            r, a = math.exp(shifts[t]), advantages[i][t]
            if ratio == "cispo":
                loss = -min(r, cap) * a * row[t]  # pyright: ignore[reportArgumentType]
            else:
                held = clip(r, 1 - clip_low, 1 + clip_high)
                loss = -min((r if cap is None else min(r, cap)) * a, held * a)
            if beta and ref is not None:
                d = ref[i][t] - row[t]
                loss += beta * (math.exp(d) - d - 1)
            losses.append(loss)
        sequences.append(losses)
    if aggregation == "grpo":
        return sum(sum(x) / max(len(x), 1) for x in sequences) / len(sequences)
    total = sum(map(sum, sequences))
    if aggregation == "dr_grpo":
        return total / (len(sequences) * max_length)  # pyright: ignore[reportOptionalOperand]
    return total / max(sum(map(len, sequences)), 1)


def dpo(
    up: float, down: float, kind: str, beta: float, smoothing: float, sizes: tuple[int, int] | None
) -> float:
    """The loss of one pair, from its log-ratios to the reference."""

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    if sizes is not None:
        up, down = up / max(sizes[0], 1), down / max(sizes[1], 1)
    d = up - down
    right, wrong = log_sigmoid(beta * d), log_sigmoid(-beta * d)
    return {
        "sigmoid": -(1 - smoothing) * right - smoothing * wrong,
        "sigmoid_norm": -right,
        "hinge": max(0.0, 1 - beta * d),
        "ipo": (d - 1 / (2 * beta)) ** 2,
        "robust": (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing),
    }[kind]


def gae(
    rewards: list[float],
    values: list[float],
    after: list[float],
    terminated: list[bool],
    ended: list[bool],
    *,
    gamma: float,
    lam: float,
) -> list[float]:
    """Advantages of one row without a mask, each as its sum over the errors that follow."""
    advantages = []
    for start in range(len(rewards)):
        total, factor = 0.0, 1.0
        for t in range(start, len(rewards)):
            worth = 0.0 if terminated[t] else after[t]
            total += factor * (rewards[t] + gamma * worth - values[t])
            if terminated[t] or ended[t]:
                break
            factor *= gamma * lam
        advantages.append(total)
    return advantages


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    """Of a sample."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(sum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))
