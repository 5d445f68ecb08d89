"""What trackers cost a training step: CPU of the training process, over the run folder's own rows.

    python -m benchmarks.trackers [--out results/trackers.json]

Both sides in turn, in one process: writing rows with `JsonlSink` alone, and with all trackers that
follow beside it. A pair of slopes is (CPU of 4000 rows - CPU of 1000 rows) / 3000; the CPU is that
of this process (`time.process_time`), in which the followers are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from paceline.log.sinks import JsonlSink, RunInfo
from paceline.trackers import MLflow, SwanLab, Trackio, Wandb, tracker

FEW, MANY, PAIRS = 1000, 4000, 15


def cpu(sinks: list[Any], rows: int) -> float:
    """Seconds of CPU for rows of four numbers, as the loop's recorder hands them over."""
    before = time.process_time()
    for step in range(rows):
        row = {"step": step, "epoch": 0, "samples": step, "items": step}
        row |= {"train/loss": 1 / (step + 1), "train/acc": 0.5, "lr": 0.1, "grad_norm": 2.0}
        timing = {"step": step, "seconds": 0.01}
        for sink in sinks:
            sink.write(row)
            sink.write_timing(timing)
    return time.process_time() - before


def slope(folder: Path, *, tracked: bool) -> float:
    """Microseconds of CPU a row."""
    sinks = [JsonlSink(), *((Wandb(), MLflow(), SwanLab(), Trackio()) if tracked else ())]
    for sink in sinks:
        sink.open(RunInfo(folder, folder.name))
    few, many = cpu(sinks, FEW), cpu(sinks, MANY)
    for sink in sinks:
        sink.close("complete")
    return (many - few) / (MANY - FEW) * 1e6


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    tracker.WAIT = 60.0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
        os.environ |= {"TRACKIO_DIR": f"{home}/trackio"}
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}
        pairs = []
        for number in range(options.pairs):
            order = (False, True) if number % 2 else (True, False)
            found = {
                tracked: slope(home / f"run{number}{tracked}", tracked=tracked) for tracked in order
            }
            pairs.append((found[False], found[True]))
    differences = [tracked - alone for alone, tracked in pairs]
    result = {
        "pairs": [[round(value, 3) for value in pair] for pair in pairs],
        "alone_us": round(statistics.median(alone for alone, _ in pairs), 3),
        "tracked_us": round(statistics.median(tracked for _, tracked in pairs), 3),
        "difference_us": round(statistics.median(differences), 3),
        "trackers": ["wandb", "mlflow", "swanlab", "trackio"],
        "cpus": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }
    print("| a row | CPU of the training process, us |\n|---|---|")
    print(f"| the run folder's files | {result['alone_us']} |")
    print(f"| and four trackers | {result['tracked_us']} |")
    print(f"| median of paired differences | {result['difference_us']} |")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
