"""pytorch_template at home: its acceptance rows on RunConfig and `run`, one test a row.

Where Paceline differs on purpose the test says what it does instead; `docs/migration` tells users.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer
from paceline.checkpoint import load_tree
from paceline.errors import (
    ConfigError,
    MetricError,
    MissingExtraError,
    NonFiniteError,
    Preempted,
    RecipeError,
    ResumeError,
)
from paceline.log.run_record import read_run
from paceline.log.sinks import RunInfo, Sink, read_rows
from paceline.testing import StopAt, rows
from paceline.trackers.cursor import read_cursor
from paceline.tune import RunConfig, run

Change = dict[str, Any]


def config(**changes: Any) -> RunConfig:
    return RunConfig.from_yaml("run.yaml").with_overrides(**changes)


def trained(conf: RunConfig, **settings: Any) -> float:
    return run(conf, **{"progress": False, **settings})


def epochs_of(conf: RunConfig, seed: int) -> list[int]:
    """The epoch of each validation's row, as the run's metrics.jsonl has them."""
    found = rows(conf.folder / f"seed_{seed}")
    return [row["epoch"] for row in found if "val/loss" in row]


def test_PT_01_a_template_configuration_trains(project: Path) -> None:
    """All its keys; the same contracts of model and data; one folder a seed."""
    conf = config()
    assert 0 < trained(conf) < 2
    assert conf.folder.parent == Path("runs/Parity")
    assert sorted(p.name for p in conf.folder.iterdir()) == [
        "config.yaml", "seed_1", "seed_2", "seeds.json",
    ]  # fmt: skip
    assert yaml.safe_load((conf.folder / "config.yaml").read_text()) == conf.to_dict()


def test_PT_01_the_loaders_may_be_given() -> None:
    x = torch.linspace(-1, 1, 12).view(-1, 1)
    data = TensorDataset(x, x)
    conf = config(seeds=[1])
    mean = trained(conf, dl_train=DataLoader(data, 4), dl_val=DataLoader(data, 4))
    assert read_run(conf.folder / "seed_1")["metrics"]["val/loss"] == mean
    with pytest.raises(ConfigError, match="both loaders or neither"):
        run(conf, DataLoader(data, 4))


def test_PT_01_what_is_built_is_what_the_configuration_says() -> None:
    conf = config()
    model = conf.create_model()
    optimizer = conf.create_optimizer(model)
    scheduler = conf.create_scheduler(optimizer)
    assert model.net[0].out_features == 8
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.01
    assert (scheduler.T_max, scheduler.eta_min) == (3, 1e-5)
    assert isinstance(conf.create_criterion(), nn.MSELoss)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 4\n", "duplicate key"),
        ("epocs: 4\n", "epocs: there is no such key; did you mean 'epochs'"),
    ],
)
def test_PT_02_a_wrong_file_is_refused_at_load(text: str, said: str, project: Path) -> None:
    file = project / "run.yaml"
    file.write_text(file.read_text() + text)
    with pytest.raises(RecipeError, match=r"run\.yaml") as error:
        RunConfig.from_yaml(file)
    assert said in str(error.value)


def test_PT_02_all_mistakes_are_told_at_once_with_their_lines(project: Path) -> None:
    text = (project / "run.yaml").read_text()
    for right, wrong in (
        ("epochs: 3", "epochs: 0"),
        ("seeds: [1, 2]", "seeds: []"),
        ("net: model.MLP", "net: MLP"),
        ("batch_size: 8", "batch_size: eight"),
        ("  patience: 10", "  patiense: 10"),
    ):
        text = text.replace(right, wrong)
    (project / "run.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        RunConfig.from_yaml("run.yaml")
    lines = {line.split(": ")[1] for line in str(error.value).splitlines()[1:]}
    assert lines == {
        "epochs", "seeds", "net", "batch_size", "early_stopping_config.patiense",
    }  # fmt: skip
    assert "run.yaml:10: epochs: expected greater than or equal to 1, got 0" in str(error.value)


def test_PT_02_floats_and_merge_keys_are_read(project: Path) -> None:
    text = (project / "run.yaml").read_text()
    text = text.replace("  lr: 1e-2", "  <<: &base {lr: 1e-3}\n  eps: 1e-7")
    (project / "run.yaml").write_text(text)
    assert dict(config().optimizer_config) == {"lr": 0.001, "eps": 1e-7}


def test_PT_02_a_misspelt_name_is_found_before_anything_is_built() -> None:
    with pytest.raises(RecipeError) as error:
        config(
            net="model.MPL", optimizer_config={"lrr": 1}, criterion="torch.nn.MSEloss",
            data="util.data", device="tpu",
        ).validate_for_execution()  # fmt: skip
    for said in (
        "net: 'model' has no 'MPL'; did you mean 'MLP'",
        "did you mean 'lr'",
        "did you mean 'MSELoss'",
        "data: 'util' has no 'data'",
        "'tpu' is not a device",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("net", "os.system"),
        ("net", "torch.optim.SGD"),
        ("criterion", "torch.hub.load"),
        ("data", "subprocess.run"),
        ("optimizer", "torch.os.system"),
        ("scheduler", "torch.nn.Linear"),
    ],
)
def test_what_may_not_be_named_is_not_called(key: str, path: str) -> None:
    """The gates of recipes: packages, identity, kind."""
    with pytest.raises(RecipeError, match=f"{key}: {path!r}|{key}: '"):
        run(config(**{key: path}))
    assert not Path("runs").exists()


def test_a_module_elsewhere_needs_trust(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration in a folder of its own, beside nothing: `trust` says what it may name."""
    (project / "configs").mkdir()
    (project / "run.yaml").rename(project / "configs/run.yaml")
    monkeypatch.syspath_prepend(project)
    with pytest.raises(RecipeError, match="model"):
        RunConfig.from_yaml("configs/run.yaml").validate_for_execution()
    RunConfig.from_yaml("configs/run.yaml", trust=["model", "util"]).validate_for_execution()
    import sys

    for name in ("model", "util"):
        sys.modules.pop(name, None)


