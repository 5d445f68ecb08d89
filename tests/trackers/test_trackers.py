"""Trackers cost training nothing, and what they could not send comes later."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import ConfigError, MissingExtraError, PacelineError
from paceline.log import Histogram, Image
from paceline.log.sinks import JsonlSink, RunInfo, made
from paceline.trackers import Trackio, Wandb, follower, tracker
from paceline.trackers.cursor import Place, new_rows, place_after, read_cursor
from paceline.trackers.follower import Follower
from paceline.trackers.sync import sync
from paceline.trackers.tracker import Tracker

HERE = Path(__file__).parent


class Writing(Tracker):
    """A tracker of a user's own."""

    name = "writing"
    adapter = "fake_library:Writes"

    def __init__(self, *, down: str | None = None, project: str | None = None) -> None:
        super().__init__({"down": down, "project": project})


class Hanging(Writing):
    name = "hanging"
    adapter = "fake_library:Hangs"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def tracked(folder: Path, *trackers: Tracker, rows: range = range(1, 21), **info: Any) -> float:
    """Writes rows as a run would; returns the seconds that closing took."""
    sinks = [JsonlSink(), *trackers]
    for sink in sinks:
        sink.open(RunInfo(folder, "abc", **info))
    for step in rows:
        for sink in sinks:
            sink.write(row(step))
    sinks[0].write_media(3, "picture", Image([[0.5]]))
    sinks[0].write_media(3, "spread", Histogram([1.0, 2.0]))
    since = time.monotonic()
    for sink in sinks:
        sink.close("complete")
    return time.monotonic() - since


def row(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "samples": step, "items": step, "train/loss": 1 / step}


def sent(folder: Path, name: str = "writing") -> list[Any]:
    text = (folder / "trackers" / name / "sent.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def ended(folder: Path) -> None:
    """As a run's end leaves it."""
    record = {"id": "abc", "status": "complete"}
    (folder / "run.json").write_text(json.dumps(record))


def test_the_follower_gets_everything_and_the_process_keeps_all_that_is_its_own(
    tmp_path: Path,
) -> None:
    def own() -> Any:
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        return threading.enumerate(), handlers, dict(os.environ), sys.excepthook

    before = own()
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "model.safetensors").touch()
    sink = Writing()
    sink.open(RunInfo(tmp_path / "other", "x"))
    assert own() == before
    sink.close("stopped")
    tracked(tmp_path, Writing(), identity={"lr": 0.1, "server": {"api_key": "very secret"}})
    assert own() == before
    opened, *found, one, other, artifact, closed = sent(tmp_path)
    assert opened == {"open": "abc", "config": {"lr": 0.1, "server": {"api_key": "***"}}}
    assert found == [[number, number + 1] for number in range(20)]
    assert (one, other) == ({"media": [0, "image"]}, {"media": [1, "histogram"]})
    assert artifact == {"artifact": "model.safetensors"}
    assert closed == {"close": "complete", "telemetry off": "1"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"very secret" in path.read_bytes() for path in files)


def test_while_the_library_raises_one_warning_is_all_and_sync_sends_the_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "WAIT", 15.0)
    (down := tmp_path / "down").touch()
    run_dir = tmp_path / "run"
    tracked(run_dir, Writing(down=str(down)))
    [said] = [record.getMessage() for record in caplog.records]
    assert "tracker writing: ConnectionError: no route to host; api_key=***" in said
    assert f"`paceline sync {run_dir} --to writing`" in said
    assert "abcdefgh" not in (run_dir / "trackers/writing.json").read_text()
    ended(run_dir)
    with pytest.raises(PacelineError, match="no route to host"):
        sync(run_dir, "writing")
    down.unlink()
    assert sync(run_dir, "writing") == 20
    assert sync(run_dir, "writing") == 20
    with pytest.raises(ConfigError, match="project='other': send them there beside as --to wr"):
        sync(run_dir, "writing", {"project": "other"})
    assert sync(run_dir, "writing_2", {"project": "other"}) == 20
    assert [each for each in sent(run_dir) if isinstance(each, list)] == [
        [number, number + 1] for number in range(20)
    ]


def test_libraries_that_hang_are_waited_for_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "WAIT", 2.0)
    took = tracked(tmp_path, Hanging(), Hanging())
    try:
        assert 2.0 <= took < 3.9
        assert len(caplog.records) == 2
        assert "hanging_2: it has not taken all rows within 2 s" in caplog.text
    finally:
        end_all(tmp_path)


