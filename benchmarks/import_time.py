"""How long an import takes beyond `import torch`.

Each in a new process that has imported torch, in CPU time, interleaved.

    python benchmarks/import_time.py [--rounds 9]
"""

from __future__ import annotations

import os
import subprocess
import sys

import common

IMPORTS = {
    "paceline: Trainer": ("paceline", "from paceline import Trainer"),
    "ignite: Engine": ("ignite", "from ignite.engine import Engine"),
    "accelerate: Accelerator": ("accelerate", "from accelerate import Accelerator"),
    "lightning: Trainer": ("lightning", "from lightning import Trainer"),
    "transformers: Trainer": ("transformers", "from transformers import Trainer"),
}
PROGRAM = """
import time
before = time.process_time()
import torch
torch_ready = time.process_time()
{statement}
print(torch_ready - before, time.process_time() - torch_ready)
"""


def measure(statement: str) -> tuple[float, float]:
    """Milliseconds of CPU time for torch, and for what follows."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **common.ENVIRONMENT},
    )
    first, second = map(float, done.stdout.split()[-2:])
    return first * 1e3, second * 1e3


def main() -> None:
    options = common.arguments(__doc__, rounds=9).parse_args()
    at = common.machine()
    missing = common.report_missing(package for package, _ in IMPORTS.values())
    times: dict[str, list[float]] = {n: [] for n, (p, _) in IMPORTS.items() if p not in missing}
    torch_times: list[float] = []
    for i in range(options.rounds + 1):
        for name in times:
            torch_time, more = measure(IMPORTS[name][1])
            if i > 0:  # the first writes byte code and warms the disk's cache
                times[name].append(more)
                torch_times.append(torch_time)
    rows = [["import torch", common.spread(torch_times)]]
    rows += [[name, common.spread(values)] for name, values in times.items()]
    text = "## Import beyond `import torch`\n\n" + common.table(["", "CPU ms"], rows)
    common.save("import_time", text, {"ms": {"torch": torch_times, **times}}, at)


if __name__ == "__main__":
    main()
