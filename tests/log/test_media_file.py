"""Images, histograms, text and tables on disk: exact, and truncated at a resume as rows are."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy
from paceline.errors import CheckpointError, MetricError
from paceline.log import Histogram, Image, Table, Text
from paceline.log.sinks import JsonlSink, RunInfo, read_rows
from paceline.testing import Ranks, StopAt


class Showing(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.log("some/picture", Image(self.model[0].weight[:4, :3]))
            self.log("weights", Histogram(self.model[0].weight))
            self.log("note", Text(f"after **{self.global_step}** steps"))
            self.log("table", Table(["row", "loss"], [[1, 0.5], ["x", torch.tensor(0.25)]]))


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(run_dir: Path, *callbacks: Callback) -> Any:
    """Validations every 3 steps, a checkpoint every 4."""
    model = make_model()
    trainer = Showing(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        val_dataloader=loader(Noisy(23), shuffle=False),
        validate_every=3,
        max_steps=12,
        checkpoint=CheckpointPolicy(every_steps=4),
        progress=False,
        callbacks=callbacks,
        run_dir=run_dir,
    )
    return trainer.train(seed=5)


def content(run_dir: Path) -> dict[str, bytes]:
    files = [run_dir / "media.jsonl", *sorted((run_dir / "media").iterdir())]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return content(folder)


def test_each_kind_is_on_disk(unbroken: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "media.jsonl").write_bytes(unbroken["media.jsonl"])
    rows = list(read_rows(tmp_path / "media.jsonl"))
    assert [row["step"] for row in rows[::4]] == [3, 6, 9, 12]
    image, histogram, text, table = rows[:4]
    assert image["file"] == "media/000000_some_picture.png"
    assert (image["width"], image["height"], image["channels"]) == (3, 4, 1)
    assert (histogram["count"], sum(histogram["counts"])) == (128, 128)
    assert text == {"step": 3, "name": "note", "kind": "text", "text": "after **3** steps"}
    assert (table["columns"], table["rows"]) == (["row", "loss"], [[1, 0.5], ["x", 0.25]])


@pytest.mark.parametrize("step", [5, 10])
def test_stopped_and_resumed_the_bytes_are_the_same(
    step: int, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    run(tmp_path, StopAt(step))
    run(tmp_path)
    assert content(tmp_path) == unbroken


@pytest.mark.parametrize("step", [2, 11])
def test_killed_and_resumed_the_bytes_are_the_same(
    step: int, unbroken: dict[str, bytes], ranks: Ranks, tmp_path: Path
) -> None:
    [done] = ranks.outcomes(run, 1, tmp_path, KillAt(step))
    assert done.code == -signal.SIGKILL
    run(tmp_path)
    assert content(tmp_path) == unbroken


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_others_read_the_images(channels: int, tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.open(RunInfo(tmp_path, "id"))
    pixels = torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(channels))
    sink.write_media(1, "a", Image(pixels))
    sink.write_media(1, "b", Image((pixels * 255).round().byte().permute(1, 2, 0)))
    sink.write_media(1, "c", Image(torch.full((2, 2), float("nan"), dtype=torch.bfloat16)))
    sink.close("complete")
    for file in ("000000_a.png", "000001_b.png"):
        shown = Picture.open(io.BytesIO((tmp_path / "media" / file).read_bytes()))
        assert (shown.mode, shown.size) == ({1: "L", 3: "RGB", 4: "RGBA"}[channels], (7, 5))
        flat = bytes((pixels.permute(1, 2, 0) * 255).round().byte().flatten().tolist())
        assert shown.tobytes() == flat


def test_values_that_are_not_finite_or_no_numbers(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.open(RunInfo(tmp_path, "id"))
    sink.write_media(1, "some", Histogram(torch.tensor([1.0, 3.0, torch.inf])))
    sink.write_media(1, "none", Histogram([float("nan")]))
    with pytest.raises(MetricError, match=r"log\('words', Histogram"):
        sink.write_media(1, "words", Histogram(["no", "numbers"]))
    sink.close("complete")
    some, none = read_rows(tmp_path / "media.jsonl")
    assert (some["count"], some["not_finite"], some["sum"], some["max"]) == (2, 1, 4.0, 3.0)
    assert (none["count"], none["not_finite"], "edges" in none) == (0, 1, False)


def test_a_run_without_any_has_no_file_and_a_fresh_one_drops_those_there(tmp_path: Path) -> None:
    for values in (["x"], []):
        sink = JsonlSink()
        sink.open(RunInfo(tmp_path, "id"))
        for value in values:
            sink.write_media(1, value, Image(torch.zeros(2, 2)))
        sink.close("complete")
    assert list((tmp_path / "media").iterdir()) == []
    assert (tmp_path / "media.jsonl").read_bytes() == b""
    other = tmp_path / "other"
    sink = JsonlSink()
    sink.open(RunInfo(other, "id"))
    sink.close("complete")
    assert not (other / "media.jsonl").exists()


def test_while_the_disk_fails_an_image_waits_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlSink()
    sink.open(RunInfo(tmp_path, "id"))
    (tmp_path / "media").write_text("in the way")
    sink.write_media(1, "a", Image(torch.zeros(2, 2)))
    sink.write_media(2, "b", Image(torch.ones(2, 2)))
    with pytest.raises(CheckpointError, match="2 images could not be written"):
        sink.sync()
    assert len(caplog.records) == 1
    (tmp_path / "media").unlink()
    sink.sync()
    assert [path.name for path in sorted((tmp_path / "media").iterdir())] == [
        "000000_a.png",
        "000001_b.png",
    ]
    sink.close("complete")
