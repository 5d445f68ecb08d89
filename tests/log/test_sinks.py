"""The row files: exact, append-only, cut back at resume, and patient with a disk that fails."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import Trainer
from paceline.errors import CheckpointError, MetricError
from paceline.log.sinks import JsonlSink, RowFile, RunInfo, Sink, last_row, read_rows, write_csv
from small import settings


def opened(run_dir: Path, *, fresh: bool = False, **settings: bool) -> JsonlSink:
    sink = JsonlSink(**settings)
    sink.open(RunInfo(run_dir, "id", resumed=not fresh))
    return sink


def steps(run_dir: Path, name: str = "metrics.jsonl") -> list[int]:
    return [row["step"] for row in read_rows(run_dir / name)]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `room` bytes: writes fall short, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.lists(st.floats(allow_nan=False), max_size=8))
def test_floats_come_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, values) -> None:
    folder = tmp_path_factory.mktemp("run")
    sink = opened(folder)
    sink.write({str(i): value for i, value in enumerate(values)})
    sink.close("complete")
    row = next(read_rows(folder / "metrics.jsonl"))
    assert [bits(value) for value in row.values()] == [bits(value) for value in values]


def test_non_finite_values_are_valid_json(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"a": math.nan, "b": math.inf, "c": [-math.inf], "d": np.float32("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row == {"a": "nan", "b": "inf", "c": ["-inf"], "d": "nan"}
    back = next(read_rows(tmp_path / "metrics.jsonl"))
    assert math.isnan(back["a"])
    assert back["b"] == math.inf
    sink.close("complete")


def test_keys_keep_their_order(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1, "b": 1.0, "a": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "b": 1.0, "a": 2.0}\n'
    sink.close("complete")


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    with pytest.raises(MetricError, match=r"'val\.x\[1\]' is a object"):
        sink.write({"val": {"x": [1, object()]}})
    sink.write({"step": 1})
    sink.close("failed")
    assert steps(tmp_path) == [1]


def test_a_row_is_visible_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1})
    sink.write_timing({"step": 1, "samples_per_s": 3.0})
    assert steps(tmp_path) == steps(tmp_path, "timing.jsonl") == [1]
    sink.close("complete")


def test_resume_cuts_both_files_back_to_the_checkpoint(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    for step in (1, 2, 3):
        sink.write({"step": step})
        sink.write_timing({"step": step})
        if step == 2:
            state = sink.state_dict()
    sink.close("stopped")

    resumed = opened(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state
    resumed.write({"step": 33})
    assert steps(tmp_path) == [1, 2, 33]
    assert steps(tmp_path, "timing.jsonl") == [1, 2]
    resumed.close("complete")


def test_a_torn_last_line_is_cut_off_at_resume(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1})
    sink.close("stopped")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss"' + " " * 70_000)  # longer than one block read backwards
    assert steps(tmp_path) == [1]  # a reader leaves it out, too

    sink = opened(tmp_path)
    sink.write({"step": 2})
    sink.close("complete")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_shorter_file_names_the_lost_rows_and_nothing_is_touched(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    for step in (10, 20, 30, 40):
        sink.write({"step": step})
        sink.write_timing({"step": step})
    state = sink.state_dict()
    sink.write_timing({"step": 50})
    sink.close("stopped")
    metrics, timing = tmp_path / "metrics.jsonl", tmp_path / "timing.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    before = metrics.read_bytes(), timing.read_bytes()

    sink = opened(tmp_path)
    with pytest.raises(CheckpointError, match=r"rows 3 to 4 are lost, everything after step 20"):
        sink.load_state_dict(state)
    assert (metrics.read_bytes(), timing.read_bytes()) == before
    sink.close("failed")

    accepting = opened(tmp_path, accept_lost_rows=True)
    accepting.load_state_dict(state)
    accepting.close("complete")
    assert steps(tmp_path) == [10, 20]
    assert steps(tmp_path, "timing.jsonl") == [10, 20, 30, 40]


def test_a_file_changed_by_hand_is_not_cut_within_a_row(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1})
    state = sink.state_dict()
    sink.close("stopped")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "note": "edited"}\n')
    sink = opened(tmp_path, accept_lost_rows=True)
    sink.load_state_dict(state)  # what has no boundary there is kept whole
    sink.close("failed")
    assert steps(tmp_path) == [1]
    sink = opened(tmp_path)
    with pytest.raises(CheckpointError, match="was changed"):
        sink.load_state_dict(state)
    sink.close("failed")
    assert steps(tmp_path) == [1]


def test_rows_of_an_earlier_run_go_only_when_told(tmp_path: Path) -> None:
    for step, fresh in ((1, False), (2, False), (3, True)):
        sink = opened(tmp_path, fresh=fresh)
        sink.write({"step": step})
        sink.close("stopped")
        assert steps(tmp_path) == ([3] if fresh else list(range(1, step + 1)))


def test_a_full_disk_keeps_the_rows_and_lets_no_checkpoint_claim_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.WARNING), full_disk(len(whole) + 5):  # 5 bytes still fit
        for step in (2, 3, 4):
            sink.write({"step": step})
            assert (tmp_path / "metrics.jsonl").read_bytes() == whole  # no half row to be seen
        state = sink.state_dict()
        with pytest.raises(CheckpointError, match="3 rows could not be written"):
            sink.sync()
    assert len(caplog.records) == 1, "one warning an outage"

    sink.sync()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert sink.state_dict() == state
    assert state["metrics.jsonl"]["bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
    sink.write({"step": 5})
    sink.close("complete")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_second_outage_is_announced_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    for step in (1, 2):
        with full_disk(0 if step == 1 else 12):
            file.append({"step": step})
        file.append({"step": 10 * step})
    file.close()
    assert len(caplog.records) == 2
    assert [row["step"] for row in read_rows(file.path)] == [1, 10, 2, 20]


def test_a_half_row_that_cannot_be_removed_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RowFile(tmp_path / "rows.jsonl")

    def refuse(*_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, full_disk(4):
        patch.setattr("paceline.log.row_file.os.ftruncate", refuse)
        file.append({"step": 1})
    file.append({"step": 2})
    file.close()
    assert [row["step"] for row in read_rows(file.path)] == [1, 2]


def test_closing_on_a_full_disk_does_not_hide_the_error_that_led_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened(tmp_path)
    with full_disk(3):
        sink.write({"step": 1})
        sink.close("failed")
    assert "the last 1 rows could not be written" in caplog.text


def test_csv_is_derived_with_a_column_for_every_key(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1, "loss": 0.1 + 0.2})
    sink.write({"step": 2, "loss": math.nan, "val/loss": 1e-300})
    sink.close("complete")
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "loss", "val/loss"]
    assert float(table[0]["loss"]) == 0.1 + 0.2
    assert table[0]["val/loss"] == ""
    assert table[1]["loss"] == "nan"
    assert float(table[1]["val/loss"]) == 1e-300


def test_the_csv_can_be_derived_from_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert write_csv(tmp_path).read_text() == "step\n1\n"


def test_the_table_is_there_while_the_run_goes_on(tmp_path: Path) -> None:
    """A line per step, which the validation's row joins, and new columns when they first come."""
    file, sink = tmp_path / "metrics.csv", opened(tmp_path)
    sink.write({"step": 1, "epoch": 0, "loss": 0.5})
    assert file.read_text() == "step,epoch,loss\n1,0,0.5\n"
    sink.write({"step": 1, "epoch": 0, "val/loss": math.inf})
    sink.write({"step": 2, "epoch": 1, "loss": 0.25})
    assert file.read_text() == "step,epoch,loss,val/loss\n1,0,0.5,inf\n2,1,0.25,\n"
    sink.write({"step": 2, "epoch": 2, "val/loss": 0.125})
    live = file.read_text()
    assert live == "step,epoch,loss,val/loss\n1,0,0.5,inf\n2,1,0.25,0.125\n"
    assert write_csv(tmp_path).read_text() == live
    sink.close("complete")
    assert file.read_text() == live


