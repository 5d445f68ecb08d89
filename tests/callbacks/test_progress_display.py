"""Progress: plain lines, bars on a terminal, nothing else disturbed."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
import threading
import time
from types import FrameType, SimpleNamespace
from typing import Any

import nbclient
import nbformat
import pytest
import torch
from fake_trainer import FakeTrainer

from paceline import Trainer
from paceline.callbacks import Progress
from paceline.errors import ConfigError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    held = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: held.now)
    return held


def test_off_a_terminal_each_row_and_each_validation_is_one_line(clock) -> None:
    out = io.StringIO()
    trainer = FakeTrainer(Progress(file=out, line_seconds=0), log_every=2).start()
    for _ in range(2):
        clock.now += 2
        trainer.step(2)
    trainer.validate().end()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3, "the last row is not repeated at the end"
    assert re.fullmatch(r"epoch 1/2  step 2/8  loss [\d.]+  8 samples/s  0:06 left", lines[0])
    assert re.match(r"epoch 1/2  step 4/8  ", lines[1])
    assert lines[2] == "validation at step 4  val/loss 0.25"
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_fast_rows_are_not_a_flood_of_lines_and_the_last_is_always_shown(clock) -> None:
    out = io.StringIO()
    trainer = FakeTrainer(Progress(file=out, line_seconds=1.0), log_every=1).start()
    for _ in range(25):
        clock.now += 0.125
        trainer.step()
    trainer.end()
    steps = [int(step) for step in re.findall(r"step (\d+)/", out.getvalue())]
    assert steps == [1, 9, 17, 25]


def test_the_log_of_a_long_run_stays_short(clock) -> None:
    """Given a day with a row each 100 s and a validation each 200, the pauses between lines grow
    to 10 minutes, and the last row and the last validation are shown."""
    out = io.StringIO()
    trainer = FakeTrainer(Progress(file=out), log_every=1).start()
    trainer.training_horizon = 864
    for i in range(1, 865):
        clock.now += 100
        trainer.step()
        if i % 2 == 0:
            trainer.fire("on_metrics", {"val/loss": float(i)})
    trainer.end()
    lines = out.getvalue().splitlines()
    rows = [int(step) for step in re.findall(r"step (\d+)/", out.getvalue())]
    assert len(lines) < 320
    assert rows[:3] == [1, 2, 3]
    assert max(b - a for a, b in itertools.pairwise(rows)) == 6
    assert rows[-1] == 864
    assert any("val/loss 864" in line for line in lines[-3:])


@pytest.mark.parametrize(
    ("columns", "notes"),
    [
        (40, "loss 0.5"),
        (60, "loss 0.5  6:30:00 left"),
        (80, "loss 0.5  lr 0.001  8 samples/s  6:30:00 left"),
        (140, "loss 0.5  lr 0.001  accuracy 0.25  grad_norm 2  8 samples/s  6:30:00 left"),
    ],
)
def test_the_line_fits_the_terminal(clock, monkeypatch, columns: int, notes: str) -> None:
    """Loss, rate, speed and time left come before other values, and nothing is cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    trainer = FakeTrainer(Progress(file=out)).start()
    trainer.training_horizon, trainer.global_step = 23_401, 1
    clock.now += 1
    values = {"train/accuracy": 0.25, "grad_norm": 2.0, "lr": 0.001, "train/loss": 0.5}
    trainer.fire("on_step_end", {"step": 1, "samples": 8, **values})
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()
    assert drawn[-1].rstrip().endswith(f"1/23401  {notes}")
    assert "…" not in out.getvalue()
    assert all(len(line) <= columns for line in drawn)
    trainer.end()


