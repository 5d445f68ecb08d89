"""A step on two ranks beside a hand-written DistributedDataParallel loop.

Two processes on gloo, one thread each, train the small GPT in both ways in turn, in the same
process group, on the same samples. First both must end with equal weights. The time of a step is
the slope between two run lengths, on rank 0.

    python benchmarks/ddp.py [--rounds 15]
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import common

LENGTHS = 2, 8
CHECKED_STEPS = 4
HAND, OURS = "hand-written DDP loop", "Paceline"


def hand_written(task: Any, dataset: Any, steps: int) -> Any:
    """A DDP loop over this rank's half of each batch of 2 x batch_size samples, in order."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, Subset

    size, rank, ranks = task.batch_size, dist.get_rank(), dist.get_world_size()
    mine = [i for i in range(len(dataset)) if i // size % ranks == rank]
    model, optimizer = task.make()
    replica = DistributedDataParallel(model)
    step = 0
    while True:
        for inputs, targets in DataLoader(Subset(dataset, mine), size):
            loss = task.loss_fn(replica(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == steps:
                return torch.cat([p.detach().flatten() for p in model.parameters()])


def ours(task: Any, dataset: Any, steps: int) -> Any:
    """The same with Paceline, which finds the process group there."""
    import torch
    from torch.utils.data import DataLoader

    from paceline import Trainer

    model, optimizer = task.make()
    Trainer(
        model=model,
        optimizer=optimizer,
        loss_fn=task.loss_fn,
        train_dataloader=DataLoader(dataset, task.batch_size),
        max_steps=steps,
        loggers=[],
        progress=False,
        checkpoint=None,
    ).train(seed=0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rank_program(rounds: int) -> None:
    """What each rank runs; rank 0 prints the result."""
    import torch
    import torch.distributed as dist
    from tasks import TASKS

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    task = TASKS["gpt"]
    dataset = task.loader(2 * LENGTHS[1], shuffle=False).dataset
    contestants = {HAND: hand_written, OURS: ours}
    ends = {name: run(task, dataset, CHECKED_STEPS) for name, run in contestants.items()}
    apart = float((ends[HAND] - ends[OURS]).abs().max())
    slopes: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in list(contestants)[:: 1 if i % 2 else -1]:
            seconds = []
            for steps in LENGTHS:
                dist.barrier()
                start = time.perf_counter()
                contestants[name](task, dataset, steps)
                seconds.append(time.perf_counter() - start)
            slopes[name].append((seconds[1] - seconds[0]) / (LENGTHS[1] - LENGTHS[0]) * 1e3)
    if dist.get_rank() == 0:
        print(json.dumps({"apart": apart, "ms": slopes}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    options = common.arguments(__doc__, rounds=15).parse_args()
    at = common.machine()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(options.rounds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **common.ENVIRONMENT, **where, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    output, _ = (rank.communicate()[0] for rank in ranks)
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")
    found = json.loads(output.splitlines()[-1])
    if not found["apart"] < 1e-5:
        sys.exit(f"the two loops end with weights {found['apart']} apart")
    print(f"both end with equal weights, to {found['apart']:.1e}")
    ratio = [b / a for a, b in zip(found["ms"][HAND], found["ms"][OURS], strict=True)]
    rows = [[name, common.spread(values, 1), ""] for name, values in found["ms"].items()]
    rows[1][2] = f"{statistics.median(ratio):.3f}"
    text = "## A step on two ranks\n\nThe small GPT on 2 x gloo, 2 x 8 x 128 tokens a step.\n\n"
    text += common.table(["", "ms a step", "ratio"], rows)
    common.save("ddp", text, found, at)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_program(int(sys.argv[-1]))
    else:
        main()