def test_PT_03_a_configuration_is_frozen_through_and_through() -> None:
    conf = config(net_config={"sizes": [1, {"deep": 2}]})
    with pytest.raises(AttributeError):
        conf.epochs = 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        conf.early_stopping_config.patience = -1  # pyright: ignore[reportAttributeAccessIssue]
    for mapping in (conf.net_config, conf.net_config["sizes"][1]):
        with pytest.raises(TypeError):
            mapping["nodes"] = 999  # pyright: ignore[reportIndexIssue]
    assert isinstance(conf.net_config["sizes"], tuple)


def test_PT_03_overrides_merge_and_leave_the_original_alone() -> None:
    before = config(net_config={"inner": {"a": 1, "b": 2}})
    after = before.with_overrides(
        epochs=9, net_config={"inner": {"b": 3}}, checkpoint_config={"keep_last_k": 7}
    )
    assert (before.epochs, before.to_dict()["net_config"]["inner"]) == (3, {"a": 1, "b": 2})
    assert after.to_dict()["net_config"] == {"nodes": 8, "layers": 2, "inner": {"a": 1, "b": 3}}
    assert (after.epochs, after.checkpoint_config.keep_last_k) == (9, 7)
    assert after.checkpoint_config.save_every_n_epochs == 10
    with pytest.raises(RecipeError, match="epochs"):
        before.with_overrides(epochs=0)


def test_31_another_scheduler_does_not_keep_the_old_ones_arguments() -> None:
    step = config(scheduler="torch.optim.lr_scheduler.StepLR", scheduler_config={"step_size": 2})
    assert dict(step.scheduler_config) == {"step_size": 2}
    step.validate_for_execution()


