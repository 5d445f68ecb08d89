"""What sinks learn of a run, what they keep over its resumes, and which of them there are."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paceline import Callback, CheckpointPolicy, Trainer
from paceline.errors import MetricError
from paceline.log.sinks import JsonlSink, RunInfo, Sink, with_local_rows
from paceline.testing import Ranks, StopAt, rows
from small import fitted, settings, step_rows

EACH_STEP = CheckpointPolicy(every_steps=1, asynchronous=False)


class Tracker(Sink):
    """Writes to what stands in for a server, which knows runs by their ids."""

    def __init__(self, server: Path, name: str = "") -> None:
        self.server = server
        self.name = name
        self.rows = 0

    def open(self, run: RunInfo) -> None:
        self.run = run
        self.page = self.server / f"{run.id}{self.name}.jsonl"
        self.server.mkdir(exist_ok=True)
        if not run.resumed:
            self.page.write_text("")

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        with open(self.page, "a") as file:
            file.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = state["rows"]
        kept = self.page.read_text().splitlines(keepends=True)[: self.rows]
        self.page.write_text("".join(kept))

    def close(self, status: str) -> None:
        self.status = status


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *callbacks: Callback) -> Tracker:
    tracker = Tracker(folder / "server")
    fitted(
        run_dir=folder / "run",
        loggers=[tracker],
        log_every=1,
        checkpoint=EACH_STEP,
        callbacks=callbacks,
    )
    return tracker


def killed(folder: Path) -> None:
    train(folder, KillAt(4))


def test_a_tracker_goes_on_with_its_run_after_a_kill(ranks: Ranks, tmp_path: Path) -> None:
    """Given a run that was killed, when it is started again, then the tracker's page of this id
    holds each row once; started afresh, the run has another id."""
    [outcome] = ranks.outcomes(killed, 1, tmp_path)
    assert outcome.code == -signal.SIGKILL
    [page] = (tmp_path / "server").iterdir()
    begun = json.loads((tmp_path / "run/run.json").read_text())["id"]
    assert page.stem == begun
    tracker = train(tmp_path)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (tracker.run.id, tracker.run.resumed, tracker.status) == (begun, True, "complete")
    assert (record["id"], record["starts"][0]["id"]) == (begun, begun)
    assert [json.loads(line) for line in page.read_text().splitlines()] == rows(tmp_path / "run")

    (tmp_path / "run").rename(tmp_path / "old")
    assert train(tmp_path).run.id != begun


def test_the_checkpoint_knows_the_id_if_run_json_is_lost(tmp_path: Path) -> None:
    first = train(tmp_path, StopAt(3))
    (tmp_path / "run" / "run.json").unlink()
    assert train(tmp_path).run.id == first.run.id


def test_it_learns_the_folder_and_the_identity(tmp_path: Path) -> None:
    run = train(tmp_path).run
    assert (run.folder, run.recipe, run.resumed) == (tmp_path / "run", None, False)
    assert (run.identity["optimizer.lr"], run.identity["seed"]) == (0.05, 1)


def test_state_follows_the_name_and_not_the_place(tmp_path: Path, capsys: Any) -> None:
    """Two of a class and one with a name of its own come back in another order, after a new one."""
    server = tmp_path / "server"

    def run(*sinks: Sink, stop: int) -> None:
        fitted(
            run_dir=tmp_path / "run",
            loggers=list(sinks),
            log_every=1,
            callbacks=[StopAt(stop)],
        )

    run(Tracker(server), Tracker(server), Tracker(server, "mine"), stop=3)
    second, mine, other, new = (
        Tracker(server),
        Tracker(server, "mine"),
        Tracker(server),
        Tracker(server, "new"),
    )
    run(new, mine, second, JsonlSink(), other, stop=6)
    assert [sink.rows for sink in (new, mine, second, other)] == [4, 7, 7, 7]
    assert [row["step"] for row in step_rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "the logger 'new' is new in this run" in capsys.readouterr().err
    run(mine, stop=8)
    told = capsys.readouterr().err
    assert "the logger 'Tracker_2' of the checkpoint is no longer there" in told


def test_loggers_add_to_the_local_rows(tmp_path: Path) -> None:
    def kinds(loggers: Any, run_dir: Path | None = tmp_path) -> list[str]:
        return [type(sink).__name__ for sink in with_local_rows(loggers, run_dir)]

    tracker = Tracker(tmp_path)
    assert kinds(None) == ["JsonlSink"]
    assert kinds([tracker]) == ["JsonlSink", "Tracker"]
    assert kinds([tracker, JsonlSink()]) == ["Tracker", "JsonlSink"]
    assert kinds([]) == kinds(()) == []
    assert kinds(None, None) == ["RowsInMemory"]
    assert kinds([tracker], None) == ["RowsInMemory", "Tracker"]


@pytest.mark.parametrize("loggers", [None, [Sink()], [JsonlSink()]])
def test_rows_are_written_once(loggers: Any, tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, loggers=loggers, log_every=1)
    assert len(step_rows(tmp_path)) == 10


def test_an_empty_list_turns_all_rows_off(tmp_path: Path) -> None:
    trainer = fitted(run_dir=tmp_path, loggers=[], log_every=1)
    assert not list(tmp_path.glob("*.jsonl"))
    assert not trainer.recorder.wanted


class Scoring(Trainer):
    """Measures something once it has trained."""

    late = False

    def on_train_end(self) -> None:
        self.log("final/score", 42.0)

    def on_teardown(self) -> None:
        if self.late:
            self.log("too/late", 1.0)


def test_what_is_logged_as_training_ends_is_in_the_last_row(tmp_path: Path) -> None:
    """Also once the complete run was started again; what comes later than that is an error."""
    for _ in range(2):
        fitted(Scoring, run_dir=tmp_path, log_every=50)
        last = step_rows(tmp_path)[-1]
        assert (last["step"], last["final/score"]) == (10, 42.0)
        assert [row["step"] for row in step_rows(tmp_path)] == [10, 10]
    trainer = Scoring(**settings())
    trainer.late = True
    with pytest.raises(MetricError, match=r"'too/late'.*last row is written"):
        trainer.fit()
