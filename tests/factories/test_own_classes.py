"""A class with a name is known to recipes; what is wrong with it is said when it is defined."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Union

import pytest
import torch
from typer.testing import CliRunner

from paceline import registry
from paceline.cli.app import app
from paceline.errors import ConfigError
from paceline.factories import (
    CheckpointEngine,
    Config,
    DataFactory,
    DataSource,
    FactoryTrainer,
    ModelFactory,
    OptimizerFactory,
    TrainerConfig,
)
from paceline.factories.optimizers import AdamWFactory, SGDFactory
from paceline.lm.data.sources import RowSource
from paceline.trainer.slots import slots_of


class A(ModelFactory):
    def create_model(self, model_config: Any) -> torch.nn.Module:
        return torch.nn.Linear(3, 1)


class B(A):
    pass


class Settings(TrainerConfig):
    temperature: float = 1.0


class Lossy(FactoryTrainer):
    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(batch).mean()


def choices(cls: type, section: str) -> tuple[type, ...]:
    return slots_of(cls)[section].choices


def test_a_class_with_a_name_is_registered_and_one_without_is_abstract() -> None:
    before = registry.names("trainer")

    class Named(Lossy):
        name = "named"

    class Heir(Named):  # it inherits the name, which is not its own
        pass

    class Half(FactoryTrainer):  # no loss yet
        pass

    class Made(A):
        name = "made"

    assert registry.lookup("trainer", "named") is Named
    assert registry.lookup("model_factory", "made") is Made
    assert registry.names("trainer") == sorted([*before, "named"])


def test_parts_are_given_as_classes_lists_unions_and_texts() -> None:
    class AsAttributes(Lossy):
        config_type = Settings
        model_factory_type = [A, B]
        optimizer_factory_type = SGDFactory

    class AsText(Lossy):  # as all annotations are in this module
        config: Settings
        model_factory: A | B
        optimizer_factory: SGDFactory | None

    class OldUnion(Lossy):
        config: Settings
        model_factory: Union[A, B]  # noqa: UP007
        optimizer_factory: list[SGDFactory]

    plain = type(
        "Plain", (Lossy,), {"__annotations__": {"config": Settings, "model_factory": A | B,
                                                "optimizer_factory": SGDFactory | None}},
    )  # fmt: skip
    for cls in (AsAttributes, AsText, OldUnion, plain):
        assert cls.config_type is Settings
        assert choices(cls, "model") == (A, B)
        assert choices(cls, "optimizer") == (SGDFactory,)
        assert choices(cls, "data") == (DataFactory,)  # inherited

    class Narrower(AsAttributes):
        model_factory: B

    assert choices(Narrower, "model") == (B,)
    assert choices(Lossy, "model") == ()  # takes any
    assert choices(Lossy, "optimizer") == (AdamWFactory, SGDFactory)


def test_mix_ins_stand_in_any_order() -> None:
    class WithLoss:
        def loss(self, batch: Any) -> torch.Tensor:
            return batch

    class Before(WithLoss, FactoryTrainer):
        name = "before"
        model_factory_type = A

    class Size:
        size = 3

    class After(Before, Size):
        name = "after"

    assert registry.lookup("trainer", "before") is Before
    assert registry.lookup("trainer", "after") is After
    assert choices(After, "model") == (A,)


def test_all_mistakes_of_a_trainer_class_are_said_at_once_with_their_cure() -> None:
    class Taken(Lossy):
        name = "taken"

    with pytest.raises(ConfigError) as caught:

        class Wrong(FactoryTrainer):
            name = "taken"
            config_type = dict  # pyright: ignore
            model_factory_type = [A, DataFactory]
            optimizer_factory: Config

            def step(self, batch: Any) -> None: ...

            def checkpoint(self, reasons: Any, best: Any, more: Any) -> None: ...

            def pre_stp_callback(self) -> None: ...

            def pre_loss_callback(self, bach: Any) -> None: ...

    head, *lines = str(caught.value).splitlines()
    assert head.startswith("the class test_all_mistakes")
    assert "Wrong" in head
    expected = [
        ("config_type = dict", "derives from TrainerConfig"),
        ("model_factory_type = A, DataFactory", "DataFactory is no ModelFactory"),
        ("optimizer_factory_type = Config", "Config is no OptimizerFactory"),
        ("it has no loss", "define loss(self, batch)"),
        ("step(self, batch)", "step(self, window)"),
        ("checkpoint(", "give further ones a default"),
        ("'pre-stp' is no event; did you mean 'pre-step'?", "post-checkpoint"),
        ("pre_loss_callback: 'bach' is no argument of loss()", "it takes batch"),
        ("name = 'taken' is taken by", "Taken; choose another"),
    ]
    assert len(lines) == len(expected)
    for start, cure in expected:
        [line] = [one for one in lines if start in one]
        assert cure in line
    assert registry.lookup("trainer", "taken") is Taken


def test_a_refused_class_is_not_registered() -> None:
    with pytest.raises(ConfigError, match="'post-los' is no event"):

        class Wrong(Lossy):
            name = "wrong"

            def post_los_callback(self) -> None: ...

    assert "wrong" not in registry.names("trainer")


def test_all_mistakes_of_a_factory_and_an_engine_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:

        class Wrong(OptimizerFactory):
            name = 3
            config: int

            def create_optimizer(self, model: Any) -> Any: ...

    text = str(caught.value)
    assert "name = 3: expected a text" in text
    assert "config_type = int: expected a class that derives from Config." in text
    assert "it is called as create_optimizer(self, model: 'Any', optimizer_config: 'Any')" in text
    with pytest.raises(ConfigError) as caught:

        class Saves(CheckpointEngine):
            name = "nothing"
            config_type = Config

    assert "derives from CheckpointEngineConfig" in str(caught.value)
    assert "define save(self, model)" in str(caught.value)


def test_further_parameters_with_defaults_are_fine() -> None:
    class More(Lossy):
        name = "more"

        def loss(self, batch: Any, smoothing: float = 0.0, *rest: Any, **more: Any) -> torch.Tensor:
            return batch

    class Renamed(A):
        name = "renamed"

        def create_model(self, made_from: Any, deep: bool = False) -> Any:
            return made_from

    assert registry.lookup("trainer", "more") is More


OWN = """
import torch
from paceline.factories import Config, ModelFactory

