"""How long `paceline train RECIPE --dry-run` takes beyond `import torch`.

Each in a new process, in CPU time, interleaved: torch alone, the command on a recipe without code
of its own, and with several mistakes in it, each of which has to be found and placed.

    python benchmarks/dry_run.py [--rounds 9]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import common

RECIPE = """\
trainer: {epochs: 3}
model: {_target_: torch.nn.Linear, in_features: 8, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-3}
lr_scheduler: {type: warmup_cosine, warmup: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: torch.utils.data.ConcatDataset, datasets: []}
  batch_size: 32
"""
TRAIN = ("-m", "paceline", "train", "recipe.yaml", "--dry-run")
COMMANDS = {
    "import torch": (("-c", "import torch"), 0),
    "dry run": (TRAIN, 0),
    "dry run, three mistakes": ((*TRAIN, "trainr.a=1", "optimizer.lrr=1", "model.bias=3"), 2),
}


def measure(folder: str, words: tuple[str, ...], code: int) -> float:
    """Milliseconds of CPU time of a process and its start.

    Raises:
        RuntimeError: it did not leave with `code`.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **common.ENVIRONMENT},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(done.stderr)
    return 1e3 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main() -> None:
    options = common.arguments(__doc__, rounds=9).parse_args()
    at = common.machine()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.yaml").write_text(RECIPE)
        for i in range(options.rounds + 1):
            for name, (words, code) in COMMANDS.items():
                value = measure(folder, words, code)
                if i > 0:  # the first writes byte code and warms the disk's cache
                    times[name].append(value)
    torch_times = times["import torch"]
    rows = [["import torch", common.spread(torch_times), ""]]
    for name in [name for name in COMMANDS if name != "import torch"]:
        more = [value - alone for value, alone in zip(times[name], torch_times, strict=True)]
        rows.append([name, common.spread(times[name]), common.spread(more)])
    head = ["", "CPU ms", "beyond torch"]
    text = "## `paceline train --dry-run`\n\n" + common.table(head, rows)
    common.save("dry_run", text, {"ms": times}, at)


if __name__ == "__main__":
    main()
