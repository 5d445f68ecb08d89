"""A checkpoint engine of a user's own: chosen by name, recorded, and resumed from exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import one_file
from builders import Noisy, Regression, loader, make_model
from command import Paceline
from paceline import Callback, CheckpointPolicy, MetricMonitor, Resume, Trainer
from paceline.checkpoint import CheckpointEngine
from paceline.checkpoint.export import export
from paceline.errors import ConfigError, RecipeError
from paceline.recipe import load_recipe
from paceline.registry import register
from paceline.runs import find_runs
from paceline.testing import Ranks, StopAt, bits
from small import checkpoints, fitted, message, same, weights

ONE_FILE = CheckpointPolicy(engine="one_file", every_steps=2, keep_last=2)
STEPS = 9


class Published(Callback):
    """Notes what is published, and that it is there by then."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_checkpoint(self, trainer: Trainer, path: Path, step: int, best: bool) -> None:
        assert one_file.OneFile.verify(path).step == step
        self.steps.append(step)


def train(folder: Path, *callbacks: Callback) -> dict[str, Any]:
    """Trains on this rank from where the folder's run stands."""
    model = make_model()
    published = Published()
    trainer = Regression(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train_dataloader=loader(Noisy(), 5),
        val_dataloader=loader(Noisy(23), shuffle=False),
        metric_monitor=MetricMonitor(),
        max_steps=STEPS,
        validate_every=3,
        callbacks=[published, *callbacks],
        checkpoint=ONE_FILE,
        log_every=2,
        progress=False,
        run_dir=folder,
    )
    saved: list[dict[str, Any]] = []
    trainer.on_save_checkpoint = saved.append
    trainer.train(seed=3)
    state = saved[-1]
    parts = ("models", "optimizers", "progress", "monitor", "data")
    return {
        "state": bits({part: state[part] for part in parts}),
        "seen": trainer.seen,
        "published": published.steps,
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_stopped_and_resumed_it_ends_the_same(size: int, ranks: Ranks, tmp_path: Path) -> None:
    """Given an engine that the package does not know, when a run is stopped and started again, then
    it ends with the bits of one that never stopped, on every rank."""
    runner = ranks if size > 1 else lambda work, _, *args: [work(*args)]
    whole = runner(train, size, tmp_path / "whole")
    first = runner(train, size, tmp_path / "parts", StopAt(5))
    second = runner(train, size, tmp_path / "parts")
    for rank in range(size):
        assert second[rank]["state"] == whole[rank]["state"]
        assert {**first[rank]["seen"], **second[rank]["seen"]} == whole[rank]["seen"]
        told = [part[rank]["published"] for part in (first, second)]
        assert all(len(set(steps)) == len(steps) for steps in told), "each is told of once"
        assert {*told[0], *told[1]} == {*whole[rank]["published"], first[rank]["step"]}
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    kept = sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir())
    assert {f"step_{n:08d}.safetensors" for n in (8, 9)} <= set(kept)
    assert all(name.endswith(".safetensors") for name in kept)


def test_it_is_recorded_and_a_run_goes_on_with_it_alone(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, checkpoint=ONE_FILE, callbacks=[StopAt(3)])
    assert json.loads((tmp_path / "run.json").read_text())["checkpoint_engine"] == "one_file"
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    told = message(ConfigError, run_dir=tmp_path)
    assert "checkpoint.engine='native'" in told
    assert "were written by the engine 'one_file'" in told
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    assert fitted(run_dir=tmp_path, checkpoint=ONE_FILE).result.complete
    fitted(run_dir=tmp_path, resume="fresh")
    assert checkpoints(tmp_path) == ["step_00000010"]


def test_a_run_that_saves_nothing_goes_on_from_what_it_wrote(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, checkpoint=ONE_FILE, callbacks=[StopAt(3)])
    again = fitted(run_dir=tmp_path, checkpoint=None)
    assert again.local_batches == 7


def test_another_engine_s_weights_are_a_warm_start(tmp_path: Path) -> None:
    old = fitted(run_dir=tmp_path / "old", checkpoint=ONE_FILE)
    new = fitted(
        run_dir=tmp_path / "new", resume=Resume(init_from=tmp_path / "old"), lr=1e-30, max_steps=1
    )
    assert same(weights(new), weights(old))


def test_a_damaged_file_is_set_aside_by_the_engine(tmp_path: Path, capsys: Any) -> None:
    fitted(run_dir=tmp_path, checkpoint=ONE_FILE, callbacks=[StopAt(5)])
    newest = tmp_path / "checkpoints" / "step_00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert fitted(run_dir=tmp_path, checkpoint=ONE_FILE).local_batches == 6
    assert "set aside" in capsys.readouterr().err


def test_an_unknown_name_is_found_before_anything_is_built(tmp_path: Path) -> None:
    class Built(Trainer):
        def configure(self) -> None:
            raise AssertionError("too late")

    told = message(
        ConfigError, Built, checkpoint=CheckpointPolicy(engine="one_flie"), run_dir=tmp_path
    )
    assert "no checkpoint_engine is registered as 'one_flie'" in told
    assert "did you mean 'one_file'" in told
    assert not list(tmp_path.iterdir())


@register("checkpoint_engine", "half")
class Half(one_file.OneFile):
    """Has forgotten some of it."""

    load = CheckpointEngine.load
    save = CheckpointEngine.save


def test_an_engine_that_lacks_a_method_is_refused() -> None:
    told = message(ConfigError, checkpoint=CheckpointPolicy(engine="half"))
    assert "'half' lacks load, save" in told


RECIPE = """
run: {dir: out}
trainer: {epochs: 1, progress: false}
model: {_target_: torch.nn.Linear, in_features: 3, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader: {_target_: torch.utils.data.DataLoader, dataset: []}
checkpoint:
  engine: natvie
"""


def test_a_recipe_with_an_unknown_name_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"run\.yaml:9: .*did you mean 'native'") as caught:
        load_recipe(path)
    assert "checkpoint.engine" in str(caught.value)


def test_commands_read_native_checkpoints_alone_and_say_so(tmp_path: Path, ranks: Ranks) -> None:
    """`runs` reads run.json and rows, whatever the engine; `export` says why it cannot."""
    fitted(run_dir=tmp_path / "runs" / "mine", checkpoint=ONE_FILE)
    [run] = find_runs(tmp_path / "runs")
    assert (run.status, run.get("checkpoint_engine")) == ("complete", "one_file")
    paceline = Paceline(tmp_path, ranks)
    code, _, error = paceline("export", "runs/mine")
    paceline.close()
    assert (code, "written by the checkpoint engine 'one_file'" in error) == (2, True), error
    with pytest.raises(ConfigError, match="one_file"):
        export(tmp_path / "runs/mine/checkpoints/step_00000010.safetensors")
