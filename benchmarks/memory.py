"""Peak memory of a training, with checkpoints off and on, beside a hand-written loop.

Each run is a process of its own that trains 25M parameters with AdamW (400 MB of weights, gradients
and optimizer state) for 20 steps. Peak memory is the process's largest resident set.

    python benchmarks/memory.py [--rounds 3]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile

import common

WIDTH, LAYERS, STEPS = 2048, 6, 20
HAND, OFF = "hand-written loop", "Paceline, checkpoints off"
NAMES = (HAND, OFF, "Paceline, defaults, a checkpoint each 5 steps")


def train(contestant: str) -> float:
    """In a process of its own: trains, and returns the peak in MB."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(STEPS * 4, WIDTH), torch.randn(STEPS * 4, WIDTH))
    loader = DataLoader(data, 4)
    if contestant == HAND:
        for inputs, targets in loader:
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        from paceline import CheckpointPolicy, Trainer

        with tempfile.TemporaryDirectory() as folder:
            settings = (
                {"loggers": [], "progress": False, "checkpoint": None}
                if contestant == OFF
                else {"run_dir": folder, "checkpoint": CheckpointPolicy(every_steps=5)}
            )
            Trainer(
                model=model,
                optimizer=optimizer,
                loss_fn=nn.functional.mse_loss,
                train_dataloader=loader,
                epochs=1,
                **settings,
            ).train(seed=0)
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
    options = common.arguments(__doc__, rounds=3).parse_args()
    at = common.machine()
    peaks: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(options.rounds):
        for name, values in peaks.items():
            done = subprocess.run(
                [sys.executable, __file__, "--train", name],
                capture_output=True,
                text=True,
                check=True,
                # Large blocks each by themselves: else the peak jumps by the heap's gaps.
                env={**os.environ, **common.ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "1000000"},
            )
            values.append(float(done.stdout.split()[-1]))
    base = statistics.median(peaks[HAND])
    rows = [
        [name, common.spread(values), f"{statistics.median(values) / base:.3f}"]
        for name, values in peaks.items()
    ]
    text = "## Peak memory\n\n25M parameters, AdamW, 20 steps.\n\n"
    text += common.table(["", "MB", "ratio"], rows)
    common.save("memory", text, {"MB": peaks}, at)


if __name__ == "__main__":
    if "--train" in sys.argv:
        print(train(sys.argv[-1]))
    else:
        main()
