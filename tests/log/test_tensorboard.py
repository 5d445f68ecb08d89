"""TensorBoard's files hold every scalar of a run once, whatever happened to the run meanwhile."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy
from paceline.errors import MissingExtraError
from paceline.log import Histogram, Image, Table, Text
from paceline.log.sinks import JsonlSink, RunInfo, read_rows
from paceline.log.tensorboard import TensorBoard
from paceline.recipe import build_trainer, load_recipe
from paceline.registry import lookup
from paceline.testing import Ranks, StopAt

STEPS = 12


def run(
    run_dir: Path, *callbacks: Callback, kind: type[Regression] = Regression, **changes: Any
) -> Any:
    """Rows every 2 steps, validations every 3, a checkpoint every 4."""
    model = make_model()
    usual = {
        "loggers": [JsonlSink(), TensorBoard()],
        "max_steps": STEPS,
        "checkpoint": CheckpointPolicy(every_steps=4),
    }
    trainer = kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        val_dataloader=loader(Noisy(23), shuffle=False),
        validate_every=3,
        log_every=2,
        progress=False,
        callbacks=callbacks,
        run_dir=run_dir,
        **{**usual, **changes},
    )
    return trainer.train(seed=5)


def hyperparameters(run_dir: Path) -> dict[str, Any]:
    """The settings that TensorBoard's tab HPARAMS shows of the run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    data: Any = HParamsPluginData
    told = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = data.FromString(told).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tensorboard").iterdir())


def written(run_dir: Path) -> list[tuple[str, int, float]]:
    """Each scalar in the files, as they are, in order."""
    found = []
    for path in files(run_dir):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith("_hparams_/"):
                    continue
                number = value.tensor.float_val[0] if value.HasField("tensor") else None
                found.append((value.tag, event.step, number))
    return found


def shown(run_dir: Path) -> set[tuple[str, int, float]]:
    """Each scalar as TensorBoard shows the folder."""
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {(tag, each.step, each.value) for tag in tags for each in reader.Scalars(tag)}


def rows(run_dir: Path) -> set[tuple[str, int, float]]:
    """The same from metrics.jsonl, rounded to float32."""
    return {
        (name, row["step"], float(np.float32(value)))
        for row in read_rows(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "epoch", "samples", "items")
    }


def check(run_dir: Path) -> None:
    """What the files hold is what the rows say, each once; and so is what TensorBoard shows."""
    found = written(run_dir)
    assert set(Counter((tag, step) for tag, step, _ in found).values()) == {1}
    assert set(found) == shown(run_dir) == rows(run_dir)
    steps = {step for tag, step, _ in found if tag == "train/loss"}
    assert steps == {2, 4, 6, 8, 10, 12}
    assert {step for tag, step, _ in found if tag == "val/loss"} == {3, 6, 9, 12}


def test_each_row_is_there_with_its_values(tmp_path: Path) -> None:
    run(tmp_path)
    check(tmp_path)
    assert {tag for tag, _, _ in shown(tmp_path)} == {
        "lr",
        "train/loss",
        "train/spread",
        "val/loss",
        "epoch/train/loss",
        "epoch/train/spread",
    }


@pytest.mark.parametrize("step", range(STEPS))
def test_stopped_and_resumed_each_scalar_is_there_once(step: int, tmp_path: Path) -> None:
    run(tmp_path, StopAt(step))
    run(tmp_path)
    check(tmp_path)


class KillAt(Callback):
    """Ends the process at a step as a power cut would."""

    priority = 2000

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", [3, 7, 11])
def test_killed_and_resumed_each_scalar_is_there_once(
    step: int, ranks: Ranks, tmp_path: Path
) -> None:
    """Also where there is no checkpoint yet, and the run begins anew."""
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    [done] = ranks.outcomes(run, 1, killed, KillAt(step))
    assert done.code == -signal.SIGKILL
    assert written(killed), "something is there that must not come twice"
    run(killed)
    check(killed)
    run(unbroken)
    assert shown(killed) == shown(unbroken)


def test_who_watched_before_the_stop_is_shown_the_same(tmp_path: Path) -> None:
    """A TensorBoard that has read what is cut off later forgets it."""
    run(tmp_path, StopAt(11), checkpoint=CheckpointPolicy(every_steps=4, keep_last=3))
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    assert max(event.step for event in reader.Scalars("train/loss")) == 10
    run(tmp_path, resume=str(tmp_path / "checkpoints" / "step_00000008"))
    reader.Reload()
    steps = [event.step for event in reader.Scalars("train/loss")]
    assert steps == [2, 4, 6, 8, 10, 12]
    check(tmp_path)


def test_a_fresh_start_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    run(tmp_path, max_steps=6, checkpoint=None)
    run(tmp_path)
    check(tmp_path)


def test_a_run_that_gets_it_later_has_what_is_written_from_then_on(tmp_path: Path) -> None:
    run(tmp_path, StopAt(6), loggers=[JsonlSink()])
    run(tmp_path)
    # The validation at step 6 had been left to the second start.
    assert {step for _, step, _ in shown(tmp_path)} == {6, 8, 9, 10, 12}


