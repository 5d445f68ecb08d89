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

from builders import Count
from paceline import Callback, Trainer
from paceline.callbacks import GradientMonitor
from paceline.checkup import preflight
from paceline.cli.app import app
from paceline.errors import ConfigError, Preempted, RecipeError
from paceline.recipe import load_recipe
from paceline.testing import StopAt, bits
from paceline.tune import RunConfig, run
from paceline.world.world import World
from small import batches, fitted, line, same, settings, step_rows, weights

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


ODD = """
val_dataloader: ${train_dataloader}
lr_scheduler: {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: 3}
"""
ODD_SETTINGS = [
    "optimizer.lr=0", "+trainer.lr_scheduler_interval=epoch", "+trainer.early_stop=5",
    "+trainer.metric_monitor.metric_name=val/loss",
]  # fmt: skip
CLASSES = """
from torch.utils.data import TensorDataset

def classes():
    return TensorDataset(torch.randn(8, 1), torch.arange(8) % 3)
"""


@pytest.fixture
def recipe(project: Path) -> Path:
    code = POINTS + CLASSES + (project / "model.py").read_text()
    (project / "model.py").write_text(code)
    (project / "recipe.yaml").write_text(RECIPE)
    return project / "recipe.yaml"


def test_PT_04_the_commands_list_what_is_hardly_meant(paceline: Any, recipe: Path) -> None:
    """Code 0 where all of it may be meant, 1 where a check of preflight fails, 2 for a mistake."""
    recipe.write_text(RECIPE + ODD)
    code, out, _ = paceline("preflight", "recipe.yaml", *ODD_SETTINGS, "--json")
    told = [c for c in json.loads(out)["checks"] if c["name"] == "settings"]
    assert (code, [c["status"] for c in told]) == (1, ["FAIL", "WARN", "WARN"])
    rate, patience, length = (c["detail"] for c in told)
    assert "optimizer.lr is 0" in rate
    assert "early_stop is 5 and the run has 2 validations" in patience
    assert "lr_scheduler.T_max is 3 and the run has 2 epochs" in length
    words = ["seeds=[1]", "epochs=2", "early_stopping_config={enabled: true, patience: 5}"]
    words += ["optimizer_config.lr=0", "--dry-run"]
    code, out, err = paceline("train", "run.yaml", *words)
    assert (code, yaml.safe_load(out)["epochs"]) == (0, 2)
    found = [text.split(": ")[2] for text in err.splitlines()]
    assert found == [
        "optimizer_config.lr", "scheduler_config.T_max", "early_stopping_config.patience",
    ]  # fmt: skip
    code, _, err = paceline("train", "run.yaml", "seeds=[1,1]", "--dry-run")
    assert (code, "'seeds=[1,1]': seeds: " in err) == (2, True)


def test_PT_05_preflight_answers_machines_and_people(paceline: Any, recipe: Path) -> None:
    """JSON that parses at any width and code 0; a name that is not there is code 2 with its key."""
    code, out, _ = paceline("preflight", "recipe.yaml", "--json", COLUMNS="20")
    report = json.loads(out)
    assert (code, report["passed"], report["gpu_memory_mb"]) == (0, True, None)
    assert max(len(check["detail"]) for check in report["checks"]) > 20
    wrong = ["preflight", "recipe.yaml", "model._target_=model.MPL", "--json"]
    code, out, err = paceline(*wrong, COLUMNS="20")
    (check,) = json.loads(out)["checks"]
    assert (code, check["status"], json.loads(out)["passed"]) == (2, "FAIL", False)
    for text in (check["detail"], err):
        assert "model._target_: " in text
        assert "did you mean 'MLP'" in text


def test_PT_05_preflight_in_python_and_of_a_classifier(recipe: Path) -> None:
    """Its classes are numbers and its outputs scores: shapes that differ as they should."""
    path, criterion = recipe, "loss_fn._target_=torch.nn.CrossEntropyLoss"
    text = RECIPE.replace("_target_: model.MLP", "_target_: model.Classifier")
    path.write_text(text.replace("model.Points", "model.classes"))
    with (path.parent / "model.py").open("a") as file:
        file.write(
            "\nclass Classifier(MLP):\n"
            "    def __init__(self, hparams):\n"
            "        super().__init__(hparams)\n"
            "        self.net[-1] = nn.Linear(hparams['nodes'], 3)\n"
        )
    report = preflight(load_recipe(path, [criterion]))
    assert {check.name: check.status for check in report.checks}["output shape"] == "PASS"
    assert report.passed
    assert set(report.as_json()) >= {"checks", "passed", "gpu_memory_mb"}
    with pytest.raises(RecipeError, match=r"model._target_: .*did you mean 'Classifier'"):
        load_recipe(path, ["model._target_=model.Clasifier"])


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
    """Told that reading is not free, the monitor reads nothing in a step; the row of an epoch has
    the mean and the largest of the template's number, of a run that was stopped too."""
    monkeypatch.setattr(World, "reads_are_free", property(lambda self: False))
    counted = Count()
    norms: list[float] = []

    class Watched(GradientMonitor):
        def on_before_optimizer_step(self, trainer: Trainer, optimizer: Any) -> None:
            squares = [p.grad.detach().norm() ** 2 for p in trainer.model.parameters()]
            norms.append(float(torch.stack(squares).sum().sqrt()))
            with counted:
                super().on_before_optimizer_step(trainer, optimizer)

    def train(*callbacks: Callback) -> None:
        layers = [nn.Linear(3, 3) for _ in range(99)]
        model = nn.Sequential(*layers, nn.Linear(3, 1))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        kept = {"model": model, "lr": 1e-6, "run_dir": tmp_path, "log_every": 5, "epochs": 1}
        fitted(**kept, callbacks=[Watched(), *callbacks])

    train(StopAt(3))
    train()
    (row,) = step_rows(tmp_path)
    assert counted.calls
    assert not counted.calls.keys() & {"aten._local_scalar_dense", "aten._to_copy"}
    assert len(norms) == 5
    assert row["grad_norm"] == pytest.approx(sum(norms) / 5, rel=1e-5)
    assert row["max_grad_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert max(norms[3:]) < max(norms)  # the largest was before the stop


def test_PT_29_without_wandb_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    conf = RunConfig.from_yaml("run.yaml").with_overrides(seeds=[1])
    assert run(conf, progress=False) > 0


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
