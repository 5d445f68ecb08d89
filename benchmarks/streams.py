"""What a random stream for each sample costs.

A map-style dataset may draw random numbers in `__getitem__`, so Paceline seeds torch, numpy and
`random` before each sample. This is the difference to a hand-written loop over the same dataset,
per sample, in CPU time by the slope between two run lengths; and what the seeding takes alone.

    python benchmarks/streams.py [--rounds 9]
"""

from __future__ import annotations

import sys
import tempfile
import time
import timeit
from contextlib import ExitStack
from pathlib import Path

import common
from common import Worker

LENGTHS = 100, 500
NAMES = ("hand-written loop", "Paceline, lean")


def answer(contestant: str, steps: int) -> float:
    """In a contestant's process: CPU seconds of one run."""
    import torch
    from contestants import CONTESTANTS, silence
    from tasks import TASKS

    torch.set_num_threads(1)
    silence()
    if contestant == "seeding alone":
        return _seeding()
    loader = TASKS["tiny"].loader(LENGTHS[1], shuffle=True, mapped=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        CONTESTANTS[contestant][0](TASKS["tiny"], loader, steps, Path(folder))
        return time.process_time() - start


def _seeding() -> float:
    """CPU seconds to seed torch, numpy and `random` once, in the loop's own way."""
    from paceline.data.fetch import seed_sample

    return timeit.timeit(lambda: seed_sample(3, 7), number=20_000, timer=time.process_time) / 20_000


def main() -> None:
    options = common.arguments(__doc__, rounds=9).parse_args()
    from tasks import TASKS

    at = common.machine()
    steps: dict[str, list[float]] = {name: [] for name in NAMES}
    alone: list[float] = []
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Worker([__file__, "--serve"])) for n in NAMES}
        for i in range(options.rounds + 1):
            for name, worker in workers.items():
                short, long = (worker.ask(contestant=name, steps=n) for n in LENGTHS)
                if i > 0:
                    steps[name].append((long - short) / (LENGTHS[1] - LENGTHS[0]) * 1e6)
            seconds = workers[NAMES[1]].ask(contestant="seeding alone", steps=0)
            if i > 0:
                alone.append(seconds * 1e6)
    size = TASKS["tiny"].batch_size
    more = [(b - a) / size for a, b in zip(steps[NAMES[0]], steps[NAMES[1]], strict=True)]
    rows = [[name, common.spread(steps[name]), ""] for name in NAMES]
    rows.append(["more, a sample", "", common.spread(more, 1)])
    rows.append(["of which seeding", "", common.spread(alone, 1)])
    text = "## A random stream for each sample\n\nA map-style dataset, batches of 32; CPU time.\n\n"
    text += common.table(["", "us a step", "us a sample"], rows)
    common.save("streams", text, {"us a step": steps, "us a sample": more, "seeding": alone}, at)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        common.serve(answer)
    else:
        main()