def test_PT_03_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    conf = config()
    conf.to_yaml(tmp_path / "again.yaml")
    assert RunConfig.from_yaml(tmp_path / "again.yaml") == conf
    assert list(yaml.safe_load((tmp_path / "again.yaml").read_text()))[:3] == [
        "project", "device", "seeds",
    ]  # fmt: skip


def test_PT_04_what_is_hardly_meant_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    odd = config(
        epochs=2,
        seeds=[1],
        optimizer_config={"lr": 0},
        early_stopping_config={"enabled": True, "patience": 5},
    )
    keys = [line.split(":")[0] for line in odd.validate_semantics()]
    assert keys == [
        "optimizer_config.lr", "scheduler_config.T_max", "early_stopping_config.patience",
    ]  # fmt: skip
    assert config().validate_semantics() == []
    trained(odd)
    assert capsys.readouterr().err.count("paceline: warning:") == 3


def test_PT_04_the_same_seed_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"seeds: .*1 appear more than once"):
        config(seeds=[1, 2, 1])


def table(conf: RunConfig) -> list[dict[str, str]]:
    with open(conf.folder / "seed_1/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


LOSSES: list[tuple[int, float, int]] = []


class Told(Trainer):
    """Notes the loss and size of each batch; the first time it is killed in its fourth epoch."""

    def on_train_batch_end(self, batch: Any, batch_idx: int, loss: torch.Tensor) -> None:
        LOSSES.append((self.current_epoch, loss.item(), len(batch[0])))
        if self.global_step == 10 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def told(folder: Path) -> None:
    os.chdir(folder)
    trained(six_epochs(), trainer=Told)


def six_epochs() -> RunConfig:
    return config(epochs=6, seeds=[1], scheduler_config={"T_max": 6})


def test_PT_09_no_epoch_is_lost_or_doubled_at_a_resume(ranks: Any) -> None:
    """Killed in its fourth epoch and started again: epochs 0 to 5, once each, in the table too,
    which has the mean loss over the epoch's samples and the rate, and is there after the kill."""
    conf = six_epochs()
    assert ranks.outcomes(told, 1, Path.cwd())[0].code == -signal.SIGKILL
    assert [line["epoch"] for line in table(conf)] == ["0", "1", "2"]
    LOSSES.clear()
    told(Path.cwd())
    assert epochs_of(conf, 1) == list(range(6))
    lines = table(conf)
    assert [line["epoch"] for line in lines] == [str(epoch) for epoch in range(6)]
    for epoch in (4, 5):
        mean = sum(loss * n for e, loss, n in LOSSES if e == epoch) / 20
        assert float(lines[epoch]["train/loss"]) == pytest.approx(mean)
        rate = 1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * epoch / 6)) / 2
        assert float(lines[epoch]["lr"]) == pytest.approx(rate)
        assert float(lines[epoch]["val/loss"]) > 0


def test_1_a_resumed_schedule_is_not_a_step_behind() -> None:
    whole = config(epochs=6, seeds=[1], scheduler_config={"T_max": 6})
    broken = whole.with_overrides(project="Broken")
    trained(whole, log_every=1)
    with pytest.raises(Preempted):
        trained(broken, log_every=1, callbacks=[StopAt(9)])
    trained(broken, log_every=1)
    assert rows(broken.folder / "seed_1") == rows(whole.folder / "seed_1")


class Drawing(Trainer):
    """Draws from a generator of its own on its device."""

    def on_setup(self) -> None:
        self.own = torch.Generator(self.device)

    def on_step_end(self, metrics: Any) -> None:
        torch.rand((), generator=self.own, device=self.device)


