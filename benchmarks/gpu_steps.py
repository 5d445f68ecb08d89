"""A training step on an accelerator beside a loop written by hand.

Eagerly, with the three small tasks of `tasks.py`; and compiled, in bf16, with a GPT of 150M to 1B
parameters. The loops of a task take turns, some steps each, on the same batches, and must all end
with equal weights. `--device cpu` shows that it works, with small models, and saves nothing.

    python benchmarks/gpu_steps.py [--rounds 15] [--tasks tiny cnn gpt large]
        [--layers 12 --width 1024 --tokens 1024 --batch 16]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import common
import torch
from tasks import GPT, LEARNING_RATE, TASKS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer

WARM_UP = 2  # turns
STEPS = {"tiny": 200, "cnn": 50, "gpt": 20}  # of a turn
HEAD = 64  # the width of a head of attention
# Dense bf16, 1e12 operations a second, as the vendors' data sheets give them.
PEAKS = {"H200": 989, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}


@dataclass(frozen=True)
class Contest:
    """What is trained, and how.

    Args:
        model: makes the model, with the same weights each time.
        loss_fn: mean loss of `(outputs, targets)`.
        loader: makes a DataLoader over so many batches, the same each time.
        optimizer: of the parameters.
        steps: that a loop takes before the next one's turn.
        compiled: whether it is compiled, in bf16, with clipped gradients; else eager in fp32.
        apart: how far the loops' weights may be from each other at the end, in parts of the way
            that they have come. Some of a device's sums have no fixed order, and AdamW makes
            whole steps of gradients that are nearly zero.
        tokens: of a step, if it has tokens.
        operations: floating-point operations of a token, if anybody knows.
    """

    model: Callable[[], nn.Module]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loader: Callable[[int], DataLoader]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    steps: int
    compiled: bool = False
    apart: float = 1e-2
    tokens: int = 0
    operations: float = 0.0


def eager(name: str, steps: int) -> Contest:
    """One of the small tasks, whose steps are the host's work above all."""
    task = TASKS[name]
    return Contest(
        model=lambda: task.make()[0],
        loss_fn=task.loss_fn,
        loader=lambda batches: task.loader(batches, shuffle=False),
        # One that is not fused has to be asked by the host whether a step counts.
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=True),
        steps=steps,
    )


def large(layers: int, width: int, tokens: int, batch: int, steps: int) -> Contest:
    """A GPT whose steps are the device's work."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return GPT(layers, width, tokens, heads=max(1, width // HEAD))

    def loader(batches: int) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(0, 256, (batches * batch, tokens + 1), generator=generator)
        pins = torch.accelerator.is_available()
        return DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch, pin_memory=pins)

    # 6 a parameter, and attention's two products, as in the PaLM paper, appendix B
    # (https://arxiv.org/abs/2204.02311).
    parameters = sum(p.numel() for p in model().parameters())
    return Contest(
        model=model,
        loss_fn=TASKS["gpt"].loss_fn,
        loader=loader,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, fused=True),
        steps=steps,
        compiled=True,
        apart=0.1,
        tokens=batch * tokens,
        operations=6 * parameters + 12 * layers * width * tokens,
    )


def stepping(contest: Contest, model: Any, device: torch.device) -> Callable[[Any, Any], None]:
    """A step written by hand, given inputs and targets in host memory."""
    optimizer = contest.optimizer(model.parameters())
    model.to(device)
    if contest.compiled:
        model.compile()

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        inputs = inputs.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16) if contest.compiled else nullcontext():
            loss = contest.loss_fn(model(inputs), targets)
        loss.backward()
        if contest.compiled:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hand_written(
    contest: Contest, model: nn.Module, loader: DataLoader, device: torch.device
) -> Iterator[None]:
    """What everybody writes first."""
    step = stepping(contest, model, device)
    for inputs, targets in loader:
        step(inputs, targets)
        yield


def indexed(
    contest: Contest, model: nn.Module, loader: Any, device: torch.device
) -> Iterator[None]:
    """Without a DataLoader: batches cut out of the tensors."""
    step = stepping(contest, model, device)
    inputs, targets = loader.dataset.tensors
    for index in torch.arange(len(inputs)).split(loader.batch_size):
        step(inputs[index], targets[index])
        yield


def ours(
    contest: Contest, model: nn.Module, loader: DataLoader, device: torch.device
) -> Iterator[None]:
    """Paceline with everything optional off, on the accelerator that it finds."""
    trainer = Trainer(
        model=model,
        optimizer=contest.optimizer(model.parameters()),
        loss_fn=contest.loss_fn,
        train_dataloader=loader,
        epochs=1,
        precision="bf16" if contest.compiled else "fp32",
        compile=contest.compiled,
        max_grad_norm=1.0 if contest.compiled else None,
        loggers=[],
        progress=False,
        checkpoint=None,
    )
    for window in trainer.windows():
        trainer.step(window)
        yield


LOOPS = {"hand-written": hand_written, "hand-written, indexed": indexed, "Paceline": ours}


def turn(loop: Iterator[None], steps: int, device: torch.device) -> float:
    """Seconds of a step, with all that it has set going on the device."""
    wait_for(device)
    start = time.perf_counter()
    for _ in islice(loop, steps):
        pass
    wait_for(device)
    return (time.perf_counter() - start) / steps


def run(contest: Contest, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of each loop, one value a round, and how far from each other they end."""
    turns = WARM_UP + rounds
    start = weights(contest.model())
    # Where the device is what takes the time, one loop by hand is enough, and compiled once.
    names = [who for who in LOOPS if not (contest.compiled and who == "hand-written, indexed")]
    models = {who: contest.model() for who in names}
    loops = {
        who: LOOPS[who](contest, models[who], contest.loader(contest.steps * turns), device)
        for who in names
    }
    took: dict[str, list[float]] = {who: [] for who in names}
    for i in range(turns):
        for who in names[:: 1 if i % 2 else -1]:
            took[who].append(turn(loops[who], contest.steps, device))
    for loop in loops.values():
        next(loop, None)  # there is no more; the run ends
    base = weights(models["hand-written"])
    apart = {
        who: float((weights(model) - base).norm() / (base - start).norm())
        for who, model in models.items()
    }
    seconds = {who: each[WARM_UP:] for who, each in took.items()}
    return {"seconds": seconds, "apart": apart, "parameters": start.numel()}


