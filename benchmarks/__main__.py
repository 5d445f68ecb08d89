"""All benchmarks that need no accelerator, one after the other: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = (
    "overhead",
    "streams",
    "rl",
    "import_time",
    "dry_run",
    "memory",
    "memory_on_paper",
    "evaluation",
    "checkpoints",
    "scaling",
    "lm",
    "study",
)

if __name__ == "__main__":
    here = Path(__file__).parent
    codes = [subprocess.call([sys.executable, here / f"{name}.py"]) for name in NAMES]
    sys.exit(max(codes))