def test_PT_10_a_checkpoint_does_not_say_where_it_was_made() -> None:
    """So its tensors and generators go to any device, or another index, whatever wrote it; on the
    device itself: `tests/gpu`."""
    conf = config(seeds=[1], epochs=1)
    trained(conf, trainer=Drawing)
    newest = max((conf.folder / "seed_1/checkpoints").glob("step_*"))
    files = [newest / "state.json", *newest.glob("*.safetensors")]
    assert len(files) > 1
    for file in files:
        for word in (b"cpu", b"cuda", b"device", b"index"):
            assert word not in file.read_bytes(), (file.name, word)


def test_PT_11_more_epochs_go_on_where_the_run_stood() -> None:
    """Trained for 2 epochs, then asked for 5, with another tracker: three more. What the device is
    does not tell runs apart; another model, optimizer or data set is another run, or refused by
    its keys where it is told to be the same."""
    schedule = {"scheduler": "torch.optim.lr_scheduler.ExponentialLR"}
    conf = config(seeds=[1], epochs=2, scheduler_config={"gamma": 0.9}, **schedule)
    trained(conf)
    tracker = Tracker()
    trained(conf.with_overrides(epochs=5), loggers=[tracker])
    record = read_run(conf.folder / "seed_1")
    assert (record["step"], len(record["starts"])) == (15, 1)
    assert epochs_of(conf, 1) == list(range(5))
    assert [row["epoch"] for row in tracker.rows if "val/loss" in row] == [2, 3, 4]
    fewer = conf.with_overrides(epochs=4)
    with pytest.raises(ConfigError, match="epochs: 5 then, 4 now"):
        trained(fewer)
    assert conf.with_overrides(device="cuda").folder == conf.folder
    assert conf.with_overrides(wandb=True).folder == conf.folder
    other = conf.with_overrides(optimizer="torch.optim.Adagrad", batch_size=4)
    assert other.folder != conf.folder
    model = other.create_model()
    trainer = Trainer(
        model=model, optimizer=other.create_optimizer(model), loss_fn=other.create_criterion(),
        run_dir=conf.folder / "seed_1", progress=False,
    )  # fmt: skip
    with pytest.raises(ResumeError) as error:
        trainer.train(*other.create_dataloaders(), 5, seed=1)
    for key in ("optimizer.class", "data.global_batch_size: 8 then, 4 now", "lr_scheduler"):
        assert key in str(error.value)


