"""ArcticTraining at home: acceptance rows on trainers with factories, one test a row.

Where Paceline differs on purpose the test says what it does instead: `trainer.type` names the
trainer, epochs stay 1 by default, and a micro-batch is a loader's batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union

import pytest
import torch
import yaml

from builders import code_forgotten
from paceline import registry
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, RecipeError
from paceline.factories import (
    CheckpointEngine,
    Config,
    DataFactory,
    DataSource,
    FactoryTrainer,
    HumanInt,
    ModelFactory,
    TrainerConfig,
    get_config,
    register,
)
from paceline.lm.data.columns import KNOWN
from paceline.recipe import build_trainer, load_recipe
from paceline.trainer.slots import slots_of


class WideConfig(Config):
    k: HumanInt = 1


class Narrow(ModelFactory):
    def create_model(self, model_config: Any) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)


class Wide(Narrow):
    config_type = WideConfig


class Base(FactoryTrainer):
    """A language model's trainer in small: one number in, one out."""

    model_factory_type = [Narrow, Wide]

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.model(batch) - 1).square().mean()


class Numbers(DataSource):
    """The numbers below 24."""

    def load(self, config: Any, split: str) -> Any:
        return [torch.tensor([float(i)]) for i in range(24)]


@pytest.fixture(autouse=True)
def _named() -> Iterator[None]:
    """The classes above have names while a test runs."""
    with registry.restored(), code_forgotten():
        register("model_factory", "narrow")(Narrow)
        register("model_factory", "wide")(Wide)
        register("trainer", "base")(Base)
        register("data_source", "numbers")(Numbers)
        yield


def config(**sections: Any) -> Any:
    """A recipe in Python, as `get_config` makes it."""
    tree = {
        "trainer": {"type": "base", "progress": False},
        "data": {"sources": [{"type": "numbers"}]},
        "run": {"dir": "run"},
    }
    return get_config(tree | sections)


def refusal(**sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        config(**sections)
    return str(caught.value)


TRAINER = """\
from arctic_helper import scaled
from paceline.factories import FactoryTrainer

class Mine(FactoryTrainer):
    name = "my"

    def loss(self, batch):
        return scaled(self.model(batch).square().mean())
"""


def test_AT_02_a_trainer_beside_the_recipe_needs_no_decorator(tmp_path: Path) -> None:
    """`code:` is written out; nothing is executed because it happens to be called train.py."""
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "arctic_helper.py").write_text("def scaled(loss):\n    return 3 * loss\n")
    tree = {
        "code": "train.py",
        "trainer": {"type": "my", "max_steps": 2, "progress": False},
        "model": {"type": "narrow"},
        "data": {"sources": [{"type": "numbers"}]},
        "run": {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    with code_forgotten():
        trainer = build_trainer(load_recipe(path))
        assert type(trainer) is sys.modules["train"].Mine
        assert trainer.train().global_step == 2
    path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "code"}))
    with registry.restored(), pytest.raises(RecipeError, match="no trainer is registered as 'm2'"):
        load_recipe(path, ["trainer.type=m2"])


def test_AT_03_a_class_in_the_older_style_is_accepted() -> None:
    @register("trainer", "older")
    class Older(Base):
        config_type = TrainerConfig
        model_factory_type = [Wide, Narrow]

    class Newer(Base):
        config: TrainerConfig
        model_factory: Wide | Narrow

    assert slots_of(Older)["model"] == slots_of(Newer)["model"]
    assert type(config(trainer={"type": "older"}).model) is WideConfig


def test_AT_04_the_first_listed_is_the_default_and_others_are_refused() -> None:
    class Third(Narrow):
        name = "third"

    assert config().model.type == ""
    assert type(config(model={"type": "wide"}).model) is WideConfig
    text = refusal(model={"type": "third"})
    assert "'third' is none of those that this trainer takes: Narrow, Wide" in text
    assert "skip_validation" in text
    taken = config(model={"type": "third"}, trainer={"type": "base", "skip_validation": True})
    assert taken.model.class_of("model_factory") is Third


def test_AT_05_unions_may_be_written_in_any_way() -> None:
    """This module's annotations are texts, since it imports `annotations` from `__future__`."""

    class Pipe(Base):
        model_factory: Wide | Narrow

    class Old(Base):
        model_factory: Union[Wide, Narrow]  # noqa: UP007

    evaluated = type("Evaluated", (Base,), {"__annotations__": {"model_factory": Wide | Narrow}})
    for cls in (Pipe, Old, evaluated):
        assert slots_of(cls)["model"].choices == (Wide, Narrow)