def test_a_resumed_table_goes_on_where_the_rows_do(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    sink.write({"step": 1, "loss": 0.5})
    state = sink.state_dict()
    sink.write({"step": 2, "loss": 0.25, "later": 1})
    sink.close("failed")
    again = JsonlSink()
    again.open(RunInfo(tmp_path, "abc", resumed=True))
    again.load_state_dict(state)
    again.write({"step": 2, "loss": 0.125})
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.125\n"
    again.close("complete")


def test_a_table_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.csv").mkdir()
    sink = opened(tmp_path)
    sink.write({"step": 1})
    sink.write({"step": 2})
    assert caplog.text.count("metrics.csv cannot be written") == 1
    sink.close("complete")
    assert len(list(read_rows(tmp_path / "metrics.jsonl"))) == 2


def test_a_damaged_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(MetricError, match="line 2"):
        list(read_rows(path))


def test_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert last_row(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert last_row(path) == {"step": 2}


def test_without_a_run_folder_nothing_is_written() -> None:
    sink = JsonlSink()
    sink.open(RunInfo(None, "id"))
    sink.write({"step": 1})
    sink.sync()
    assert sink.state_dict() == {}
    sink.close("complete")


def test_the_same_sink_can_be_opened_again(tmp_path: Path) -> None:
    sink = opened(tmp_path)
    with pytest.raises(RuntimeError, match="already open"):
        sink.open(RunInfo(tmp_path, "id", resumed=True))
    sink.close("complete")
    sink.open(RunInfo(tmp_path, "id", resumed=True))
    sink.write({"step": 1})
    sink.close("complete")
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("status", ["complete", "stopped", "failed"])
@pytest.mark.parametrize("written", [False, True])
def test_a_sink_is_told_how_the_run_ended(status: str, written: bool, tmp_path: Path) -> None:
    class Told(Sink):
        def close(self, status: str) -> None:
            told.append(status)

    def act(_: Any) -> None:
        if status == "stopped":
            trainer.request_stop("test")
        if status == "failed":
            raise ValueError("on purpose")

    told: list[str] = []
    trainer = Trainer(**settings(loggers=[Told()], run_dir=tmp_path if written else None))
    trainer.on_step_end = act
    with pytest.raises(ValueError, match="on purpose") if status == "failed" else nullcontext():
        trainer.fit(seed=1)
    assert told == [status]


@pytest.mark.parametrize("how", ["removed", "replaced", "shortened"])
def test_rows_that_somebody_takes_away_meanwhile_are_put_back_before_a_checkpoint(
    tmp_path: Path, how: str
) -> None:
    """Then the position that the checkpoint keeps is one to which the file can be cut."""
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    for step in (1, 2, 3):
        file.append({"step": step})
    if how == "shortened":
        os.truncate(path, len('{"step": 1}\n') + 4)
    else:
        path.unlink()
        if how == "replaced":
            path.write_text("mine")
    file.append({"step": 4})
    file.sync()
    file.append({"step": 5})
    kept = [1, 4, 5] if how == "shortened" else [1, 2, 3, 4, 5]
    assert [row["step"] for row in read_rows(path)] == kept
    assert file.position() == {"bytes": path.stat().st_size, "rows": len(kept)}
    if how == "replaced":
        assert (tmp_path / "rows.replaced.jsonl").read_text() == "mine"
    file.close()
