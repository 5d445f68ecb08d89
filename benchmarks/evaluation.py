"""Evaluating beside a hand-written validation loop, and the memory that predicting takes.

Evaluations of the small convolutional network and the small GPT of `tasks.py` in one process, in
turn with the loop, whose metrics they have to equal: all that `evaluate()` does is counted, from
opening the data to the metrics. Predictions of 10^4 and of 10^5 samples go to a file, each in a
process of its own, whose largest resident set is compared.

    python benchmarks/evaluation.py [--rounds 15]
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

BATCHES = {"cnn": 400, "gpt": 12}  # of a validation
SAMPLES = (10_000, 100_000)


def seconds(task: str, rounds: int) -> dict[str, list[float]]:
    """CPU time of each evaluation, by contestant."""
    import torch
    from tasks import TASKS

    from paceline import Trainer

    torch.set_num_threads(1)
    one = TASKS[task]
    model, _ = one.make()
    loader = one.loader(BATCHES[task], shuffle=False)

    def by_hand() -> float:
        model.eval()
        total, items = torch.zeros((), dtype=torch.float64), 0
        with torch.no_grad():
            for inputs, targets in loader:
                total += one.loss_fn(model(inputs), targets) * len(inputs)
                items += len(inputs)
        model.train()
        return total.item() / items

    trainer = Trainer(model=model, loss_fn=one.loss_fn, progress=False)

    def by_paceline() -> float:
        metrics = trainer.evaluate(loader)
        assert metrics is not None
        return metrics["val/loss"]

    contestants: dict[str, Callable[[], float]] = {
        "hand-written loop": by_hand,
        "trainer.evaluate(loader)": by_paceline,
    }
    found = {name: contestant() for name, contestant in contestants.items()}  # and warms up
    first, second = found.values()
    assert math.isclose(first, second, rel_tol=1e-6), found
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        order = list(contestants.items())
        for name, contestant in order if i % 2 else reversed(order):
            begun = time.process_time()
            contestant()
            times[name].append(time.process_time() - begun)
    return times


def predict(samples: int) -> float:
    """In a process of its own: predicts into a file, and returns the peak in MB.

    Args:
        samples: of 32 numbers each, from 8 numbers that are made as they are read.
    """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from paceline import Trainer
    from paceline.log.predictions import open_predictions

    class Made(Dataset):
        def __len__(self) -> int:
            return samples

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((8,), index / samples)

    torch.set_num_threads(1)
    trainer = Trainer(model=nn.Linear(8, 32), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "predictions.npz")
        with open_predictions(path) as file, trainer.predicting(DataLoader(Made(), 256)) as found:
            for outputs in found:
                file.write(outputs)
        assert file.count == samples
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def peak(samples: int) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--predict", str(samples)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **common.ENVIRONMENT},
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    options = common.arguments(__doc__, rounds=15).parse_args()
    at = common.machine()
    times = {task: seconds(task, options.rounds) for task in BATCHES}
    rows: list[list[str]] = []
    ratios: dict[str, Any] = {}
    for task, by_name in times.items():
        base, _ = by_name.values()
        for name, values in by_name.items():
            ratio = [a / b for a, b in zip(values, base, strict=True)]
            ratios.setdefault(task, {})[name] = common.summary(ratio)
            shown = common.spread([1000 * value for value in values])
            rows.append([task, name, shown, f"{statistics.median(ratio):.3f}"])
    peaks = {samples: peak(samples) for samples in SAMPLES}
    text = "## Evaluating\n\nCPU time of an evaluation; ratio to the loop of its round.\n\n"
    text += common.table(["model", "", "ms", "ratio"], rows)
    text += "\n\n## Predicting into a file\n\nThe process's largest resident set.\n\n"
    text += common.table(["samples", "MB"], [[f"{n:,}", f"{mb:.0f}"] for n, mb in peaks.items()])
    common.save("evaluation", text, {"seconds": times, "ratios": ratios, "MB": peaks}, at)


if __name__ == "__main__":
    if "--predict" in sys.argv:
        print(predict(int(sys.argv[-1])))
    else:
        main()
