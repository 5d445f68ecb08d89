"""P11 A run explains itself: what ran, where, how, and why it stopped, in its own folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
from builders import Noisy, Regression, loader, make_model
from paceline.log.run_record import RunRecord
from paceline.testing import StopAt


def train(run_dir: Path, *callbacks: Any, **settings: Any) -> Regression:
    model = make_model()
    trainer = Regression(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        val_dataloader=loader(Noisy(23), shuffle=False),
        callbacks=list(callbacks),
        progress=False,
        run_dir=run_dir,
        **{"epochs": 1, **settings},
    )
    trainer.train(seed=4)
    return trainer


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def test_a_complete_run_says_what_it_was(tmp_path: Path) -> None:
    trainer = train(tmp_path, metric_monitor=paceline.MetricMonitor("val/loss"))
    run = record(tmp_path)
    assert run["status"] == "complete"
    assert (run["step"], run["epoch"]) == (trainer.global_step, 1)
    assert (run["monitor"], run["best"]) == ("val/loss", trainer.result.best)
    assert run["stopped_by"] == "epochs"
    assert run["seed"] == 4
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["paceline"] == paceline.__version__
    assert run["hardware"]
    assert run["command"]
    assert run["metrics"]["val/loss"] == trainer.result.final_val_loss
    assert run["plan"] == trainer.plan.as_list()


def test_a_stopped_run_says_why_and_a_resumed_one_remembers(tmp_path: Path) -> None:
    train(tmp_path, StopAt(3))
    assert (record(tmp_path)["status"], record(tmp_path)["stopped_by"]) == ("stopped", "test")
    train(tmp_path)
    run = record(tmp_path)
    assert run["status"] == "complete"
    assert [start["stopped_by"] for start in run["starts"]] == ["test"]


def test_a_failed_run_says_what_failed(tmp_path: Path) -> None:
    class Failing(Regression):
        def on_step_end(self, metrics: dict[str, Any]) -> None:
            raise RuntimeError("out of coffee")

    model = make_model()
    trainer = Failing(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        epochs=1,
        progress=False,
        run_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="out of coffee"):
        trainer.train()
    assert record(tmp_path)["status"] == "failed"
    assert "out of coffee" in record(tmp_path)["stopped_by"]
    assert record(tmp_path)["step"] == 1


def test_no_secret_of_the_command_line_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a token among the arguments, when the run is recorded, then it is masked."""
    secret = "hf_abcdefgh12345678"
    words = ["script.py", f"logger.api_token={secret}", "--password", secret]
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    RunRecord(tmp_path).start(seed=0, plan=[])
    text = (tmp_path / "run.json").read_text()
    assert "api_token" in text
    assert secret not in text


def test_a_run_keeps_the_code_that_trained_it(tmp_path: Path) -> None:
    train(tmp_path, StopAt(3))
    written = Path(sys.modules[Regression.__module__].__file__ or "").read_text()
    assert (tmp_path / "code/builders.py").read_text() == written
