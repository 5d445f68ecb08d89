"""A step on two ranks beside hand-written loops, with DistributedDataParallel and with FSDP2.

Two processes on gloo, one thread each, train the small GPT in all ways, in the same process group,
on the same samples. The two loops of a layout take their steps in turn, one each, behind a barrier:
a step is compared with the one beside it. All must end with equal weights. Timed on rank 0.

    python benchmarks/scaling.py [--rounds 60]
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import common

WARM_UP = 5
LAYOUTS = "DDP", "FSDP2"


def hand_written(task: Any, model: Any, optimizer: Any, dataset: Any, layout: str) -> Iterator[Any]:
    """A loop over this rank's half of each batch of 2 x batch_size samples, in order."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, Subset

    size, rank, ranks = task.batch_size, dist.get_rank(), dist.get_world_size()
    mine = [i for i in range(len(dataset)) if i // size % ranks == rank]
    if layout == "DDP":
        replica: Any = DistributedDataParallel(model)
    else:
        before = dict(model.named_parameters())
        for block in model.blocks.layers:
            fully_shard(block)
        replica = fully_shard(model)
        after = {id(before[name]): p for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [after[id(p)] for p in group["params"]]
    for inputs, targets in DataLoader(Subset(dataset, mine), size):
        loss = task.loss_fn(replica(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def weights(model: Any) -> Any:
    """All parameters in one vector, gathered if they are sharded."""
    import torch

    tensors = [p.detach() for p in model.parameters()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([tensor.flatten() for tensor in whole])


def ours(task: Any, model: Any, optimizer: Any, dataset: Any, layout: str) -> Iterator[Any]:
    """The same with Paceline, which finds the process group there."""
    from torch.utils.data import DataLoader

    from paceline import Parallel, Trainer

    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loss_fn=task.loss_fn,
        train_dataloader=DataLoader(dataset, task.batch_size),
        epochs=1,
        loggers=[],
        progress=False,
        checkpoint=None,
        parallel=Parallel(dp_shard=2 if layout == "FSDP2" else 1),
    )
    for window in trainer.windows():
        trainer.step(window)
        yield


def rank_program(rounds: int) -> None:
    """What each rank runs; rank 0 prints the result."""
    import torch
    import torch.distributed as dist
    from tasks import TASKS

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    task = TASKS["gpt"]
    dataset = task.loader(2 * (WARM_UP + rounds), shuffle=False).dataset
    ends: list[Any] = []
    times: dict[str, list[float]] = {}
    for layout in LAYOUTS:
        made = {who: task.make() for who in LOOPS}
        loops = {who: loop(task, *made[who], dataset, layout) for who, loop in LOOPS.items()}
        took: dict[str, list[float]] = {who: [] for who in LOOPS}
        for i in range(WARM_UP + rounds):
            for who in list(LOOPS)[:: 1 if i % 2 else -1]:
                dist.barrier()
                start = time.perf_counter()
                next(loops[who])
                took[who].append((time.perf_counter() - start) * 1e3)
        for who, loop in loops.items():
            assert next(loop, "ended") == "ended"
            times[f"{who}, {layout}"] = took[who][WARM_UP:]
            ends.append(weights(made[who][0]))
    apart = max(float((end - ends[0]).abs().max()) for end in ends)
    if dist.get_rank() == 0:
        print(json.dumps({"apart": apart, "ms": times}), flush=True)
    dist.destroy_process_group()


LOOPS = {"hand-written": hand_written, "Paceline": ours}


def main() -> None:
    options = common.arguments(__doc__, rounds=60).parse_args()
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
        sys.exit(f"the loops end with weights {found['apart']} apart")
    print(f"all end with equal weights, to {found['apart']:.1e}")
    rows = []
    for layout in LAYOUTS:
        hand, own = (found["ms"][f"{who}, {layout}"] for who in ("hand-written", "Paceline"))
        ratio = statistics.median(b / a for a, b in zip(hand, own, strict=True))
        rows.append([f"hand-written, {layout}", common.spread(hand, 1), ""])
        rows.append([f"Paceline, {layout}", common.spread(own, 1), f"{ratio:.3f}"])
    text = "## A step on two ranks\n\nThe small GPT on 2 x gloo, 2 x 8 x 128 tokens a step.\n\n"
    text += common.table(["", "ms a step", "ratio"], rows)
    common.save("scaling", text, found, at)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_program(int(sys.argv[-1]))
    else:
        main()
