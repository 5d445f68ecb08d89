"""What `paceline preflight --on` says a rank takes, beside what real ranks then take on this CPU.

Each real run is a process of its own (two for two ranks) that takes two steps of `recipes/gpt.yaml`
at a width at which weights, gradients and optimizer state come to 203 MB. Its memory is measured
twice: what torch's allocator handed out, by its profiler; and how much larger the process's
resident set got, from after the steps of a tiny model to its peak, which has in it what libraries
(oneDNN, gloo) and malloc keep for themselves.

    python benchmarks/memory_on_paper.py
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from typing import Any

import common

RECIPE = str(common.HERE.parent / "recipes" / "gpt.yaml")
SIZE = ["model.width=512", "model.layers=4", "model.heads=8", "trainer.progress=false"]
SMALL = ["model.width=32", "model.layers=2", "train_dataloader.batch_size=2"]
LARGE = "train_dataloader.batch_size=48"
CASES: dict[str, tuple[int, list[str]]] = {
    "batches of 16": (1, []),
    "batches of 48": (1, [LARGE]),
    "batches of 48, recomputed": (1, [LARGE, "+parallel.activation_checkpointing=full"]),
    "two ranks, sharded": (2, ["+parallel.dp_shard=2"]),
    "two ranks, modules split": (2, ["+parallel.tensor=2"]),
    "two ranks, sequences split": (2, ["+parallel.context=2"]),
    "two ranks, sharded, half as wide": (2, ["+parallel.dp_shard=2", "model.width=256"]),
    "two ranks, modules split, half as wide": (2, ["+parallel.tensor=2", "model.width=256"]),
    "two ranks, sequences split, half as wide": (2, ["+parallel.context=2", "model.width=256"]),
}


def on_paper(ranks: int, words: list[str]) -> dict[str, Any]:
    """The largest sum on a rank in MB, and when it is."""
    from paceline.checkup import fits
    from paceline.recipe import load_recipe

    report = fits(load_recipe(RECIPE, [*SIZE, *words]), f"{ranks}xcpu-64GB")
    assert report.passed, report.checks
    assert report.peak_bytes is not None
    return {"MB": report.peak_bytes / 1e6, "moment": report.moment}


def train(words: list[str]) -> None:
    """Two steps for real."""
    from paceline.recipe import build_trainer, load_recipe

    trainer = build_trainer(load_recipe(RECIPE, [*SIZE, *words]))
    trainer.run_dir, trainer.checkpoint_policy, trainer.callbacks = None, None, []
    with trainer.running(0):
        windows = trainer.windows()
        for _ in range(2):
            trainer.step(next(windows))


def allocated(words: list[str]) -> float:
    """In a process of its own: the most that torch's allocator handed out, in MB.

    Gloo's threads, which the profiler does not watch, let go of some: when an address is given out
    again, what was there before is gone.
    """
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    train([*words, *SMALL])  # the text that the data are cut from is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train(words)
    changes, ahead = [], [*seen.profiler.kineto_results.experimental_event_tree()]
    while ahead:
        event = ahead.pop()
        if event.tag == _EventType.Allocation:
            block = event.extra_fields
            changes.append((event.start_time_ns, block.alloc_size, block.ptr))
        ahead += event.children
    held: dict[int, int] = {}
    total = most = 0
    for _, size, address in sorted(changes, key=lambda change: change[0]):
        total -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            total += size
        most = max(most, total)
    return most / 1e6


def resident(words: list[str]) -> float:
    """In a process of its own: by how much its resident set grew, in MB."""
    train([*words, *SMALL])  # what is imported and set up at first is not counted
    scale = 1 if sys.platform == "darwin" else 2**10
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    train(words)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before) / 1e6


def real(how: str, ranks: int, words: list[str]) -> float:
    """What the smallest of the ranks took, in MB: which of them holds a copy more is chance."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {
        **common.ENVIRONMENT,
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # large blocks go back when they are freed
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if ranks > 1:
        settings |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--real", how, *words],
            env={**os.environ, **settings, **({"RANK": str(rank)} if ranks > 1 else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return min(float(output.split()[-1]) for output in outputs)


def main() -> None:
    common.arguments(__doc__, rounds=1).parse_args()
    at = common.machine()
    found: dict[str, dict[str, Any]] = {}
    for name, (ranks, words) in CASES.items():
        paper = on_paper(ranks, words)
        found[name] = {
            "on paper": paper["MB"],
            "moment": paper["moment"],
            "allocated": real("allocated", ranks, words),
            "resident": real("resident", ranks, words),
        }
        print(name, json.dumps(found[name]), flush=True)
    show(found, at)


def show(found: dict[str, dict[str, Any]], at: dict[str, Any]) -> None:
    """Writes the results."""
    rows = [
        [
            name,
            f"{one['on paper']:.0f}",
            one["moment"],
            f"{one['allocated']:.0f}",
            f"{one['on paper'] / one['allocated']:.3f}",
            f"{one['resident']:.0f}",
            f"{one['on paper'] / one['resident']:.3f}",
        ]
        for name, one in found.items()
    ]
    text = "## Memory on paper\n\nA GPT of 13M parameters, AdamW; MB on a rank at its peak.\n\n"
    head = ["", "on paper", "in the", "allocated", "ratio", "resident", "ratio"]
    common.save("memory_on_paper", text + common.table(head, rows), {"MB": found}, at)


if __name__ == "__main__":
    if "--real" in sys.argv:
        how, *words = sys.argv[sys.argv.index("--real") + 1 :]
        print({"allocated": allocated, "resident": resident}[how](words))
    else:
        main()