def are_equal(contest: Contest, found: dict[str, Any]) -> bool:
    """Whether all loops of a contest have ended with the same weights."""
    return all(far <= contest.apart for far in found["apart"].values())


def weights(model: nn.Module) -> torch.Tensor:
    """All of them, in one vector on the host."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu()


def describe(name: str, contest: Contest, found: dict[str, Any], device: str) -> str:
    """The table of one contest."""
    peak = next((p * 1e12 for key, p in PEAKS.items() if key in device), None)
    rows = []
    for who, seconds in found["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, found["seconds"]["hand-written"], strict=True)]
        row = [who, common.spread([s * 1e6 for s in seconds]), f"{statistics.median(ratios):.3f}"]
        if contest.tokens:
            rate = contest.tokens / statistics.median(seconds)
            row += [f"{rate:.0f}", f"{rate * contest.operations / peak:.1%}" if peak else ""]
        rows.append(row)
    head = ["", "us a step", "ratio", *(["tokens/s", "MFU"] if contest.tokens else [])]
    kind = "compiled, bf16" if contest.compiled else "eager, fp32"
    far = max(found["apart"].values())
    ends = "All end with the same weights" if are_equal(contest, found) else "THE WEIGHTS DIFFER"
    ends += ", bit by bit." if far == 0 else f", to {far:.0e} of the way that they have come."
    title = f"### {name}: {found['parameters'] / 1e6:.3g}M parameters, {kind}"
    return f"{title}\n\n{ends}\n\n{common.table(head, rows)}"


def main() -> None:
    parser = common.arguments(__doc__, rounds=15)
    parser.add_argument("--device", default=None, help="cpu: a trial without an accelerator")
    parser.add_argument("--tasks", nargs="+", default=[*STEPS, "large"])
    parser.add_argument("--steps", type=int, default=None, help="of a turn")
    for name, value in (("layers", 12), ("width", 1024), ("tokens", 1024), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = common.accelerator(options.device)
    at, called = common.machine(), common.device_name(device)
    data: dict[str, Any] = {"device": called, "options": vars(options), "tasks": {}}
    tables = [f"## A training step beside a hand-written loop: {', '.join(options.tasks)}"]
    tables.append(f"{called}; medians (quartiles) of {options.rounds} interleaved rounds.")
    differ = []
    for name in options.tasks:
        if name == "large":
            sizes = options.layers, options.width, options.tokens, options.batch
            contest = large(*sizes, steps=options.steps or 10)
        else:
            contest = eager(name, options.steps or STEPS[name])
        found = data["tasks"][name] = run(contest, options.rounds, device)
        tables.append(describe(name, contest, found, called))
        differ += [] if are_equal(contest, found) else [name]
        # As soon as there is one: whoever runs this may have no time for the next.
        text, trial = "\n\n".join(tables), device.type == "cpu"
        common.save("gpu_steps", text, data, at, trial=trial)
    if differ:
        sys.exit(f"the loops do not end with the same weights: {', '.join(differ)}")


def wait_for(device: torch.device) -> None:
    """Until all is done that was set going on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
