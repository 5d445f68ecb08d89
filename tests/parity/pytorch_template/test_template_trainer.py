"""pytorch_template at home: its acceptance rows on the loop, callbacks and commands."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from paceline import Callback, Trainer
from paceline.callbacks import GradientMonitor
from paceline.cli.app import app
from paceline.errors import ConfigError, Preempted
from paceline.testing import StopAt, bits
from paceline.tune import RunConfig, run
from small import batches, fitted, line, same, settings, weights

RECIPE = """
code: model.py
trainer: {epochs: 2, progress: false}
model: {_target_: model.MLP, hparams: {nodes: 4, layers: 1}}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.001}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset:
    _target_: model.Points
  batch_size: 4
"""
POINTS = """
import torch
from torch.utils.data import Dataset

class Points(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return torch.full((1,), float(i)), torch.full((1,), float(i))
"""


def test_PT_05_preflight_answers_machines_and_people(project: Path) -> None:
    """JSON that parses at any width and code 0; a name that is not there is code 2 with its key."""
    (project / "model.py").write_text(POINTS + (project / "model.py").read_text())
    (project / "recipe.yaml").write_text(RECIPE)
    done = CliRunner(env={"COLUMNS": "20"}).invoke(app, ["preflight", "recipe.yaml", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["passed"] is True
    assert {"checks", "passed", "gpu_memory_mb"} <= set(report)
    words = ["preflight", "recipe.yaml", "model._target_=model.MPL"]
    wrong = CliRunner().invoke(app, words)
    assert "model._target_" in str(wrong.exception)


def test_PT_11_the_command_trains_a_run_config(project: Path) -> None:
    """With changes, and without training; what only takes recipes says which command it is."""
    words = ["train", "run.yaml", "seeds=[1]", "epochs=1"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert (shown.exit_code, yaml.safe_load(shown.stdout)["epochs"]) == (0, 1)
    assert not (project / "runs").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    conf = RunConfig.from_yaml("run.yaml", ["seeds=[1]", "epochs=1"])
    record = json.loads((conf.folder / "seed_1/run.json").read_text())
    assert record["step"] == 3
    assert f"mean val/loss: {record['metrics']['val/loss']:.6g}" in done.stdout
    for command in ("preflight", "preview"):
        refused = CliRunner().invoke(app, [command, "run.yaml"])
        assert "is a RunConfig, not a recipe: `paceline train run.yaml`" in str(refused.exception)


def test_PT_11_a_seed_that_fails_is_the_exit_code_of_the_command(project: Path) -> None:
    model = project / "model.py"
    model.write_text(
        model.read_text().replace("return self.net(x)", "return self.net(x) / (SEED != 1)")
        + "\nimport torch\nSEED = 0\n"
        + "class Named(MLP):\n"
        + "    def __init__(self, hparams, device='cpu'):\n"
        + "        super().__init__(hparams, device)\n"
        + "        global SEED\n"
        + "        SEED = torch.initial_seed()\n"
    )
    done = CliRunner().invoke(app, ["train", "run.yaml", "net=model.Named", "epochs=1"])
    assert done.exit_code == 1
    assert "seed 1 failed" in done.output


def test_PT_06_callbacks_come_by_priority_and_ties_as_given() -> None:
    heard: list[tuple[str, str]] = []

    def recording(label: str, rank: int) -> Callback:
        class Recording(Callback):
            name, priority = label, rank

            def on_train_start(self, trainer: Trainer) -> None:
                heard.append((label, "on_train_start"))

            def on_train_epoch_end(self, trainer: Trainer) -> None:
                heard.append((label, "on_train_epoch_end"))

        return Recording()

    late, early, tie = recording("late", 90), recording("early", 5), recording("tie", 90)
    fitted(epochs=2, callbacks=[late, early, tie])
    one = ["early", "late", "tie"]
    assert [label for label, _ in heard] == one * 3
    assert [event for _, event in heard] == ["on_train_start"] * 3 + ["on_train_epoch_end"] * 6


def test_loaders_by_other_names_are_told_ours() -> None:
    trainer = Trainer(**settings(train_dataloader=None))
    with pytest.raises(ConfigError) as caught:
        trainer.train(dl_train=batches(), dl_val=batches(4), epochs=1)
    assert "dl_train: here it is train_dataloader." in str(caught.value)
    assert "dl_val: here it is val_dataloader." in str(caught.value)
    assert trainer.train(batches(), batches(4), 1).global_step == 5


def test_PT_07_a_callback_can_change_the_gradients_before_the_step() -> None:
    """The template's own example of a clipping callback changed nothing (15): it came too late."""

    class Clip(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, optimizer: Any) -> None:
            nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e-12)

    start, clipped, free = weights(Trainer(**settings())), fitted(callbacks=[Clip()]), fitted()
    for name, value in weights(clipped).items():
        assert torch.allclose(value, start[name], atol=1e-9)
    assert not same(weights(free), weights(clipped))


