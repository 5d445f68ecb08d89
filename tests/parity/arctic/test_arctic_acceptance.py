"""ArcticTraining at home: acceptance rows on trainers with factories, one test a row.

Where Paceline differs on purpose the test says what it does instead: `trainer.type` names the
trainer, epochs stay 1 by default, and a micro-batch is a loader's batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union

import pytest
import torch
import yaml

from builders import code_forgotten
from paceline import registry
from paceline.errors import ConfigError, RecipeError
from paceline.factories import (
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
from helper import scaled
from paceline.factories import FactoryTrainer

class Mine(FactoryTrainer):
    name = "my"

    def loss(self, batch):
        return scaled(self.model(batch).square().mean())
"""


def test_AT_02_a_trainer_beside_the_recipe_needs_no_decorator(tmp_path: Path) -> None:
    """`code:` is written out; nothing is executed because it happens to be called train.py."""
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "helper.py").write_text("def scaled(loss):\n    return 3 * loss\n")
    tree = {
        "code": "train.py",
        "trainer": {"type": "my", "max_steps": 2, "progress": False},
        "model": {"type": "narrow"},
        "data": {"sources": [{"type": "numbers"}]},
        "run": {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
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
