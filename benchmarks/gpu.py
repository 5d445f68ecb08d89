"""A GPT of 100M to 1B parameters on one GPU, in bf16 and compiled, beside a hand-written loop.

The two loops take turns, some steps each, on the same batches; both must end with equal weights.
Then a profiler looks for what waits for the device in a step. On a CPU (`--device cpu`, with a
small model) it shows that it works, and saves nothing.

    python benchmarks/gpu.py [--rounds 20] [--layers 24 --width 1024 --tokens 1024 --batch 16]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import common
import torch
from tasks import GPT
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paceline import Trainer

STEPS = 10  # that a loop takes before the other's turn
WARM_UP = 2  # turns
# Dense bf16, 1e12 operations a second, as the vendors' data sheets give them.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")


class Text(Dataset):
    """Random bytes, another row at each index."""

    def __init__(self, rows: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, 256, (rows, tokens + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[index, :-1], self.rows[index, 1:]


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hand_written(model: Any, optimizer: Any, loader: DataLoader, device: str) -> Iterator[None]:
    """What one would write."""
    model.to(device)
    model.compile()
    for inputs, targets in loader:
        inputs = inputs.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            loss = token_loss(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def ours(model: Any, optimizer: Any, loader: DataLoader, device: str) -> Iterator[None]:
    """The same with Paceline, on the accelerator that it finds."""
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loss_fn=token_loss,
        train_dataloader=loader,
        epochs=1,
        precision="bf16",
        compile=True,
        max_grad_norm=1.0,
        loggers=[],
        progress=False,
        checkpoint=None,
    )
    for window in trainer.windows():
        trainer.step(window)
        yield


LOOPS: dict[str, Callable[..., Iterator[None]]] = {"hand-written": hand_written, "Paceline": ours}


def turn(loop: Iterator[None], device: str) -> float:
    """Seconds for some steps, with all that they have set going on the device."""
    _wait(device)
    start = time.perf_counter()
    for _ in islice(loop, STEPS):
        pass
    _wait(device)
    return time.perf_counter() - start


def waits(loop: Iterator[None], device: str) -> dict[str, float]:
    """What makes the host wait for the device, by name, in calls a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in islice(loop, STEPS):
            pass
    found = Counter[str]()
    for event in profile.events() or ():
        if event.name in WAITS or "DtoH" in event.name:
            found[event.name] += 1
    return {name: count / STEPS for name, count in found.items()}


def operations(model: nn.Module, tokens: int, layers: int, width: int) -> float:
    """Floating-point operations a token: 6 a parameter, and attention's two products.

    As in the PaLM paper, appendix B (https://arxiv.org/abs/2204.02311).
    """
    return 6 * sum(p.numel() for p in model.parameters()) + 12 * layers * width * tokens


def main() -> None:
    parser = common.arguments(__doc__, rounds=20)
    parser.add_argument("--device", default="cuda")
    for name, value in (("layers", 24), ("width", 1024), ("tokens", 1024), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --layers 2 --width 64 --tokens 64 tries it without")
    at = common.machine()
    turns = WARM_UP + options.rounds
    data = Text(options.batch * STEPS * (turns + 1), options.tokens)
    loader = DataLoader(data, options.batch, pin_memory=device == "cuda")
    models, loops = {}, {}
    for who, loop in LOOPS.items():
        torch.manual_seed(0)
        models[who] = model = GPT(options.layers, options.width, options.tokens)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        loops[who] = loop(model, optimizer, loader, device)
    took: dict[str, list[float]] = {who: [] for who in LOOPS}
    for i in range(turns):
        for who in list(LOOPS)[:: 1 if i % 2 else -1]:
            took[who].append(turn(loops[who], device) / STEPS)
    seconds = {who: each[WARM_UP:] for who, each in took.items()}
    found = {who: waits(loop, device) for who, loop in loops.items()}
    for loop in loops.values():
        next(loop, None)  # there is no more; the run ends
    one, other = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in models.values())
    apart = float((one - other).abs().max())
    if apart > 1e-3:
        sys.exit(f"the loops end with weights {apart} apart")
    _report(options, at, models["Paceline"], seconds, found, apart)


def _report(
    options: Any, at: dict[str, Any], model: nn.Module, seconds: Any, found: Any, apart: float
) -> None:
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    peak = next((p * 1e12 for key, p in PEAKS.items() if key in name), None)
    per_token = operations(model, options.tokens, options.layers, options.width)
    hand, own = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(hand, own, strict=True))
    rows = []
    for who, each in seconds.items():
        rates = [options.batch * options.tokens / one for one in each]
        share = f"{statistics.median(rates) * per_token / peak:.1%}" if peak else ""
        waited = ", ".join(f"{key} {n:g}" for key, n in found[who].items()) or "none"
        part = f"{ratio:.3f}" if who == "Paceline" else ""
        rows.append([who, common.spread(rates), share, part, waited])
    count = sum(p.numel() for p in model.parameters())
    text = (
        f"## A GPT of {count / 1e6:.0f}M parameters on one {name}\n\n"
        f"bf16, compiled, {options.batch} x {options.tokens} tokens a step; all end with equal "
        f"weights, to {apart:.1e}.\n\n"
    )
    text += common.table(["", "tokens/s", "MFU", "ratio", "waits for the device, a step"], rows)
    if options.device == "cuda":
        data = {"device": name, "seconds": seconds, "waits": found, "apart": apart}
        common.save("gpu", text, data | {"options": vars(options)}, at)
    else:
        print(text)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
