"""Trains the curves on which `pruning.py` replays pruners, and stores them in `curves/`.

Three sets of 60 configurations drawn at random, each with 20 validation losses at equal shares of
its steps:

- digits: a network of one or two layers on scikit-learn's digits, constant learning rates. Four
  seeds of each configuration: the curve of the first is stored, and the ends of all.
- manual: a character model on the texts of Python's own manual (`pydoc_data`), constant rates.
- schedules: digits with a fifth of the labels wrong, under learning rates that are constant, fall
  at the end, or rise first: the curves cross.

    python benchmarks/pruning_curves.py [digits manual schedules]
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CURVES = Path(__file__).parent / "curves"
COUNT, REPORTS, SEEDS = 60, 20, 4
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def digits(noise: float = 0.0) -> Data:
    """Images and labels for training (with a share of wrong labels) and for validation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(y), generator=generator) < noise
    noisy = torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)
    return x[:1300], noisy[:1300], x[1300:], y[1300:]


def manual() -> Data:
    """Eight characters and the one that follows."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    codes = torch.tensor(list(text)).clamp(max=127)
    windows = codes.unfold(0, 9, 9)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[order]
    x, y = windows[:, :8], windows[:, 8]
    return x[2000:], y[2000:], x[:2000], y[:2000]


def model(kind: str, drawn: dict[str, Any]) -> nn.Module:
    """The network of a configuration."""
    width = drawn["width"]
    if kind == "manual":
        head: list[nn.Module] = [nn.Embedding(128, 16), nn.Flatten()]
        size, classes = 128, 128
    else:
        head, size, classes = [], 64, 10
    for _ in range(drawn["layers"]):
        head += [nn.Linear(size, width), nn.ReLU(), nn.Dropout(drawn["dropout"])]
        size = width
    return nn.Sequential(*head, nn.Linear(size, classes))


def drawn_at_random(kind: str, number: int) -> dict[str, Any]:
    """A configuration."""
    dice = random.Random(f"{kind} {number}")
    adam = dice.random() < 0.5
    low, high = (-3.7, -1.3) if adam else (-2.5, 0.3)
    schedules = ["constant", "cosine", "drop", "rise"] if kind == "schedules" else ["constant"]
    return {
        "optimizer": "adam" if adam else "sgd",
        "lr": 10 ** dice.uniform(low, high),
        "width": dice.choice([16, 32, 64, 128]),
        "layers": dice.choice([1, 2]),
        "dropout": dice.choice([0.0, 0.1, 0.3]),
        "batch": dice.choice([32, 64, 128]),
        "schedule": dice.choice(schedules),
    }


def factor(schedule: str, share: float) -> float:
    """Of the learning rate, at a share of the steps."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "drop":
        return 1.0 if share < 0.75 else 0.05
    if schedule == "rise":
        return min(1.0, 0.05 + share / 0.6) * (1.0 if share < 0.8 else 0.1)
    return 1.0


def curve(kind: str, data: Data, drawn: dict[str, Any], seed: int) -> list[float]:
    """The validation losses of one training."""
    torch.manual_seed(seed)
    x, y, x_val, y_val = data
    net = model(kind, drawn)
    make: Any = torch.optim.Adam if drawn["optimizer"] == "adam" else torch.optim.SGD
    optimizer = make(net.parameters(), lr=drawn["lr"])
    batch = drawn["batch"]
    steps = (60_000 if kind == "manual" else 25_000) // batch
    found: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = drawn["lr"] * factor(drawn["schedule"], step / steps)
        rows = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if step * REPORTS // steps > len(found):
            net.eval()
            with torch.no_grad():
                found.append(round(F.cross_entropy(net(x_val), y_val).item(), 5))
            net.train()
    return found


def main() -> None:
    """Writes the sets that are named, or all."""
    torch.set_num_threads(1)
    for kind in sys.argv[1:] or ["digits", "manual", "schedules"]:
        data = manual() if kind == "manual" else digits(0.2 if kind == "schedules" else 0.0)
        rows = []
        for number in range(COUNT):
            drawn = drawn_at_random(kind, number)
            seeds = [curve(kind, data, drawn, s) for s in range(SEEDS if kind == "digits" else 1)]
            row = {"number": number, **drawn, "losses": seeds[0]}
            if len(seeds) > 1:
                row["ends"] = [one[-1] for one in seeds]
            rows.append(json.dumps(row))
            print(kind, number, drawn["schedule"], f"{seeds[0][-1]:.4f}", flush=True)
        CURVES.mkdir(exist_ok=True)
        (CURVES / f"{kind}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
