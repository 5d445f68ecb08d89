"""The cost of a training step beside a hand-written loop and other trainers.

Each contestant runs in a process of its own, with one thread, and is asked in turn. The cost of a
step is the slope between a short and a long run, so that neither start nor end counts. It is given
in CPU time, which other work on the machine disturbs less than the clock on the wall; the wall's
times stand in the JSON file. First, every contestant trains without shuffling, and all must end
with the hand-written loop's weights.

With `--before`, Paceline of another checkout is measured in the same rounds, before a change of the
loop, say, and the results are `overhead_before`. Ratios are taken pair by pair, within a round;
their interval holds the median with 95 %.

    python benchmarks/overhead.py [--rounds 7] [--tasks tiny cnn gpt] [--only NAME ...]
                                  [--before FOLDER]
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
from common import Worker

BASE = "hand-written loop"
INDEXED = "hand-written, tensors indexed"
OURS = ("Paceline, lean", "Paceline, defaults")
BEFORE = ", before"
TINY_ONLY = (
    INDEXED,
    "Lightning, default logging",
    "Hugging Face Trainer, default logging",
)
CHECKED_STEPS = {"tiny": 150, "cnn": 30, "gpt": 3}  # over several epochs of `CHECKED_BATCHES`
CHECKED_BATCHES = {"tiny": 60, "cnn": 12, "gpt": 2}


def answer(
    contestant: str, task: str, steps: int, batches: int, shuffle: bool, weights: str | None
) -> dict[str, float]:
    """In a contestant's process: one run, timed; its weights go to a file if asked for."""
    import numpy as np
    import torch
    from contestants import CONTESTANTS, silence
    from tasks import TASKS

    torch.set_num_threads(1)
    silence()
    loader = TASKS[task].loader(batches, shuffle=shuffle)
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        model = CONTESTANTS[contestant.removesuffix(BEFORE)][0](
            TASKS[task], loader, steps, Path(folder)
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if weights is not None:
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        np.save(weights, flat.numpy())
    return {"cpu": cpu, "wall": wall}


def check_weights(workers: dict[str, Worker], task: str) -> dict[str, Any]:
    """Every contestant's weights against the hand-written loop's.

    Raises:
        SystemExit: they differ, so what follows would compare different trainings.
    """
    import numpy as np

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            path = f"{folder}/weights.npy"
            worker.ask(
                contestant=name,
                task=task,
                steps=CHECKED_STEPS[task],
                batches=CHECKED_BATCHES[task],
                shuffle=False,
                weights=path,
            )
            found[name] = np.load(path)
    distances = {name: float(abs(w - found[BASE]).max()) for name, w in found.items()}
    wrong = {name: d for name, d in distances.items() if not d < 1e-6}
    if wrong:
        sys.exit(f"{task}: these do not end with the hand-written loop's weights: {wrong}")
    equal = sum(d == 0 for d in distances.values())
    print(f"{task}: {equal} of {len(distances)} end with the same bits, the others within 1e-6")
    return distances


def measure(
    workers: dict[str, Worker], task: str, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Microseconds a step of each contestant, one value a round."""
    from tasks import TASKS

    short, long = TASKS[task].lengths
    slopes: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in workers}
    for i in range(rounds + 1):
        names = list(workers)
        names = names[i % len(names) :] + names[: i % len(names)]
        for name in names:
            request = {"contestant": name, "task": task, "shuffle": True, "weights": None}
            first = workers[name].ask(steps=short, batches=long, **request)
            second = workers[name].ask(steps=long, batches=long, **request)
            if i > 0:  # the first round warms up
                for clock, values in slopes[name].items():
                    values.append((second[clock] - first[clock]) / (long - short) * 1e6)
    return slopes


def describe(task: str, slopes: dict[str, dict[str, list[float]]]) -> str:
    """The table of one task."""
    base = slopes[BASE]["cpu"]
    rows = []
    for name, times in slopes.items():
        over = [mine - theirs for mine, theirs in zip(times["cpu"], base, strict=True)]
        ratio = [mine / theirs for mine, theirs in zip(times["cpu"], base, strict=True)]
        rows.append(
            [
                name,
                common.spread(times["cpu"]),
                "0" if name == BASE else common.spread(over),
                f"{common.summary(ratio)['median']:.2f}",
            ]
        )
    head = ["", "us a step", "over the loop, us", "ratio"]
    return f"### {task}\n\n{common.table(head, rows)}"


def compare(slopes: dict[str, dict[str, list[float]]]) -> str:
    """Paceline beside the fastest loop and its own earlier state: ratios with their intervals."""
    pairs = [(name, f"{name}{BEFORE}") for name in OURS] + [(OURS[0], INDEXED)]
    rows = []
    for name, other in pairs:
        if name in slopes and other in slopes:
            both = zip(slopes[name]["cpu"], slopes[other]["cpu"], strict=True)
            median, low, high = common.median_interval([mine / theirs for mine, theirs in both])
            rows.append([name, other, f"{median:.3f}", f"{low:.3f} to {high:.3f}"])
    return common.table(["", "beside", "ratio", "95 % interval"], rows) if rows else ""


def main() -> None:
    parser = common.arguments(__doc__, rounds=7)
    parser.add_argument("--tasks", nargs="+", default=["tiny", "cnn", "gpt"])
    parser.add_argument("--only", nargs="+", default=None, help="contestants beside the loop")
    parser.add_argument("--before", type=Path, help="a checkout of Paceline to compare with")
    options = parser.parse_args()
    from contestants import CONTESTANTS

    at = common.machine()
    missing = common.report_missing(package for _, package in CONTESTANTS.values())
    names = [
        name
        for name, (_, package) in CONTESTANTS.items()
        if package not in missing and (options.only is None or name == BASE or name in options.only)
    ]
    data: dict[str, Any] = {"rounds": options.rounds, "tasks": {}}
    tables = []
    with ExitStack() as stack:
        everybody = {n: stack.enter_context(Worker([__file__, "--serve"])) for n in names}
        if options.before is not None:
            path = str((options.before / "src").resolve(strict=True))
            for name in (name for name in OURS if name in names):
                worker = Worker([__file__, "--serve"], PYTHONPATH=path)
                everybody[name + BEFORE] = stack.enter_context(worker)
        for task in options.tasks:
            # What a longer step hides is measured once, on the tiny model.
            workers = {n: w for n, w in everybody.items() if task == "tiny" or n not in TINY_ONLY}
            distances = check_weights(workers, task)
            rounds = options.rounds if task == "tiny" else max(3, options.rounds - 2)
            slopes = measure(workers, task, rounds)
            data["tasks"][task] = {"weights apart by": distances, "us a step": slopes}
            tables.append("\n\n".join(filter(None, [describe(task, slopes), compare(slopes)])))
            print(tables[-1], flush=True)
    title = "## A training step beside a hand-written loop\n\nMedians (quartiles) of interleaved "
    title += "rounds, CPU time; one thread, no workers, SGD, shuffled TensorDatasets."
    if options.before is not None:
        from paceline.log.provenance import git_state

        data["before"] = git_state(options.before)
        title += f" Before: {(data['before'] or {}).get('commit')}."
    name = "overhead" if options.before is None else "overhead_before"
    common.save(name, "\n\n".join([title, *tables]), data, at)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        common.serve(answer)
    else:
        main()
