"""`pre` and `post` callbacks stand around the methods of trainers, factories and engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.errors import ConfigError
from paceline.factories import DataFactory, DataSource, FactoryTrainer, ModelFactory
from paceline.factories.around import Around
from paceline.trainer.trainer import Trainer
from small import settings


class Plain(Around):
    """An object with two events, which notes what happens."""

    events_around = {"init": "__init__", "work": "work", "load": "load"}

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.seen: list[Any] = []

    def work(self, left: int, right: int = 5, *more: int, deep: bool = False) -> Any:
        self.seen.append("work")
        return left, right, more, deep

    def load(self) -> str:
        return "loaded"


def noting(name: str) -> Any:
    def callback(self: Any) -> None:
        self.seen.append(name)

    return callback


class Parent(Plain):
    callbacks = [("pre-work", noting("list of the parent")), ("post-work", noting("after"))]

    def pre_work_callback(self) -> None:
        self.seen.append("method of the parent")


class Child(Parent):
    callbacks = [("pre-work", noting("list of the child"))]

    def pre_work_callback(self) -> None:
        self.seen.append("method of the child")


def test_lists_come_before_methods_and_inherited_ones_first() -> None:
    child = Child()
    child.work(1)
    assert child.seen == [
        "list of the parent", "list of the child", "method of the parent", "method of the child",
        "work", "after",
    ]  # fmt: skip
    parent = Parent()  # whatever was defined or made before
    parent.work(1)
    assert parent.seen == ["list of the parent", "method of the parent", "work", "after"]


def test_callbacks_run_once_however_often_super_is_called() -> None:
    class Deep(Child):
        def __init__(self) -> None:
            super().__init__()
            self.seen.append("init")

        def post_init_callback(self) -> None:
            self.seen.append("after init")

        def work(self, left, right=5):
            self.seen.append("deep")
            return super().work(left, right)

    deep = Deep()
    deep.work(1)
    assert deep.seen == [
        "init", "after init",
        "list of the parent", "list of the child", "method of the parent", "method of the child",
        "deep", "work", "after",
    ]  # fmt: skip
    deep.seen.clear()
    with pytest.raises(TypeError):
        deep.work(1, 2, 3, 4)  # pyright: ignore
    deep.work(1)  # an error leaves nothing behind
    assert deep.seen.count("method of the child") == 1


def test_a_pre_callback_replaces_arguments_by_name() -> None:
    class Doubles(Plain):
        def pre_work_callback(self, right, left):
            self.asked = (right, left)
            return 2 * right, 10 * left

    class One(Plain):
        callbacks = [("pre-work", lambda self, deep: not deep), ("pre-init", lambda self, size: 7)]

    made = Doubles()
    assert made.work(1, 2, 3, deep=True) == (10, 4, (3,), True)
    assert made.work(left=1, right=2) == (10, 4, (), False)
    assert made.work(1) == (10, 10, (), False)  # a default is an argument too
    assert made.asked == (5, 1)
    assert One().work(1, 2) == (1, 2, (), True)
    assert One().size == 7


def test_a_post_callback_replaces_the_value_unless_it_returns_none() -> None:
    class Louder(Plain):
        def load(self):  # no annotation is needed anywhere
            return "own"

        callbacks = [("post-load", lambda self, value: value + "!"), ("post-load", noting("seen"))]

        def post_load_callback(self, text):
            self.seen.append(text)
            return text.upper()

    made = Louder()
    assert made.load() == "OWN!"
    assert made.seen == ["seen", "own!"]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"pre_wrk_callback": noting("")},
         r"'pre-wrk' is no event; did you mean 'pre-work'\? Events: pre-init, post-init, pre-work"),
        ({"callbacks": [("post-prepare", noting(""))]}, r"'post-prepare' is no event"),
        ({"callbacks": [("pre-work", 3)]}, r"'pre-work': expected a function, got 3"),
        ({"callbacks": [noting("")]}, r"expected a list of pairs such as \('post-step', function"),
        ({"callbacks": {"pre-work": noting("")}}, r"expected a list of pairs"),
        ({"pre_work_callback": lambda self, lft: 0},
         r"'lft' is no argument of work\(\); it takes left, right, more, deep"),
        ({"pre_load_callback": lambda self, x: 0}, r"'x' is no argument of load\(\), which"),
        ({"pre_work_callback": lambda self, **more: 0}, r"name its arguments, the object first"),
        ({"post_work_callback": lambda self, value, more: 0}, r"expected the object and, if it is"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_callback_is_said_as_its_class_is_defined(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        type("Wrong", (Plain,), attributes)


def test_an_override_without_an_argument_that_an_inherited_callback_asks_for_is_refused() -> None:
    class Asks(Plain):
        def pre_work_callback(self, right):
            return right

    with pytest.raises(ConfigError, match=r"pre_work_callback: 'right' is no argument of work\(\)"):

        class Lacks(Asks):
            def work(self, left):
                return left


def test_too_few_new_values_are_an_error() -> None:
    class Few(Plain):
        def pre_work_callback(self, left, right):
            return left

    with pytest.raises(ConfigError, match="takes left, right: return new values for them in a tup"):
        Few().work(1)


def test_what_has_no_callbacks_is_not_wrapped() -> None:
    class Quiet(FactoryTrainer):
        def loss(self, batch: Any) -> torch.Tensor:
            return batch

    for name in ("train", "epoch", "step", "backward", "evaluate", "checkpoint"):
        assert getattr(Quiet, name) is getattr(Trainer, name)
    assert Quiet.loss is vars(Quiet)["loss"]
    assert not hasattr(Quiet.loss, "__without_callbacks__")
    assert Plain.work is Child.__mro__[2].work
    assert Child.load is Plain.load


EVENTS = ("init", "train", "epoch", "step", "loss", "backward", "evaluate", "checkpoint")


def test_every_event_of_a_trainer_fires_as_often_as_its_method_runs() -> None:
    """5 steps an epoch, 2 epochs, a validation of 5 batches after each."""
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def callback(self: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return callback

    class Counted(FactoryTrainer):
        callbacks = [(f"{when}-{event}", count(f"{when}-{event}"))
                     for event in EVENTS for when in ("pre", "post")]  # fmt: skip

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return (self.model(x) - y).square().mean()

        def post_loss_callback(self, loss: torch.Tensor) -> torch.Tensor:
            return 0 * loss

    given = settings()
    del given["loss_fn"]
    before = given["model"].weight.clone()
    trainer = Counted(**given, val_dataloader=given["train_dataloader"])
    result = trainer.fit()
    expected = {"init": 1, "train": 1, "epoch": 2, "step": 10, "loss": 20, "backward": 10}
    for event, count_of in expected.items():
        assert (counts[f"pre-{event}"], counts[f"post-{event}"]) == (count_of, count_of), event
    assert counts["pre-evaluate"] == counts["post-evaluate"] == 2
    assert result.final_val_loss == 0
    assert torch.equal(before, given["model"].weight)  # the loss was replaced


def test_factories_have_their_events() -> None:
    class Source(DataSource):
        def load(self, config: Any, split: str) -> list[Any]:
            return [1, 2]

        def pre_load_callback(self, split: str) -> str:
            return split.upper()

        def post_load_callback(self, rows: list[Any]) -> list[Any]:
            return [*rows, 3]

    class Data(DataFactory):
        callbacks = [("post-split", lambda self, value: (value[0], [9]))]

        def post_create_dataloader_callback(self, loader: Any) -> Any:
            return list(loader.dataset)

        def load(self, data_sources: Any) -> Any:
            return super().load([Source(self), Source(self)])

        def pre_process_callback(self, dataset: list[int]) -> list[int]:
            return dataset[1:]

    class Model(ModelFactory):
        def create_model(self, model_config: Any) -> Any:
            return torch.nn.Linear(3, 1)

        def post_create_config_callback(self, config: Any) -> str:
            return "another"

        def pre_create_model_callback(self, model_config: Any) -> None:
            self.saw = model_config

    trainer: Any = FactoryTrainer(**settings())
    assert Data(trainer)() == ([2, 3, 1, 2, 3], {"held_out": [9]})
    model = Model(trainer)
    assert isinstance(model(), torch.nn.Linear)
    assert model.saw == "another"
