"""Language models: the numbers of TRL and of transformers' Trainer, and how fast.

Every contestant trains on the same samples, a window over all of them each step, in a process of
its own with one thread; the windows are taken in turn. Losses, the first gradients and the final
weights must equal those of a loop over each document alone. Times are CPU time.

Lengths are log-normal with a mean of 150 tokens, padded in micro-batches of 8 to the longest, or in
packs of 2,048. How much packing gains depends on how far they spread: sigma is the standard
deviation of their logarithms, "real" the part of padded rows that is no padding.

    python benchmarks/lm.py [--rounds 6] [--parts equality speed spread data]

A part that is run alone replaces that part of the results.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
from common import Worker

BASE = "hand-written, each alone"
PADDED, PACKED = "Paceline, padded", "Paceline, packed"
TRL_PADDED, TRL_PACKED, TRL_FLAT = "TRL, padded", "TRL, packed", "TRL, padding-free"
CAUSAL = (BASE, "Paceline, causal", "Hugging Face Trainer, causal")
EQUAL = {
    "dialogues": (BASE, PADDED, PACKED, TRL_PADDED, TRL_PACKED, TRL_FLAT),
    "texts": CAUSAL,
}
STEPS = 4
ALLOWED = 1e-6  # of the largest
MILLION, SAMPLES = 1_000_000, 100_000


# In a contestant's process


def answer(job: str, **request: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return {"train": train, "plan": plan, "fill": fill_cache, "open": open_cache}[job](**request)


def train(contestant: str, task: str, steps: int, file: str, turns: bool) -> None:
    """Trains, and keeps losses, the first gradients and the final weights.

    Args:
        contestant, task: by name.
        steps: of the optimizer.
        file: for what is kept.
        turns: give way after each step, and say what it took.
    """
    import numpy as np
    from lm_contestants import CONTESTANTS, make, task_of
    from transformers import logging

    logging.set_verbosity_error()
    todo = task_of(task)
    model, optimizer = make()
    kept: dict[str, Any] = {}
    begun = {"cpu": 0.0, "wall": 0.0}

    def flat(tensors: Any) -> Any:
        return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])

    def before(*_: Any) -> None:
        if not kept:
            kept["gradients"] = flat(p.grad for p in model.parameters())

    def after(*_: Any) -> None:
        if turns:
            now = {"cpu": time.process_time(), "wall": time.perf_counter()}
            common.give_way({clock: now[clock] - start for clock, start in begun.items()})
            begun.update(cpu=time.process_time(), wall=time.perf_counter())

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    with tempfile.TemporaryDirectory() as folder:
        losses = CONTESTANTS[contestant][0](todo, model, optimizer, steps, Path(folder))
    np.savez(file, losses=losses, weights=flat(model.parameters()), **kept)


def plan() -> dict[str, float]:
    """Packs a million lengths."""
    from lm_contestants import CAPACITY, drawn_log_normal

    from paceline.lm.data.packing import plan_packs

    lengths = drawn_log_normal(1.0, MILLION)
    start = time.process_time()
    packs = plan_packs(lengths, CAPACITY)
    seconds = time.process_time() - start
    assert packs.tokens == lengths.sum()
    return {"seconds": seconds, "fill": packs.fill}


def fill_cache(folder: str) -> dict[str, float]:
    """Writes dialogues, a tokenizer and a tiny model, and tokenizes the dialogues."""
    from lm_contestants import dialogues, make, tokenizer

    into = Path(folder)
    with (into / "chats.jsonl").open("w") as file:
        some = dialogues(1000, words=8)
        for i in range(SAMPLES):
            question, *others = some[i % len(some)]["messages"]
            asked = {**question, "content": f"{i}: {question['content']}"}
            file.write(json.dumps({"messages": [asked, *others]}) + "\n")
    tokenizer().save_pretrained(into / "model")
    make()[0].save_pretrained(into / "model")
    return open_cache(folder, "auto")


def open_cache(folder: str, cache: str = "only") -> dict[str, float]:
    """From a recipe to the first batch; with "only", tokenizing would be an error."""
    from paceline.factories import get_config
    from paceline.lm.trainers import SFTTrainer

    into = Path(folder)
    data = {
        "pack": True,
        "max_length": 2048,
        "cache": cache,
        "cache_dir": str(into / "cache"),
        "sources": [{"type": "jsonl", "path": str(into / "chats.jsonl")}],
    }
    section = {"name_or_path": str(into / "model")}
    config = get_config({"trainer": {"type": "sft"}, "model": section, "data": data})
    trainer = SFTTrainer(config, run_dir=None, progress=False, checkpoint=None)
    trainer.tokenizer = trainer.factory("tokenizer")()
    factory = trainer.factory("data")
    clocks = time.process_time(), time.perf_counter()
    loader, _ = factory()
    next(iter(loader))
    cpu, wall = time.process_time() - clocks[0], time.perf_counter() - clocks[1]
    store = loader.dataset.samples
    return {
        "seconds": cpu,
        "wall": wall,
        "samples": len(store),
        "tokens": loader.dataset.packs.tokens,
        "fill": loader.dataset.packs.fill,
    }


# In the benchmark's own


class Room:
    """The contestants' processes.

    Args:
        stack: ends them.
        missing: packages that are not installed; whoever needs one is left out.
    """

    def __init__(self, stack: ExitStack, missing: set[str]) -> None:
        from lm_contestants import CONTESTANTS

        self._stack, self._workers = stack, dict[str, Worker]()
        self._there = {name for name, (_, needs) in CONTESTANTS.items() if needs not in missing}
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def among(self, names: tuple[str, ...]) -> dict[str, Worker]:
        for name in names:
            if name in self._there and name not in self._workers:
                worker = self._stack.enter_context(Worker([__file__, "--serve"]))
                self._workers[name] = worker
        return {name: self._workers[name] for name in names if name in self._workers}

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.npz")


def distances(room: Room, task: str, names: Any) -> dict[str, dict[str, float]]:
    """How far each contestant's run is from the first's, as parts of the largest.

    Raises:
        SystemExit: they differ, so what is compared would be different trainings.
    """
    import numpy as np

    found: dict[str, dict[str, float]] = {}
    base = np.load(room.file(next(iter(names))))
    for name in names:
        run = np.load(room.file(name))
        found[name] = {
            kind: float(abs(run[kind] - base[kind]).max() / abs(base[kind]).max())
            for kind in ("losses", "gradients", "weights")
        }
    wrong = {name: d for name, d in found.items() if not max(d.values()) <= ALLOWED}
    if wrong:
        sys.exit(f"{task}: these differ from {next(iter(names))!r}: {wrong}")
    print(f"{task}: {len(found)} end with equal weights", flush=True)
    return found


def equality(room: Room, rounds: int) -> dict[str, Any]:
    del rounds
    found = {}
    for task, names in EQUAL.items():
        workers = room.among(names)
        for name, worker in workers.items():
            worker.ask(
                job="train",
                contestant=name,
                task=task,
                steps=STEPS,
                file=room.file(name),
                turns=False,
            )
        found[task] = distances(room, task, workers)
    return found


def timed(room: Room, task: str, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds that a window over all samples takes, one for each round, and how equal they are."""
    workers = room.among(names)
    times: dict[str, Any] = {name: {"cpu": [], "wall": []} for name in workers}
    for name, worker in workers.items():  # the first window warms up
        worker.ask(
            job="train",
            contestant=name,
            task=task,
            steps=rounds + 1,
            file=room.file(name),
            turns=True,
        )
    for i in range(rounds):
        order = list(workers)[i % len(workers) :] + list(workers)[: i % len(workers)]
        for name in order:
            for clock, seconds in workers[name].ask().items():
                times[name][clock].append(seconds)
    for worker in workers.values():
        worker.ask()
    return {"seconds": times, "apart": distances(room, task, workers), **about(task)}


