"""What a run has come to, read from its folder: all that must not depend on its stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.checkpoint import load_tree, read_manifest
from paceline.testing import bits

COMPARED = (
    "models",
    "optimizers",
    "schedulers",
    "callbacks",
    "monitor",
    "progress",
    "data",
    "identity",
    "horizon",
)


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the visible checkpoints, in rising order."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(read_manifest(path).step for path in folders)


def ending(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint's state, bit by bit, and the bytes of the rows."""
    tree = load_tree(run_dir / "checkpoints" / f"step_{saved_steps(run_dir)[-1]:08d}")
    state = {name: bits(tree[name]) for name in COMPARED}
    return {**state, "rows": (run_dir / "metrics.jsonl").read_bytes()}