def test_a_notebook_has_one_line_that_lives() -> None:
    """Given a cell that trains, its output is the plan, one display, and what the run says."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    (live,) = [one for one in outputs if one.output_type == "display_data"]
    assert re.fullmatch(
        r"epoch 2/2  step 8/8  loss [\d.]+  lr 0.01  [\d,]+ samples/s  0:00 left"
        r"  \|  validation at step 8  val/loss [\d.]+",
        live.data["text/plain"],
    )
    printed = "".join(one.text for one in outputs if one.output_type == "stream").splitlines()
    assert printed.pop().startswith("paceline: complete at step 8")
    assert all(line.startswith("plan: ") for line in printed)
    assert len(printed) < 10


CELL = """
import torch
from paceline import Trainer
model = torch.nn.Linear(3, 1)
batches = [(torch.rand(2, 3), torch.rand(2, 1))] * 4
Trainer(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
    loss_fn=torch.nn.MSELoss(), train_dataloader=batches, val_dataloader=batches, epochs=2,
).fit();
"""


def test_a_long_validation_is_seen_to_move(clock) -> None:
    out = io.StringIO()
    trainer = FakeTrainer(Progress(file=out)).start()
    trainer.while_validating = lambda: setattr(clock, "now", clock.now + 6)
    trainer.validate()
    assert out.getvalue().splitlines() == [
        "validation at step 0  batch 2/2",
        "validation at step 0  val/loss 0.25",
    ]


def test_on_a_terminal_bars_are_drawn_and_the_terminal_is_given_back(clock) -> None:
    out = Terminal()
    progress = Progress(file=out)
    trainer = FakeTrainer(progress).start()
    threads = threading.active_count()
    for _ in range(3):
        clock.now += 1
        trainer.step()
    assert threading.active_count() == threads, "no thread competes with the training"
    trainer.validate().end()
    shown = out.getvalue()
    assert "epoch 1/2" in shown
    assert "3/8" in shown
    assert "validation at step 3  val/loss 0.25" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l"), "the cursor is shown again"


def test_bars_are_not_drawn_more_often_than_asked(clock, monkeypatch) -> None:
    progress = Progress(file=Terminal(), refresh_seconds=0.2)
    trainer = FakeTrainer(progress, log_every=1).start()
    drawn: list[int] = []
    monkeypatch.setattr(
        progress._view, "training", lambda label, step, total, notes: drawn.append(step)
    )
    for _ in range(10):
        clock.now += 0.125
        trainer.step()
    assert drawn == [1, 3, 5, 7, 9]
    trainer.end()


def test_names_in_brackets_are_no_markup(clock) -> None:
    out = Terminal()
    trainer = FakeTrainer(Progress(file=out)).start()
    trainer.fire("on_step_end", {"step": 1, "samples": 8, "acc[bold]": 0.5})
    trainer.fire("on_metrics", {"acc[/red]": 0.5})
    trainer.end()
    assert "acc[bold] 0.5" in out.getvalue()
    assert "acc[/red] 0.5" in out.getvalue()


def test_a_name_that_the_stream_cannot_encode_does_not_end_the_run() -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    trainer = FakeTrainer(Progress(file=out, line_seconds=0)).start()
    trainer.fire("on_metrics", {"val/größe": math.nan})
    out.seek(0)
    assert out.read() == "validation at step 0  val/gr\\xf6\\xdfe nan\n"


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    FakeTrainer(Progress(file=out, line_seconds=0), is_main=False).start().step(4).validate().end()
    assert out.getvalue() == ""


def test_an_error_leaves_the_terminal_usable() -> None:
    out = Terminal()
    trainer = FakeTrainer(Progress(file=out)).start().step(2)
    trainer.fire("on_validation_start")
    trainer.fire("on_exception", ValueError())
    trainer.fire("on_teardown")
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")


def test_a_run_without_epochs_or_horizon_is_shown(clock) -> None:
    out = io.StringIO()
    trainer = FakeTrainer(Progress(file=out))
    trainer.epochs = trainer.training_horizon = None
    trainer.validation = {}
    trainer.start().step(2).validate()
    assert out.getvalue().startswith("epoch 1  step 2  loss")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_step_without_a_row_only_looks_at_the_clock(stream: type[io.StringIO]) -> None:
    progress = Progress(file=stream(), refresh_seconds=60)
    trainer = FakeTrainer(progress).start().step(2)
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else argument.__name__)

    sys.setprofile(note)
    for _ in range(100):
        progress.on_step_end(trainer, {})
    sys.setprofile(None)
    called.remove("setprofile")
    assert called.count("on_step_end") == 100
    assert len(called) <= 2 * 100  # itself, and a look at the clock
    trainer.end()


def test_rich_is_imported_only_for_a_terminal() -> None:
    code = "import sys, paceline.callbacks.progress; sys.exit('rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="negative"):
        Progress(refresh_seconds=-1)


def test_after_one_pass_it_is_the_first_epoch_and_the_loss_is_seen_before_any_row() -> None:
    """Given 4 steps that are one pass, without a row until then, the last drawing says so."""
    model = torch.nn.Linear(3, 1)
    out, batches = Terminal(), [(torch.ones(2, 3), torch.ones(2, 1))] * 4
    losses: list[float] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses.append((value := (outputs - targets).square().mean()).item())
        return value

    Trainer(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), loss_fn=loss,
        train_dataloader=batches, max_steps=4, log_every=50,
        callbacks=[Progress(file=out, refresh_seconds=0)], progress=False,
    ).fit()  # fmt: skip
    drawn = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out.getvalue())
    assert "epoch 1" in drawn
    assert "epoch 2" not in drawn
    assert f"loss {losses[0]:.4g}"[:9] in drawn