def end_all(folder: Path) -> None:
    deadline = time.monotonic() + 20
    files = [path.with_suffix(".json") for path in (folder / "trackers").iterdir() if path.is_dir()]
    for file in files:
        while (cursor := read_cursor(file)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert cursor is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(cursor.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(cursor.pid, 0)


def test_a_resumed_runs_follower_ends_the_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "WAIT", 0.5)
    monkeypatch.setattr(follower, "_PATIENCE", 0.3)
    monkeypatch.syspath_prepend(str(HERE))
    tracked(tmp_path, Hanging())
    file = tmp_path / "trackers/hanging.json"
    deadline = time.monotonic() + 20
    while (before := read_cursor(file)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert before is not None
    (tmp_path / "trackers/hanging.json").write_text(file.read_text())
    followed(tmp_path, "hanging")
    _, status = os.waitpid(before.pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len([each for each in sent(tmp_path, "hanging") if isinstance(each, list)]) == 20


def followed(folder: Path, name: str = "writing", run: str = "abc") -> None:
    """Follows in this process to the end."""
    from fake_library import Writes

    todo = {"type": "x", "settings": {}, "run": run, "run_name": "r", "config": {}}
    one = Follower(folder, name, todo, lambda _: Writes)
    one.home.mkdir(parents=True, exist_ok=True)
    one.take_over()

    class Over:
        ended = True

        def next(self, timeout: float) -> dict[str, Any]:
            return {"status": "complete"}

    assert one.follow(Over())  # type: ignore[arg-type]
    one._lock.release()


def write(folder: Path, *steps: int) -> None:
    lines = [json.dumps(row(step)) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))


def numbers(folder: Path) -> list[int]:
    return [each[1] for each in sent(folder) if isinstance(each, list)]


def test_rows_written_again_are_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill and a resume cut rows off that are sent: for a while the cursor is beyond the end."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    write(tmp_path, *range(1, 9))
    followed(tmp_path)
    write(tmp_path, *range(1, 5))
    followed(tmp_path)
    write(tmp_path, *range(1, 12))
    followed(tmp_path)
    assert numbers(tmp_path) == list(range(1, 12))
    followed(tmp_path, run="another")  # begun anew
    assert numbers(tmp_path) == [*range(1, 12), *range(1, 12)]


def test_rows_that_have_changed_are_not_sent_again_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    write(tmp_path, *range(1, 5))
    followed(tmp_path)
    write(tmp_path, 101, 102, 103, 104, 105)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        followed(tmp_path)
    assert numbers(tmp_path) == [1, 2, 3, 4, 105]
    assert "row 4 is not the one that was sent" in said.getvalue()


def test_places_lie_between_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert new_rows(path, Place()) == ([], Place())
    path.write_text('{"a": "nan"}\n{"a": 2}\n{"a"')
    rows, after = new_rows(path, Place())
    assert [number for number, _ in rows] == [0, 1]
    assert rows[0][1]["a"] != rows[0][1]["a"]
    assert new_rows(path, after) == ([], after)
    assert (place_after(path, 2), place_after(path, 9)) == (after, after)
    assert place_after(path, 0) == Place()
    path.write_text('{"a": "nan"}\n{"a": 2}\n{"a": 3}\n')
    assert new_rows(path, after)[0] == [(2, {"a": 3})]


def test_mistakes_are_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="follows the rows of a run folder: give run_dir"):
        Writing().open(RunInfo(None, "id"))
    with pytest.raises(ConfigError, match="project has a credential in it"):
        Writing(project="hf_abcdefghijklmnop")
    with pytest.raises(ConfigError, match="'wandbb'; did you mean 'wandb'"):
        made(["wandbb"])
    assert [type(each) for each in made(["wandb", "trackio"])] == [Wandb, Trackio]
    assert isinstance(made("wandb")[0], Wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "paceline\[wandb\]"'):
        Wandb()


def test_sync_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        sync(tmp_path, "wandb")
    ended(tmp_path)
    with pytest.raises(ConfigError, match="has no rows to send"):
        sync(tmp_path, "wandb")
    write(tmp_path, 1)
    with pytest.raises(ConfigError, match="no tracker 'wandbb'; did you mean 'wandb'"):
        sync(tmp_path, "wandbb")
    with pytest.raises(ConfigError, match="wandb has no setting 'projct'; did you mean 'project'"):
        sync(tmp_path, "wandb", {"projct": "x"})


def test_the_log_of_a_library_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracked(tmp_path, Writing())
    assert caplog.records == []
    assert (tmp_path / "trackers/writing/log.txt").read_bytes() == b""