def test_PT_15_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    saving = {"enabled": True, "save_every_n_epochs": 1, "save_best": False}
    conf = RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1], checkpoint_config=saving)
    whole = run(conf.with_overrides(project="Whole"), progress=False)
    with pytest.raises(Preempted):
        run(conf, progress=False, callbacks=[StopAt(7)])
    folder = conf.folder / "seed_1/checkpoints"
    newest = max(folder.glob("step_*/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-8])
    assert run(conf, progress=False) == whole
    assert "damaged" in capsys.readouterr().err
    assert [p.name.startswith("step_00000007") for p in (folder / ".damaged").iterdir()] == [True]


def assert_there_is_no_search() -> None:
    import paceline.tune

    with pytest.raises(AttributeError, match="OptimizeConfig"):
        _ = paceline.tune.OptimizeConfig  # pyright: ignore[reportAttributeAccessIssue]
    assert CliRunner().invoke(app, ["tune", "recipe.yaml"]).exit_code == 2


def test_PT_21_search_does_not_exist_yet() -> None:
    assert_there_is_no_search()  # then: two fresh studies of one seed suggest the same


def test_PT_22_pruners_come_with_search() -> None:
    assert_there_is_no_search()  # then: any pruner works, and keeps what it has learnt


def test_PT_24_any_setting_can_be_searched_once_there_is_search() -> None:
    assert_there_is_no_search()  # then: batch size and optimizer class too


def test_PT_25_schedule_free_optimizers_are_switched() -> None:
    """A validation sees the weights that `optimizer.eval()` would give; training goes on from its
    own."""
    schedulefree = pytest.importorskip("schedulefree")
    from paceline.callbacks import ScheduleFree

    validated: list[Any] = []
    meant: list[Any] = []
    trained: list[Any] = []

    class Watching(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            validated.append(bits(self.model.state_dict()))

        def on_train_epoch_end(self) -> None:
            model, optimizer = copy.deepcopy((self.model, self.optimizer))
            trained.append(bits(model.state_dict()))
            optimizer.eval()
            meant.append(bits(model.state_dict()))

    model = line()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    given = {"model": model, "optimizer": optimizer, "val_dataloader": batches(4)}
    fitted(Watching, **given, callbacks=[ScheduleFree()])
    assert validated == meant
    assert trained[0] != meant[0]


def test_PT_27_the_gradient_norm_of_200_tensors_is_read_with_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where reading is free, the monitor reads two numbers a step whatever the number of
    tensors (elsewhere none between rows: `test_callbacks_read_with_the_row`); the row has the mean
    of the template's number."""
    reads: list[int] = []
    norms: list[float] = []
    item = torch.Tensor.item

    class Watched(GradientMonitor):
        def on_before_optimizer_step(self, trainer: Trainer, optimizer: Any) -> None:
            squares = [p.grad.detach().norm() ** 2 for p in trainer.model.parameters()]
            norms.append(float(torch.stack(squares).sum().sqrt()))
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "item", lambda t: reads.append(1) or item(t))
                super().on_before_optimizer_step(trainer, optimizer)

    layers = [nn.Linear(3, 3) for _ in range(99)]
    fitted(
        model=nn.Sequential(*layers, nn.Linear(3, 1)),
        lr=1e-6,
        callbacks=[Watched()],
        run_dir=tmp_path,
        log_every=5,
        epochs=1,
    )
    (row,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(reads) <= 2 * 5
    assert row["grad_norm"] == pytest.approx(sum(norms) / 5, rel=1e-5)


def test_PT_29_without_wandb_everything_else_works() -> None:
    conf = RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1])
    assert run(conf, progress=False) > 0
    assert "wandb" not in sys.modules


def test_PT_30_analyze_does_not_exist_yet_but_the_last_validation_is_kept() -> None:
    """What it would compute stands in run.json: the mean over all samples."""
    conf = RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1], criterion="torch.nn.L1Loss")
    value = run(conf, progress=False)
    _, dl_val = conf.create_dataloaders()
    from paceline.checkpoint import load_tree

    model = conf.create_model()
    newest = max((conf.folder / "seed_1/checkpoints").glob("step_*"))
    model.load_state_dict(load_tree(newest)["models"]["model"])
    with torch.no_grad():
        errors = torch.cat([(model(x) - y).abs() for x, y in dl_val])
    assert value == pytest.approx(errors.mean().item(), rel=1e-6)
    assert CliRunner().invoke(app, ["analyze"]).exit_code == 2


def test_24_what_a_run_writes_is_plain_yaml_and_json() -> None:
    conf = RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1])
    run(conf, progress=False)
    assert yaml.safe_load((conf.folder / "config.yaml").read_text())["project"] == "Parity"
    assert json.loads((conf.folder / "seed_1/run.json").read_text())["versions"]
