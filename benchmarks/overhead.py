"""The cost of a training step beside a hand-written loop and other trainers.

Each contestant runs in a process of its own, with one thread. All train at once, in turn: a few
steps of one, then of the next, so that whatever else the machine does falls on all alike. Start and
end of a run do not count. A step's cost is given in CPU time; the wall's times stand in the JSON
file. First, every contestant trains without shuffling, and all must end with the hand-written
loop's weights.

With `--before`, Paceline of another checkout is measured in the same turns, before a change of the
loop, say, and the results are `overhead_before`. Ratios are taken pair by pair, within a round;
their interval holds the median with 95 %.

    python benchmarks/overhead.py [--rounds 12] [--tasks tiny cnn gpt] [--only NAME ...]
                                  [--before FOLDER]
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
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
) -> None:
    """In a contestant's process: a run whose weights go to a file, or one that takes turns."""
    import numpy as np
    import torch
    from contestants import CONTESTANTS, silence
    from tasks import TASKS

    torch.set_num_threads(1)
    silence()
    todo = TASKS[task]
    if weights is None:
        todo = replace(todo, model=lambda: in_turns(TASKS[task].model(), todo.steps))
    loader = todo.loader(batches, shuffle=shuffle)
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        model = CONTESTANTS[contestant.removesuffix(BEFORE)][0](todo, loader, steps, Path(folder))
    if weights is not None:
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        np.save(weights, flat.numpy())


def in_turns(model: Any, steps: int) -> Any:
    """A model that gives way after so many of its steps, and says what they have taken."""
    done, cpu, wall = 0, 0.0, 0.0

    def count(*_: Any) -> None:
        nonlocal done, cpu, wall
        if done % steps == 0:
            took = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            common.give_way(took)
            cpu, wall = time.process_time(), time.perf_counter()
        done += 1

    model.register_forward_pre_hook(count)
    return model


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

    turns, steps = TASKS[task].turns, TASKS[task].steps
    # The first turn warms up, and the run ends in one of its own; no epoch ends in between.
    length = (turns + 1) * steps + 1
    found: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in workers}
    for i in range(rounds):
        names = list(workers)
        names = names[i % len(names) :] + names[: i % len(names)]
        spent = {name: {"cpu": 0.0, "wall": 0.0} for name in names}
        for name in names:
            workers[name].ask(
                contestant=name,
                task=task,
                steps=length,
                batches=length,
                shuffle=True,
                weights=None,
            )
        for turn in range(turns + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                took = workers[name].ask()
                for clock in took if turn > 0 else ():
                    spent[name][clock] += took[clock]
        for name in names:
            workers[name].ask()
            for clock, seconds in spent[name].items():
                found[name][clock].append(seconds / (turns * steps) * 1e6)
    return found


def describe(task: str, times: dict[str, dict[str, list[float]]]) -> str:
    """The table of one task."""
    base = times[BASE]["cpu"]
    rows = []
    for name, of_one in times.items():
        over = [mine - theirs for mine, theirs in zip(of_one["cpu"], base, strict=True)]
        ratio = [mine / theirs for mine, theirs in zip(of_one["cpu"], base, strict=True)]
        rows.append(
            [
                name,
                common.spread(of_one["cpu"]),
                "0" if name == BASE else common.spread(over),
                f"{common.summary(ratio)['median']:.2f}",
            ]
        )
    head = ["", "us a step", "over the loop, us", "ratio"]
    return f"### {task}\n\n{common.table(head, rows)}"


def compare(times: dict[str, dict[str, list[float]]]) -> str:
    """Paceline beside the fastest loop and its own earlier state: ratios with their intervals."""
    pairs = [(name, f"{name}{BEFORE}") for name in OURS] + [(OURS[0], INDEXED)]
    rows = []
    for name, other in pairs:
        if name in times and other in times:
            both = zip(times[name]["cpu"], times[other]["cpu"], strict=True)
            median, low, high = common.median_interval([mine / theirs for mine, theirs in both])
            rows.append([name, other, f"{median:.3f}", f"{low:.3f} to {high:.3f}"])
    return common.table(["", "beside", "ratio", "95 % interval"], rows) if rows else ""


def main() -> None:
    parser = common.arguments(__doc__, rounds=12)
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
            times = measure(workers, task, options.rounds)
            data["tasks"][task] = {"weights apart by": distances, "us a step": times}
            tables.append("\n\n".join(filter(None, [describe(task, times), compare(times)])))
            print(tables[-1], flush=True)
    title = "## A training step beside a hand-written loop\n\nMedians (quartiles) of interleaved "
    title += "turns, CPU time; one thread, no workers, SGD, shuffled TensorDatasets."
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