def test_values_that_are_not_finite_or_no_numbers(tmp_path: Path) -> None:
    sink = TensorBoard()
    sink.open(RunInfo(tmp_path, "id", resumed=True))
    sink.write({"step": 1, "a": math.inf, "b": math.nan, "c": "text", "d": 3, "epoch": 0})
    sink.write_media(1, "pixels", Image(torch.full((4, 4), math.nan, dtype=torch.bfloat16)))
    spread = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1e9, math.nan, -math.inf])])
    sink.write_media(1, "spread", Histogram(spread.bfloat16()))
    sink.write_media(1, "empty", Histogram(torch.tensor([math.nan])))
    sink.write_media(1, "words", Histogram(["no", "numbers"]))
    sink.write({"step": 2, "d": 4})
    sink.close("complete")
    found = {(tag, step): value for tag, step, value in shown(tmp_path)}
    assert found.keys() == {("a", 1), ("b", 1), ("d", 1), ("d", 2)}
    assert (found["a", 1], found["d", 1], found["d", 2]) == (math.inf, 3.0, 4.0)
    assert math.isnan(found["b", 1])
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert (reader.Tags()["images"], reader.Tags()["histograms"]) == (["pixels"], ["spread"])
    [shape] = reader.Histograms("spread")
    assert (shape.histogram_value.num, len(shape.histogram_value.bucket) < 100) == (1001, True)


def test_without_a_run_folder_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    sink = TensorBoard()
    sink.open(RunInfo(None, "id"))
    sink.write({"step": 1, "a": 1.0})
    sink.sync()
    sink.load_state_dict(sink.state_dict())
    sink.close("complete")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_costs_rows_of_the_copy_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = TensorBoard()
    sink.open(RunInfo(tmp_path, "id", resumed=True))
    sink.write({"step": 1, "a": 1.0})

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)))
    with caplog.at_level(logging.WARNING):
        sink.write({"step": 2, "a": 2.0})
        sink.write({"step": 3, "a": 3.0})
    monkeypatch.undo()
    assert len(caplog.records) == 1
    sink.write({"step": 4, "a": 4.0})
    assert written(tmp_path) == [("a", 1, 1.0), ("a", 4, 4.0)]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"paceline\[tensorboard\]"):
        TensorBoard()


RECIPE = """
run: {dir: out}
trainer: {max_steps: 2, progress: false, log_every: 1}
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
code: board_data.py
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: board_data.Data}
loggers: {files: {type: jsonl}, board: {type: tensorboard}}
"""
CODE = """
import torch
from torch.utils.data import TensorDataset

class Data(TensorDataset):
    def __init__(self) -> None:
        super().__init__(torch.eye(4), torch.ones(4, 1))
"""


def test_a_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("run.yaml").write_text(RECIPE)
    Path("board_data.py").write_text(CODE)
    build_trainer(load_recipe("run.yaml")).train(seed=1)
    del sys.modules["board_data"]
    assert lookup("logger", "tensorboard") is TensorBoard
    assert {step for tag, step, _ in shown(Path("out")) if tag == "train/loss"} == {1, 2}


def test_AH_28_the_settings_are_the_runs_hyperparameters(tmp_path: Path) -> None:
    """Given the sink itself, when a run is stopped and resumed, then they are there and as before;
    `written` finds each scalar once."""
    run(tmp_path, StopAt(5))
    first = hyperparameters(tmp_path)
    run(tmp_path)
    assert first == hyperparameters(tmp_path)
    assert (first["optimizer.lr"], first["seed"], first["data.samples"]) == (0.01, 5.0, 97.0)


def test_AH_28_a_recipes_hyperparameters_are_its_keys(tmp_path: Path) -> None:
    sink = TensorBoard()
    recipe = {"optimizer": {"lr": 0.1, "name": "x"}, "flags": [1, 2], "seed": 3, "none": None}
    sink.open(RunInfo(tmp_path, "abc", identity={"a": 1}, recipe=recipe))
    sink.write({"step": 1, "loss": 0.5})
    sink.close("complete")
    kept = {"optimizer.lr": 0.1, "optimizer.name": "x", "flags": "[1, 2]", "seed": 3.0}
    assert hyperparameters(tmp_path) == kept


class Showing(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.log("picture", Image(torch.full((2, 3, 3), 0.5)))
            self.log("weights", Histogram(self.model[0].weight))
            self.log("note", Text(f"after **{self.global_step}** steps"))
            self.log("table", Table(["row", "loss"], [[1, 0.5], [2, 0.25]]))


def shown_media(run_dir: Path) -> dict[str, list[tuple[int, Any]]]:
    reader = EventAccumulator(
        str(run_dir / "tensorboard"),
        size_guidance=dict.fromkeys(("images", "histograms", "tensors"), 0),
    )
    reader.Reload()
    return {
        "picture": [(e.step, (e.width, e.height)) for e in reader.Images("picture")],
        "weights": [(e.step, e.histogram_value.num) for e in reader.Histograms("weights")],
        **{
            tag: [
                (e.step, e.tensor_proto.string_val[0].decode())
                for e in reader.Tensors(f"{tag}/text_summary")
            ]
            for tag in ("note", "table")
        },
    }


def test_images_histograms_text_and_tables_are_shown_once_each(tmp_path: Path) -> None:
    """Also over a resume, which writes anew what came after its checkpoint."""
    for stop in ([StopAt(8)], []):
        run(tmp_path / "run", *stop, kind=Showing)
    found = shown_media(tmp_path / "run")
    steps = [3, 6, 9, 12]
    assert found["picture"] == [(step, (3, 2)) for step in steps]
    assert found["weights"] == [(step, 128) for step in steps]
    assert found["note"] == [(step, f"after **{step}** steps") for step in steps]
    assert found["table"][0] == (3, "| row | loss |\n| --- | --- |\n| 1 | 0.5 |\n| 2 | 0.25 |")