def test_AT_06_each_mistake_of_a_class_names_the_class_and_the_cure() -> None:
    class Unnamed(FactoryTrainer):
        pass

    class MixIn:
        pass

    class Mixed(MixIn, Base):
        name = "mixed"

    assert "Unnamed" not in str(registry.names("trainer"))
    assert registry.lookup("trainer", "mixed") is Mixed
    with pytest.raises(ConfigError) as caught:

        class Wrong(FactoryTrainer):
            name = "mixed"
            model_factory: DataFactory

    text = str(caught.value)
    for said in (
        "Wrong:",
        "model_factory_type = DataFactory: DataFactory is no ModelFactory; give a class that",
        "it has no loss: define loss(self, batch)",
        "name = 'mixed' is taken by",
    ):
        assert said in text


WORKERS = """\
from sibling import Late
from paceline.factories import DataFactory, FactoryTrainer

class Lates(DataFactory):
    name = "lates"

    def load(self, data_sources):
        return Late()

class Mine(FactoryTrainer):
    name = "mine"
    data_factory_type = Lates

    def loss(self, batch):
        return self.model(batch).square().mean()
"""
SIBLING = """\
import torch

class Late(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        from nephew import value
        return torch.tensor([value + index])
"""


def test_AT_07_code_in_a_folder_imports_its_siblings_in_workers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "sub", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "a.py").write_text(WORKERS)
    (folder / "sibling.py").write_text(SIBLING)
    (folder / "nephew.py").write_text("value = 3.0\n")
    tree = {
        "code": "sub/a.py",
        "trainer": {"type": "mine", "progress": False},
        "model": {"type": "narrow"},
        "data": {"num_workers": 1},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(elsewhere)
    assert build_trainer(load_recipe(tmp_path / "r.yaml")).train().global_step == 2


def test_AT_08_and_09_missing_code_unknown_and_duplicate_keys_have_their_lines(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("code: sub/none.py\ntrainer: {type: base, epohcs: 2}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert f"{path}:1: code: " in str(caught.value)
    assert str(tmp_path / "sub/none.py") in str(caught.value)
    assert f"{path}:2: trainer.epohcs: " in str(caught.value)
    assert "did you mean 'epochs'?" in str(caught.value)
    path.write_text("seed: 1\ntrainer: {type: base}\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"(?s)seed.*line 3|:3: .*seed"):
        load_recipe(path)


def test_AT_10_numbers_may_be_written_as_people_do() -> None:
    model = {"type": "wide", "k": "128Ki"}
    data = {"sources": [{"type": "numbers", "sample_count": "10^6"}]}
    found = config(model=model, data=data, optimizer={"lr": "3e-5"}, lr_scheduler={"warmup": "5%"})
    assert (found.model.k, found.data.sources[0].sample_count) == (131072, 1000000)
    assert (found.optimizer.lr, found.lr_scheduler.warmup) == (3e-5, 0.05)


def test_AT_11_a_number_with_several_decimals_is_exact() -> None:
    assert config(model={"type": "wide", "k": "1.25K"}).model.k == 1250


def test_AT_12_a_key_of_one_factory_is_refused_by_another() -> None:
    trainer = Base(config(model={"type": "wide", "k": 3}))
    assert trainer.config is not None
    assert trainer.config.model.k == 3  # pyright: ignore
    assert "model.k: there is no such key" in refusal(model={"type": "narrow", "k": 3})


def test_AT_14_the_horizon_is_that_of_all_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Base(config(trainer={"type": "base", "epochs": 2, "progress": False}))
    result = trainer.train()
    schedule: Any = trainer.lr_scheduler
    assert (trainer.training_horizon, schedule.warmup_steps, trainer.epochs) == (48, 4, 2)
    assert (result.global_step, schedule.total_steps) == (48, 48)


def test_AT_16_a_number_of_steps_overrides_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer without `epochs` passes over the data as often as the steps need."""
    monkeypatch.chdir(tmp_path)
    for steps, accumulation, epochs in ((5, 1, 0), (5, 6, 1)):
        given = {"max_steps": steps, "gradient_accumulation_steps": accumulation}
        run = {"dir": f"run{accumulation}"}
        trainer = Base(config(trainer={"type": "base", "progress": False, **given}, run=run))
        assert trainer.train().global_step == steps
        assert (trainer.training_horizon, trainer.current_epoch) == (5, epochs)


class Watched(Base):
    """Keeps the batches that it has seen, and its weights after each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def loss(self, batch: Any) -> torch.Tensor:
        if self.model.training:
            self.batches.append(batch)
        return super().loss(batch)

    def post_step_callback(self) -> None:
        self.weights.append({k: v.clone() for k, v in self.model.state_dict().items()})


def watched(folder: Path, accumulation: int = 3, **sections: Any) -> Watched:
    """Six steps over windows of `accumulation` pairs of numbers; validates on all at each step."""
    tree = {
        "trainer": {"type": "watched", "max_steps": 6, "progress": False, "log_every": 1,
                    "gradient_accumulation_steps": accumulation, "validate_every": 1},
        "data": {"micro_batch_size": 2, "sources": [{"type": "numbers"}],
                 "eval_sources": {"all": {"type": "numbers"}}},
        "optimizer": {"type": "sgd", "lr": 1e-3},
        "lr_scheduler": {"type": "constant", "warmup": 0},
        "checkpoint": [{"type": "paceline", "every_steps": 2, "keep_last": 9},
                       {"type": "weights", "every_steps": 2, "at_end": True}],
        "run": {"dir": str(folder)},
    }  # fmt: skip
    with registry.restored():
        register("trainer", "watched")(Watched)

        class Weights(CheckpointEngine):
            name = "weights"

            def save(self, model: Any) -> None:
                torch.save(model.state_dict(), self.checkpoint_dir / "weights.pt")

        trainer = Watched(get_config(tree | sections))
    trainer.train()
    return trainer


def by_hand(batches: list[torch.Tensor], accumulation: int = 3) -> list[dict[str, torch.Tensor]]:
    """The weights after each step of SGD on the mean over each window, in plain torch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    after = []
    for start in range(0, len(batches), accumulation):
        optimizer.zero_grad()
        window = torch.cat(batches[start : start + accumulation])
        (model(window) - 1).square().mean().backward()
        optimizer.step()
        after.append({k: v.clone() for k, v in model.state_dict().items()})
    return after


def test_AT_23_24_and_27_a_checkpoint_holds_the_step_that_it_is_named_after(tmp_path: Path) -> None:
    """Also what the defects B1 and B4 got wrong: under accumulation, and of the last step."""
    trainer = watched(tmp_path / "run")
    expected = by_hand(trainer.batches)
    for step in (2, 4, 6):
        name = f"step_{step:08}"
        held = load_tree(tmp_path / "run/checkpoints" / name)
        export = torch.load(tmp_path / f"run/exports/weights/{name}/weights.pt", weights_only=True)
        assert held["progress"]["global_step"] == held["schedulers"]["lr_scheduler"]["last_epoch"]
        assert held["progress"]["global_step"] == step
        for key, value in trainer.weights[step - 1].items():
            assert torch.equal(held["models"]["model"][key], value)
            assert torch.equal(export[key], value)
            torch.testing.assert_close(value, expected[step - 1][key], rtol=1e-5, atol=1e-7)
    # The end of training coincides with a trigger: saved once, and nothing besides.
    for folder in ("checkpoints", "exports/weights"):
        assert len(list((tmp_path / "run" / folder).glob("step_*"))) == 3


def test_AT_29_one_engine_resumes_and_others_have_no_key_for_it() -> None:
    paceline = {"type": "paceline", "every_steps": 1}
    assert "checkpoint.1: a run resumes from one engine" in refusal(checkpoint=[paceline, paceline])
    asked = [{"type": "huggingface", "at_end": True, "auto_resume": True}]
    assert "checkpoint.0.auto_resume: there is no such key" in refusal(checkpoint=asked)


def test_AT_35_a_dataset_of_the_hub_in_short() -> None:
    text = "HuggingFaceH4/ultrachat_200k:train[:20]"
    tree = {"trainer": {"type": "sft"}, "data": {"sources": [text, "org/set", "numbers"]}}
    first, second, third = get_config(tree | {"model": {"name_or_path": "x"}}).data.sources
    assert (first.type, first.name_or_path) == ("huggingface", "HuggingFaceH4/ultrachat_200k")
    assert (first.split, third.class_of("data_source")) == ("train_sft[:20]", Numbers)
    assert (second.name_or_path, second.split) == ("org/set", "")
    assert KNOWN[first.name_or_path].columns == {"messages": "messages"}


def test_AT_44_and_45_a_row_a_step_and_validations_apart(tmp_path: Path) -> None:
    """Each validation is a row of its own; how often one is printed is not a setting."""
    trainer = watched(tmp_path / "run", checkpoint=None)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    validations = [row for row in rows if "val/all/loss" in row]
    assert [row["step"] for row in steps] == [row["step"] for row in validations] == [*range(1, 7)]
    assert not any("train/loss" in row for row in validations)
    assert all(row["lr"] == 1e-3 and row["samples"] == 6 * row["step"] for row in steps)
    assert [row["epoch"] for row in steps] == [0, 0, 0, 0, 1, 1]
    numbers = torch.arange(24.0)
    for row, weights in zip(validations, trainer.weights, strict=True):
        line = weights["weight"].item() * numbers + weights["bias"].item()
        assert row["val/all/loss"] == pytest.approx((line - 1).square().mean().item(), rel=1e-5)
    assert "validate_every" in refusal(trainer={"type": "base", "validate_every": 0})


LATER = {
    "47 sequence_parallel_size": ({"trainer": {"sequence_parallel_size": 2}}, "sequence parallel"),
    "48 dpo": ({"trainer": {"type": "dpo"}}, "training on preferences (DPO) does not exist yet"),
    "49 peft_config": (
        {"model": {"peft_config": {"peft_type": "Lora"}}},
        "training adapters (LoRA)",
    ),
    "tiled MLPs": ({"trainer": {"tiled_mlp_compute": True}}, "computing MLPs in tiles"),
    "offload": ({"trainer": {"activation_checkpoint_cpu_offload": True}}, "on the CPU"),
    "ArcticMoE": ({"trainer": {"arctic_moe": True}}, "ArcticMoE"),
    "liger": ({"model": {"type": "liger"}}, "training with Liger's kernels"),
    "snowflake": ({"data": {"sources": [{"type": "snowflake"}]}}, "reading from Snowflake"),
}


@pytest.mark.parametrize("row", LATER)
def test_AT_47_to_49_what_follows_is_refused_by_its_name(row: str) -> None:
    changes, text = LATER[row]
    sections: dict[str, Any] = {
        "trainer": {"type": "sft"},
        "model": {"name_or_path": "x"},
        "data": {"sources": ["numbers"]},
    }
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    with pytest.raises(RecipeError) as caught:
        get_config(sections)
    assert text in str(caught.value)
    assert "does not exist yet." in str(caught.value)


METHODS = ("init", "train", "epoch", "step", "loss", "backward", "evaluate", "checkpoint")
EVENTS = [f"{when}-{method}" for method in METHODS for when in ("pre", "post")]


def test_AT_30_each_callback_runs_once_in_order_and_may_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def note(text: str) -> Callable[[Any], None]:
        return lambda self: seen.append(text)

    class Parent(Base):
        callbacks = [(name, note(name)) for name in EVENTS]

        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

        def pre_loss_callback(self, batch: torch.Tensor) -> torch.Tensor:
            return 0 * batch

    class Child(Parent):
        callbacks = [("pre-loss", note("own list"))]
        shift = 0.0

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(f"batch {float(batch.abs().sum())}")
            return super().loss(batch)

        def post_loss_callback(self, loss: torch.Tensor) -> torch.Tensor:
            self.last = loss
            return 2 * loss

        def pre_backward_callback(self, loss: torch.Tensor) -> None:
            assert torch.equal(loss, 2 * self.last)

    sections = {
        "data": {"sources": [{"type": "numbers"}], "eval_sources": {"near": {"type": "numbers"}}},
        "trainer": {"type": "base", "max_steps": 1, "progress": False, "validate_every": 1,
                    "max_grad_norm": None},
    }  # fmt: skip
    sections["data"]["micro_batch_size"] = 24  # pyright: ignore
    Child(config(**sections)).train()
    assert seen == [
        "pre-init", "post-init", "pre-train", "pre-epoch", "pre-step",
        "pre-loss", "own list", "batch 0.0", "post-loss", "pre-backward", "post-backward",
        "post-step",
        "pre-evaluate", "pre-loss", "own list", "batch 0.0", "post-loss", "post-evaluate",
        "pre-checkpoint", "post-checkpoint", "post-epoch", "post-train",
    ]  # fmt: skip


class Events(Base):
    seen: list[str]

    def post_epoch_callback(self) -> None:
        self.seen = [*getattr(self, "seen", []), "parent"]


def test_AT_32_the_callbacks_of_parent_and_child_both_run() -> None:
    class Parent(Events):
        def epoch(self):
            return None

    parent = Parent(config())  # made before the child is defined, which makes no difference

    class Child(Parent):
        def post_epoch_callback(self) -> None:
            self.seen = [*self.seen, "child"]

    child = Child(config())
    parent.epoch()
    child.epoch()
    assert (parent.seen, child.seen) == (["parent"], ["parent", "child"])


def test_AT_33_an_override_needs_no_return_annotation() -> None:
    class Child(Events):
        def epoch(self):
            pass

        def loss(self, batch):
            return batch

        def post_loss_callback(self, loss):
            return loss + 1

    child = Child(config())
    child.epoch()
    assert (child.seen, child.loss(3)) == (["parent"], 4)


def test_AT_34_an_unknown_event_is_refused_with_the_legal_ones() -> None:
    """When the class is defined, which is earlier than when it is made."""
    with pytest.raises(ConfigError) as caught:

        class Wrong(DataFactory):
            def post_tokenize_callback(self) -> None: ...

    text = str(caught.value)
    assert "Wrong" in text
    assert "'post-tokenize' is no event" in text
    for event in ("init", "load", "process", "split", "create-dataloader"):
        assert f"pre-{event}, post-{event}" in text