def test_PT_12_only_new_seeds_are_trained_and_only_those_asked_for_count() -> None:
    began: list[int] = []

    class Telling(Trainer):
        def on_train_start(self) -> None:
            began.append(self.seed)

    conf = config()
    trained(conf, trainer=Telling)
    mean = trained(config(seeds=[1, 2, 3]), trainer=Telling)
    assert began == [1, 2, 3]
    losses = [read_run(conf.folder / f"seed_{s}")["metrics"]["val/loss"] for s in (1, 2, 3)]
    assert mean == pytest.approx(sum(losses) / 3)
    assert trained(config(seeds=[2]), trainer=Telling) == losses[1]


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4},
        {"criterion": "torch.nn.L1Loss"},
        {"optimizer": "torch.optim.Adagrad", "optimizer_config": {"lr": 1e-2}},
        {"net_config": {"nodes": 4}},
        {"scheduler_config": {"eta_min": 0.0}},
        {"data": "util.other_data"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_PT_13_other_settings_are_another_run(change: Change, project: Path) -> None:
    with (project / "util.py").open("a") as file:
        file.write("\ndef other_data():\n    return load_data()\n")
    first = config(seeds=[1], epochs=1)
    trained(first)
    kept = (first.folder / "config.yaml").read_text()
    second = first.with_overrides(**change)
    trained(second)
    assert second.folder != first.folder
    assert read_run(second.folder / "seed_1")["status"] == "complete"
    assert (first.folder / "config.yaml").read_text() == kept


def test_PT_13_what_cannot_change_a_result_shares_the_run() -> None:
    assert config(seeds=[7], wandb=False, monitor="val/acc", epochs=9).group == config().group


class Classifier(Trainer):
    """Says how often the sign is right; better at every validation but the last."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("acc", float(self.current_epoch % 3))


def test_PT_17_the_best_follows_the_metric_that_is_monitored() -> None:
    saving = {"enabled": True, "monitor": "acc", "mode": "max", "keep_last_k": 1}
    conf = config(seeds=[1], epochs=4, checkpoint_config=saving)
    trained(conf, trainer=Classifier)
    best = (conf.folder / "seed_1/checkpoints/best").read_text().strip()
    assert best == "step_00000009"  # three steps an epoch; "acc" is 0, 1, 2, 0


class Untouched(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_config": {"enabled": True, "monitor": "val_los"}},
        {"early_stopping_config": {"enabled": True}, "monitor": "val_los"},
    ],
    ids=["checkpoint", "early stopping"],
)
def test_PT_17_an_unknown_metric_is_rejected_before_training(change: Change) -> None:
    """Where the user's own code may measure it, the first validation tells (preflight has one)."""
    with pytest.raises(ConfigError, match=r"'val_los' is not measured; did you mean 'val/loss'"):
        trained(config(**change), trainer=Untouched)
    assert not list(Path("runs").rglob("metrics.jsonl"))
    conf = config(seeds=[1], checkpoint_config={"enabled": True, "monitor": "acx"})
    with pytest.raises(MetricError, match="'acc'"):
        trained(conf, trainer=Classifier)
    assert epochs_of(conf, 1) == [0]


class Scored(Trainer):
    """What `metrics: [mse, r2]` would compute, over the whole validation set."""

    def on_validation_start(self) -> None:
        self.seen: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.append((self.model(batch[0]), batch[1]))

    def get_val_metrics(self) -> dict[str, Any]:
        return scores(*map(torch.cat, zip(*self.seen, strict=True)))


def scores(outputs: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    squares = (outputs - y) ** 2
    spread = ((y - y.mean()) ** 2).sum()
    return {"mse": squares.mean().item(), "r2": 1 - (squares.sum() / spread).item()}


class Tracker(Sink):
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def open(self, run: RunInfo) -> None: ...

    def write(self, row: Any) -> None:
        self.rows.append(dict(row))


def test_PT_18_metrics_of_ones_own_are_in_every_epochs_row() -> None:
    """There is no `metrics:` key; a subclass returns what it measures, of all samples at once, and
    it is in the table and in trackers each epoch."""
    conf, tracker = config(seeds=[1], batch_size=3), Tracker()
    trained(conf, trainer=Scored, loggers=[tracker])
    lines = table(conf)
    assert [line["epoch"] for line in lines] == ["0", "1", "2"]
    told = [row for row in tracker.rows if "r2" in row]
    for name in ("mse", "r2"):
        assert [float(line[name]) for line in lines] == [row[name] for row in told]
    model = conf.create_model()
    newest = max((conf.folder / "seed_1/checkpoints").glob("step_*"))
    model.load_state_dict(load_tree(newest)["models"]["model"])
    x, y = conf.create_dataloaders()[1].dataset.tensors  # pyright: ignore
    with torch.no_grad():
        expected = scores(model(x), y)
    assert {name: told[-1][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RecipeError, match="metrics: there is no such key"):
        RunConfig.from_yaml("run.yaml", ["+metrics=[mse]"])


@pytest.mark.parametrize("step", [0, 2])
def test_PT_20_an_error_keeps_its_type(step: int) -> None:
    """At the first batch and later, with several seeds, all of which fail."""

    class Broken(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == step:
                raise KeyError("a bug")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError, match="a bug"):
        trained(config(), trainer=Broken)


def test_PT_26_a_crashed_run_has_said_what_it_was() -> None:
    class Broken(Trainer):
        def on_step_end(self, metrics: Any) -> None:
            raise RuntimeError("down")

    conf = config(seeds=[1])
    with pytest.raises(RuntimeError):
        trained(conf, trainer=Broken)
    record = json.loads((conf.folder / "seed_1/run.json").read_text())
    assert record["status"] == "failed"
    assert {"command", "versions", "git", "hardware", "seed"} <= set(record)
    assert yaml.safe_load((conf.folder / "config.yaml").read_text()) == conf.to_dict()


def test_14_a_seed_that_diverged_is_not_complete() -> None:
    """The template marked it done, with an infinite loss, for ever."""
    conf = config(optimizer="torch.optim.SGD", optimizer_config={"lr": 1e38})
    with pytest.raises(NonFiniteError):
        trained(conf)
    kept = json.loads((conf.folder / "seeds.json").read_text())
    assert (kept["seeds"], list(kept["failed"])) == ({}, ["1", "2"])
    for seed in (1, 2):
        assert read_run(conf.folder / f"seed_{seed}")["status"] == "failed"


def test_14_one_seed_that_diverges_does_not_keep_the_other_from_training() -> None:
    """The mean is that of the seed that finished."""

    class Once(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.seed == 1 else loss

    conf = config()
    mean = trained(conf, trainer=Once)
    assert read_run(conf.folder / "seed_1")["status"] == "failed"
    assert read_run(conf.folder / "seed_2")["metrics"]["val/loss"] == mean
    kept = json.loads((conf.folder / "seeds.json").read_text())
    assert kept["failed"]["1"].startswith("NonFiniteError")


def test_33_early_stopping_is_relative_and_ends_a_seed_as_complete() -> None:
    """A flat metric below zero improves nothing; the template's never stopped there (11)."""

    class Flat(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", -1.0)

    stopping = {"enabled": True, "patience": 2}
    conf = config(seeds=[1], epochs=9, early_stopping_config=stopping)
    trained(conf, trainer=Flat)
    record = read_run(conf.folder / "seed_1")
    assert (record["status"], record["stopped_by"], record["step"]) == ("complete", "early stop", 9)


def test_6_the_oldest_checkpoints_go_first() -> None:
    """Step 30 comes after step 9, whatever the names sort to."""
    saving = {"enabled": True, "save_every_n_epochs": 1, "keep_last_k": 2, "save_best": False}
    conf = config(seeds=[1], epochs=11, checkpoint_config=saving)
    trained(conf)
    kept = sorted(p.name for p in (conf.folder / "seed_1/checkpoints").glob("step_*"))
    assert kept == ["step_00000030", "step_00000033"]


def test_a_schedule_of_the_metric_follows_the_loss() -> None:
    plateau = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    conf = config(seeds=[1], scheduler=plateau, scheduler_config={"patience": 0})
    assert trained(conf) > 0


def test_35_wandb_true_tracks_each_seed_and_continues_its_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real library, offline: trained for 2 epochs, then asked for 3, each seed is one run with
    each row once."""
    from paceline.trackers.libraries.wandb_runs import history

    monkeypatch.setenv("WANDB_MODE", "offline")
    conf = config(seeds=[1], epochs=2, wandb=True)
    trained(conf)
    trained(conf.with_overrides(epochs=3))
    folder = conf.folder / "seed_1"
    files = sorted(folder.glob("trackers/wandb/wandb/offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{read_run(folder)['id']}.wandb"] * 2
    found = [values for path in files for values in history(path)]
    assert [values["_step"] for values in found] == list(range(len(found)))
    expected = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    assert [values["step"] for values in found] == expected
    said = read_cursor(folder / "trackers/wandb.json")
    assert said is not None
    assert (said.settings["project"], said.settings["group"]) == (conf.project, conf.group)
    assert said.settings["tags"]


def test_29_without_the_extra_wandb_true_names_its_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else found(n))
    with pytest.raises(MissingExtraError, match=r'pip install "paceline\[wandb\]"'):
        trained(config(seeds=[1], wandb=True))