class OwnConfig(Config):
    width: int = {width}

class Own(ModelFactory):
    name = "own"
    config: OwnConfig

    def create_model(self, model_config):
        return torch.nn.Linear(1, self.config.width)
"""


def test_a_reloaded_module_replaces_itself_and_another_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("first_owner", "second_owner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(OWN.format(width=1))
    first = importlib.import_module("first_owner")
    (tmp_path / "first_owner.py").write_text(OWN.format(width=2))
    importlib.reload(first)
    assert registry.lookup("model_factory", "own") is first.Own
    assert first.Own.config_type().width == 2
    with pytest.raises(ConfigError, match=r"'own' is taken by first_owner\.Own"):
        importlib.import_module("second_owner")
    for name in ("first_owner", "second_owner"):
        sys.modules.pop(name, None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package in a folder of its own, as if it were installed, with an entry point."""

    def install(module: str, text: str) -> None:
        folder = tmp_path / "site"
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(text))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[paceline]\nmine = {module}\n")
        monkeypatch.syspath_prepend(folder)

    monkeypatch.setattr(registry, "_of_packages", {})
    registry._import_packages.cache_clear()
    yield install
    registry._import_packages.cache_clear()
    for name in ("installed_one", "installed_broken"):
        sys.modules.pop(name, None)


def test_an_installed_package_adds_names(installed: Any) -> None:
    installed("installed_one", OWN.format(width=3))
    assert "own" in registry.names("model_factory")
    assert registry.lookup("model_factory", "own").__module__ == "installed_one"
    shown = CliRunner().invoke(app, ["list", "model_factory"])
    assert re.search(r"^  own +installed_one\.Own$", shown.output, re.MULTILINE)


def test_an_installed_package_that_cannot_be_imported_is_named(installed: Any) -> None:
    installed("installed_broken", "raise ValueError('no luck')")
    with pytest.raises(ConfigError, match=r"'mine' of an installed package, 'installed_broken'"):
        registry.names("callback")
    assert registry.lookup("optimizer_factory", "sgd") is SGDFactory  # what ships needs no package


def test_the_list_shows_kinds_names_and_where_each_is(recipe: Any) -> None:
    path = recipe()
    run = CliRunner().invoke
    shown = run(app, ["list", "scheduler_factory"])
    assert shown.output.splitlines()[1].split() == [
        "constant", "paceline.factories.schedules.ConstantFactory",
    ]  # fmt: skip
    assert run(app, ["list", "dataset"]).output == "no dataset has a registered name\n"
    both = run(app, ["list", "--recipe", str(path)]).output
    shown = [line.split() for line in both.splitlines()]
    assert ["mine", "mine.Mine", f"({path.parent / 'mine.py'})"] in shown
    assert "dataset:" not in both  # a kind without names
    wrong = run(app, ["list", "model_factry"])
    assert wrong.exit_code != 0
    assert "did you mean 'model_factory'" in str(wrong.exception) + wrong.output


def test_a_config_made_in_python_is_checked_too() -> None:
    kind: Any = AdamWFactory.config_type
    assert kind().lr == 5e-4
    with pytest.raises(ValueError, match="greater than 0"):
        kind(lr=-1)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (ModelFactory, "it has no create_model: define create_model(self, model_config)."),
        (DataSource, "it has no load: define load(self, config, split)."),
        (RowSource, "it has no read: define read(self, config, split)."),
        (CheckpointEngine, "it has no save: define save(self, model)."),
    ],
)
def test_a_class_without_what_its_kind_must_do_is_refused_as_it_is_defined(
    base: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        type("Lacking", (base,), {"name": "lacking"})
    type("Abstract", (base,), {})  # without a name it may leave that to others


@pytest.mark.parametrize("fused", [True, None])
def test_a_recipe_may_ask_for_the_fused_kernel_of_adamw(fused: bool | None) -> None:
    kind: Any = AdamWFactory.config_type
    trainer: Any = None
    made = AdamWFactory(trainer).create_optimizer(torch.nn.Linear(2, 1), kind(fused=fused))
    assert [group["fused"] for group in made.param_groups] == [fused, fused]
