"""Makes the pictures of the documentation from real runs: `make pictures`, some minutes.

- `curve-light.svg`, `curve-dark.svg`: the loss of an uninterrupted run, and of one that was killed
  and resumed. Nothing is drawn unless both end with the same bytes of rows and state.
- `plan.svg`, `preflight.svg`: what these commands print on a terminal; `plan-narrow.svg`,
  `preflight-narrow.svg`: the same on one as narrow as a phone.

The runs are of `recipes/digits.yaml`, in a temporary folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
RECIPE = "recipes/digits.yaml"
COLUMNS = {"": 96, "-narrow": 48}  # of the terminals in the pictures
MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CURVE = ("trainer.epochs=6", "trainer.log_every=1")
KILL = 85  # the optimizer step after which the run is killed, in the middle of an epoch
LIMIT = 600.0  # seconds until a command that hangs is given up

# Of the text and the frame, the uninterrupted run, the killed one and the resumed one.
PALETTES = {
    "light": ("#333a45", "#c3c9d3", "#d1495b", "#2563eb"),
    "dark": ("#c9d1dc", "#4b5361", "#ff8f8f", "#7aa8ff"),
}


def main() -> None:
    mpl.use("svg")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(RECIPES, folder / "recipes")
        for picture, command in {
            "preflight": f"preflight {RECIPE}",
            "plan": f"train {RECIPE} trainer.epochs=2",
        }.items():
            lines = printed(folder, command).splitlines(keepends=True)
            # A terminal shows a bar in place of the lines that say where the run is.
            kept = "".join(line for line in lines if not line.startswith("epoch "))
            text = f"$ paceline {command}\n{kept}"
            for suffix, columns in COLUMNS.items():
                draw_terminal(picture + suffix, text, columns)
        undisturbed = train(folder, "undisturbed")
        at, lost, resumed = train_killed(folder, "killed")
        for palette in PALETTES:
            draw_curve(palette, undisturbed, lost, resumed, at)


def start(folder: Path, *words: str, **settings: Any) -> subprocess.Popen[str]:
    """Starts `paceline` in a folder, as on a terminal too wide for any line to be wrapped."""
    environment = {**os.environ, "COLUMNS": "1000", "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "paceline", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **settings)


def printed(folder: Path, command: str) -> str:
    """What a command prints until it has ended well."""
    process = start(folder, *command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text, _ = process.communicate(timeout=LIMIT)
    if process.returncode != 0:
        raise SystemExit(f"paceline {command} ended with {process.returncode}:\n{text}")
    return text


def draw_terminal(name: str, text: str, columns: int) -> None:
    """Writes a picture of a terminal that shows `text`. Its fonts are those of the reader."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text.rstrip()))
    own = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    own = re.sub(r"font-family: (Fira Code|arial)[^;]*", f"font-family: {MONOSPACE}", own)
    own = re.sub(r"<!-- .*? -->", "", own)  # the address of rich's makers
    svg = console.export_svg(title="", code_format=own, unique_id=name)
    (HERE / f"{name}.svg").write_text(re.sub(r"[ \t]+$", "", svg, flags=re.M))


def train(folder: Path, name: str) -> bytes:
    """Trains until the run is complete; returns its rows."""
    printed(folder, f"train {RECIPE} {' '.join(CURVE)} run.name={name}")
    return rows_file(folder, name).read_bytes()


def train_killed(folder: Path, name: str) -> tuple[int, bytes, bytes]:
    """Trains, kills the process, and starts the same command again.

    Returns:
        The step of the checkpoint from which the run resumed, the rows that the killed process had
        written, and those of the completed run.
    """
    process = start(folder, "train", RECIPE, *CURVE, f"run.name={name}", stdout=subprocess.DEVNULL)
    file, until = rows_file(folder, name), time.monotonic() + LIMIT
    while f'"step": {KILL},' not in (file.read_text() if file.exists() else ""):
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the run did not reach step {KILL}")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lost = file.read_bytes()
    checkpoint = latest(folder, name).name
    resumed = train(folder, name)
    same(folder, "undisturbed", name)
    return int(checkpoint.removeprefix("step_")), lost, resumed


def rows_file(folder: Path, name: str) -> Path:
    return folder / "runs" / "digits" / name / "metrics.jsonl"


def latest(folder: Path, name: str) -> Path:
    """The newest checkpoint of a run."""
    checkpoints = rows_file(folder, name).with_name("checkpoints")
    return checkpoints / (checkpoints / "latest").read_text().strip()


def same(folder: Path, first: str, second: str) -> None:
    """Raises unless the rows and the final state of two runs are the same bytes."""
    for kind, files in {
        "rows": lambda name: [rows_file(folder, name)],
        "tensors": lambda name: sorted(latest(folder, name).glob("*.safetensors")),
    }.items():
        one, other = ([file.read_bytes() for file in files(name)] for name in (first, second))
        if not one or one != other:
            raise SystemExit(f"the {kind} of the resumed run differ")


def losses(rows: bytes) -> Mapping[int, float]:
    """The training loss of each optimizer step."""
    found = (json.loads(line) for line in rows.splitlines() if line.endswith(b"}"))
    return {row["step"]: row["train/loss"] for row in found if "train/loss" in row}


def draw_curve(palette: str, undisturbed: bytes, lost: bytes, resumed: bytes, at: int) -> None:
    """Draws the loss of both runs against the step.

    Args:
        palette: a key of `PALETTES`.
        undisturbed: rows of the uninterrupted run.
        lost: rows that the killed process had written.
        resumed: rows of the resumed run.
        at: step of the checkpoint from which it resumed.
    """
    ink, under, red, blue = PALETTES[palette]
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "paceline", "font.size": 10, "text.color": ink,
        "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.6, 3.5), layout="constrained")
        whole, killed, again = losses(undisturbed), losses(lost), losses(resumed)
        axes.plot([*whole], [*whole.values()], color=under, lw=7, label="uninterrupted")
        axes.plot([*killed], [*killed.values()], color=red, lw=1.8, label="killed")
        rest = {step: loss for step, loss in again.items() if step > at}
        axes.plot([*rest], [*rest.values()], color=blue, lw=1.8, ls=(0, (3, 1)), label="resumed")
        last, top = max(killed), max(whole.values())
        for step, color, words, side, gap in (
            (last, red, f"kill -9 after step {last}", "left", 5),
            (at, blue, f"resumes from step {at}", "right", -5),
        ):
            axes.axvline(step, color=color, lw=1, ls=":")
            beside = {"xytext": (gap, 0), "textcoords": "offset points", "va": "top"}
            axes.annotate(words, (step, top), color=color, ha=side, **beside)
        axes.set(xlabel="optimizer step", ylabel="training loss", xlim=(0, max(whole)))
        axes.legend(loc="lower left")
        figure.savefig(
            HERE / f"curve-{palette}.svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
        plt.close(figure)


if __name__ == "__main__":
    main()
