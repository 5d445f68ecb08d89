"""How long a checkpoint holds up the training: 50M parameters and AdamW, 604 MB, on any device.

Three ways, in turn: plain `torch.save` of the state, a synchronous save of Paceline's, and an
asynchronous one, of which only what the loop waits for counts. All keep the newest and remove the
one before it once the new one is there. Paceline verifies, sums and syncs what it writes, so
`torch.save` stands here with and without a file-system sync. An asynchronous write is waited for
before anything else runs, so that it slows down nothing but itself.

    python benchmarks/checkpoints.py [--rounds 7] [--folder PATH] [--device cuda]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

WIDTH, LAYERS = 2048, 12
PLAIN, SYNCED = "torch.save", "torch.save and sync"
SYNC, ASYNC = "Paceline, synchronous", "Paceline, asynchronous: the loop waits"
WHOLE = "Paceline, asynchronous: until it is durable"


def build(width: int, device: str) -> tuple[Any, Any]:
    """A model, of 50M parameters at full width, and its optimizer, which has taken a step."""
    import torch
    from torch import nn

    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.randn(1, width, device=device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


class Plain:
    """What a careful user writes: the new file first, then away with the old one."""

    def __init__(self, folder: Path, *, sync: bool) -> None:
        self._folder, self._sync, self._count = folder, sync, 0

    def save(self, state: Any) -> None:
        import torch

        self._count += 1
        with open(self._folder / f"{self._sync}_{self._count}.pt", "wb") as file:
            torch.save(state, file)
            if self._sync:
                file.flush()
                os.fsync(file.fileno())
        (self._folder / f"{self._sync}_{self._count - 1}.pt").unlink(missing_ok=True)


def run(folder: Path, rounds: int, width: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way, one value a round."""
    import torch

    from paceline import CheckpointPolicy, World
    from paceline.checkpoint import NativeEngine

    model, optimizer = build(width, device)
    savers = [
        NativeEngine(folder / name, CheckpointPolicy(), World()) for name in ("sync", "async")
    ]
    plain = [Plain(folder, sync=sync) for sync in (False, True)]
    state: dict[str, Any] = {}
    ways: dict[str, Callable[[int], Any]] = {
        PLAIN: lambda i: plain[0].save(state),
        SYNCED: lambda i: plain[1].save(state),
        SYNC: lambda i: savers[0].save(state, i, synchronous=True),
        ASYNC: lambda i: savers[1].save(state, i),
    }
    times: dict[str, list[float]] = {name: [] for name in (*ways, WHOLE)}
    for i in range(rounds + 1):
        state["models"] = {"model": model.state_dict()}
        state["optimizers"] = {"optimizer": optimizer.state_dict()}
        names = list(ways)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if device != "cpu":
                torch.accelerator.synchronize()
            start = time.perf_counter()
            ways[name](i)
            seen = {name: time.perf_counter() - start}
            if name == ASYNC:
                savers[1].wait()
                seen[WHOLE] = time.perf_counter() - start
            if i > 0:  # the first makes buffers and plans
                for each, seconds in seen.items():
                    times[each].append(seconds)
    for saver in savers:
        saver.close()
    return times


def main() -> None:
    parser = common.arguments(__doc__, rounds=7)
    parser.add_argument("--folder", type=Path, default=None, help="a place on the disk to measure")
    parser.add_argument("--device", default="cpu", help="where the state is")
    parser.add_argument("--width", type=int, default=WIDTH, help="a smaller one is a trial")
    options = parser.parse_args()
    at = common.machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times = run(Path(folder), options.rounds, options.width, options.device)
    ratios = {n: [m / p for m, p in zip(v, times[PLAIN], strict=True)] for n, v in times.items()}
    rows = [
        [name, common.spread(values, 2), f"{statistics.median(ratios[name]):.2f}"]
        for name, values in times.items()
    ]
    megabytes = 12e-6 * LAYERS * options.width * (options.width + 1)  # 3 x fp32 a parameter
    where = "" if options.device == "cpu" else f", on {options.device.upper()}"
    text = f"## A checkpoint of {megabytes:.3g} MB\n\n"
    text += f"{megabytes / 12:.3g}M parameters and AdamW{where}.\n\n"
    text += common.table(["", "seconds", "ratio to torch.save"], rows)
    name = "checkpoints" if options.device == "cpu" else "checkpoints_on_gpu"
    common.save(name, text, {"seconds": times}, at, trial=options.width != WIDTH)


if __name__ == "__main__":
    main()