def about(task: str) -> dict[str, float]:
    from lm_contestants import CAPACITY, drawn_log_normal, real_share, task_of

    todo = task_of(task)
    found = {"tokens": sum(todo.lengths), "real": real_share(todo.array)}
    if task.startswith("log-normal"):
        found["real, 160,000 samples"] = real_share(drawn_log_normal(sigma_of(task), 160_000))
        found["packs"] = len(todo.packs)
        found["fill"] = todo.packs.fill
        assert todo.packs.capacity == CAPACITY
    return found


def sigma_of(task: str) -> float:
    return float(task.split()[-1])


def speed(room: Room, rounds: int) -> dict[str, Any]:
    equal = timed(room, "equal lengths", (PADDED, PACKED, TRL_PADDED, TRL_PACKED), rounds)
    names = (PADDED, PACKED, TRL_PADDED, TRL_PACKED, TRL_FLAT)
    return {"equal lengths": equal, "log-normal 1.0": timed(room, "log-normal 1.0", names, rounds)}


def spread(room: Room, rounds: int) -> dict[str, Any]:
    tasks = ("log-normal 0.8", "log-normal 1.2")
    return {task: timed(room, task, (PADDED, PACKED), max(1, rounds // 2)) for task in tasks}


def data(room: Room, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"plan": [], "open": []}
    with Worker([__file__, "--serve"]) as worker:
        found["fill"] = worker.ask(job="fill", folder=str(room.folder))
        found["plan"] = [worker.ask(job="plan") for _ in range(rounds)]
    for _ in range(rounds):  # each in a process of its own
        with Worker([__file__, "--serve"]) as worker:
            found["open"].append(worker.ask(job="open", folder=str(room.folder)))
    return found


PARTS = {"equality": equality, "speed": speed, "spread": spread, "data": data}


# The tables


def tables(found: dict[str, Any]) -> str:
    text = ["## Language models"]
    if "equality" in found:
        text.append(
            "### Equal numbers\n\nLargest differences from a hand-written loop over each document "
            f"alone, as parts of the largest value, after {STEPS} steps of SGD. Dialogues are "
            "tokenized by each trainer itself, with the answers trained; texts lie in packs."
        )
        rows = [
            [task, name, *(f"{d[kind]:.0e}" for kind in ("losses", "gradients", "weights"))]
            for task, by_name in found["equality"].items()
            for name, d in by_name.items()
            if name != BASE
        ]
        text.append(common.table(["", "", "losses", "gradients", "weights"], rows))
    for task, one in found.get("speed", {}).items():
        text.append(f"### {task[0].upper()}{task[1:]}\n\n{described(one)}")
        base = PACKED if "packs" in one else PADDED
        head = ["", "tokens/s", f"{base}: times as fast"]
        text.append(common.table(head, speeds(one, base)))
    if "spread" in found:
        text.append("### How much packing gains\n\nTokens/s of Paceline, packed, to padded.")
        every = {**found.get("speed", {}), **found["spread"]}
        rows = [
            [
                task.split()[-1],
                f"{one['real']:.0%}",
                f"{one['real, 160,000 samples']:.0%}",
                f"{one['fill']:.1%}",
                ratio(one, PADDED, PACKED),
            ]
            for task, one in sorted(every.items())
            if task.startswith("log-normal")
        ]
        head = ["sigma", "real", "real, of 160,000", "packs filled", "times"]
        text.append(common.table(head, rows))
    if "data" in found:
        one = found["data"]
        text.append("### Data\n\nCPU time.")
        plans = [each["seconds"] for each in one["plan"]]
        opens = [each["seconds"] for each in one["open"]]
        first, of = one["fill"], one["open"][0]
        fill = one["plan"][0]["fill"]
        rows = [
            [f"{MILLION:,} lengths packed", common.spread(plans, 2), f"{fill:.2%} full"],
            [
                f"{of['samples']:,} samples from the cache, to the first batch",
                common.spread(opens, 2),
                f"{of['tokens']:,} tokens in packs",
            ],
            ["the same, tokenized and kept", f"{first['seconds']:.0f}", ""],
        ]
        text.append(common.table(["", "s", ""], rows))
    return "\n\n".join(text)


def described(one: dict[str, Any]) -> str:
    said = f"{one['tokens']:,} tokens a window; {one['real']:.0%} of padded rows is real"
    if "packs" in one:
        said += f" ({one['real, 160,000 samples']:.0%} for very many samples), packs are "
        said += f"{one['fill']:.1%} full"
    worst = max(d["gradients"] for d in one["apart"].values())
    return f"{said}. Gradients differ by at most {worst:.0e} of the largest."


def speeds(one: dict[str, Any], base: str) -> list[list[str]]:
    return [
        [
            name,
            common.spread([one["tokens"] / seconds for seconds in times["cpu"]]),
            "" if name == base else ratio(one, name, base),
        ]
        for name, times in one["seconds"].items()
    ]


def ratio(one: dict[str, Any], slow: str, fast: str) -> str:
    """How many times as fast the second is as the first, from pairs of one round."""
    slower, faster = (one["seconds"][name]["cpu"] for name in (slow, fast))
    return f"{statistics.median(a / b for a, b in zip(slower, faster, strict=True)):.2f}"


def main() -> None:
    parser = common.arguments(__doc__, rounds=6)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    os.environ.update(common.ENVIRONMENT)
    at = common.machine()
    missing = common.report_missing(["trl", "transformers"])
    if "transformers" in missing:
        sys.exit("nothing can be measured without transformers")
    with ExitStack() as stack:
        room = Room(stack, missing)
        new = {
            name: {"at": at, "found": PARTS[name](room, options.rounds)} for name in options.parts
        }
    path = common.RESULTS / "lm.json"
    parts = {**(json.loads(path.read_text())["parts"] if path.exists() else {}), **new}
    text = tables({name: parts[name]["found"] for name in PARTS if name in parts})
    common.save("lm", text, {"parts": parts}, at)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        common.serve(answer)
    else:
        main()
