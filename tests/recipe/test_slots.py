"""A trainer class brings recipe sections of its own, which are checked like the Trainer's."""

from __future__ import annotations

import collections.abc
import sys
import typing
from abc import ABC
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hostile import REACHABLE_COMMANDS

from paceline import Trainer, registry
from paceline.callbacks import LearningRate
from paceline.checkup import preview
from paceline.errors import ConfigError, RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.schema import Schema
from paceline.recipe.targets import Roots, find_target, kind_of
from paceline.trainer.slots import RECIPE_KEYS

CODE = """
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from paceline import Trainer
from paceline.registry import register


class Reward:
    def __init__(self, scale: float = 1.0) -> None:
        Path("built").touch()
        self.scale = scale


class Distance(Reward):
    pass


class Environment:
    pass


class Grid(Environment):
    def __init__(self, size: int, name: str = "grid", reward: Reward | None = None) -> None:
        Path("built").touch()
        self.size, self.name, self.reward = size, name, reward

    def run_identity(self) -> dict:
        return {"size": self.size}


class Believed(type):
    def __subclasscheck__(cls, other) -> bool:
        return True

    __instancecheck__ = __subclasscheck__


class Credulous(metaclass=Believed):
    '''Takes everything for its own.'''


class Stranger:
    def __init__(self) -> None:
        Path("built").touch()


class Points(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int):
        x = torch.full((1,), i / 8)
        return x, 2 * x


@register("model", "policy")
class Policy(nn.Module):
    def __init__(
        self, width: int, head: nn.Module | None = None, blocks: list[nn.Module] = (), options=None
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))
        self.head, self.blocks, self.options = head, nn.ModuleList(blocks), options

    def forward(self, x):
        return self.inner(x)


class Agent(Trainer):
    slots = {"environment": Environment, "rewards": list[Reward]}

    def __init__(self, *, environment: Environment, rewards=(), **settings) -> None:
        super().__init__(**settings)
        self.environment, self.rewards = environment, rewards

    def loss(self, batch):
        scale = sum(reward.scale for reward in self.rewards)
        return scale * super().loss(batch) / self.environment.size


class Careful(Agent):
    slots = {"environment": Grid, "model": Policy}


class Lax(Agent):
    slots = {"belief": Credulous}

    def __init__(self, *, belief=None, **settings) -> None:
        super().__init__(**settings)


class Deaf(Agent):
    def __init__(self, environment, model) -> None:
        super().__init__(environment=environment, model=model)


class Simulator:
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def open_source(self, size, seed, world, stopping):
        raise NotImplementedError


def make_grid() -> Environment:
    return Grid(5)


def make_text() -> Environment:
    return "no environment"


def make_class() -> Environment:
    return Grid


def make_agent(**settings) -> Agent:
    return Agent(**settings)
"""
RECIPE = """\
code: agents.py
trainer:
  _target_: agents.Agent
  epochs: 2
  progress: false
model: {type: policy, width: 4}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
environment:
  _target_: agents.Grid
  size: 3
rewards:
  - {_target_: agents.Distance, scale: 2.0}
  - {_target_: agents.Reward}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: agents.Points}
  batch_size: 4
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for a trainer class with sections of its own, which stands in its `code:`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    (tmp_path / "agents.py").write_text(CODE)
    path = tmp_path / "agents.yaml"
    path.write_text(RECIPE)
    return path


def build(path: Path, *overrides: str, **more: Any) -> Any:
    return build_trainer(load_recipe(path, overrides, **more))


def mistakes(path: Path, *overrides: str, **more: Any) -> list[str]:
    """One line a mistake; nothing was built on the way."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, **more)
    assert not Path("built").exists()
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("a mistake" if len(lines) == 1 else f"{len(lines)} mistakes")
    return [line.strip() for line in lines]


# What a right recipe builds


@pytest.fixture(params=["code", "package"])
def agents(request: pytest.FixtureRequest, recipe: Path, monkeypatch) -> Iterator[tuple[str, ...]]:
    """The class stands in the recipe's own code, or in a package that the user trusts."""
    if request.param == "code":
        yield ()
        return
    (recipe.parent / "installed").mkdir()
    (recipe.parent / "agents.py").rename(recipe.parent / "installed" / "agents.py")
    monkeypatch.syspath_prepend(recipe.parent / "installed")
    recipe.write_text(RECIPE.removeprefix("code: agents.py\n"))
    yield ("agents",)
    sys.modules.pop("agents", None)


def test_a_recipe_fills_the_slots_of_a_class_and_its_run_trains(recipe: Path, agents):
    """Given a class of the user's own with two slots, when its recipe is built, then both
    components reach its constructor, and the run trains with them."""
    trainer = build(recipe, trust=agents)
    assert (type(trainer.environment).__name__, trainer.environment.size) == ("Grid", 3)
    assert [reward.scale for reward in trainer.rewards] == [2.0, 1.0]
    assert trainer.train(seed=0).complete


def test_a_slot_is_filled_by_name_by_a_function_or_not_at_all(recipe: Path):
    made = "+environment={_target_: agents.make_grid}"
    trainer = build(recipe, "~environment", made, "~rewards")
    assert (trainer.environment.size, list(trainer.rewards)) == (5, [])
    for named, count in (("{near: {_target_: agents.Reward}, far: null}", 1), ("{far: null}", 0)):
        rewards = build(recipe, "~rewards", f"+rewards={named}").rewards
        assert (type(rewards), len(rewards)) == (list, count)


def test_a_function_that_makes_the_trainer_has_the_sections_of_what_it_returns(recipe: Path):
    assert build(recipe, "trainer._target_=agents.make_agent").environment.size == 3


def test_a_training_source_of_ones_own_fills_the_slot_of_the_loader(recipe: Path):
    """Given an object that makes sources, when the recipe names it, then its schedule knows the
    run's length from `max_steps`; as a validation loader it is refused."""
    node = "{_target_: agents.Simulator, dim: 2}"
    changes = ("~train_dataloader", f"+train_dataloader={node}", "+trainer.max_steps=7")
    trainer = build(recipe, *changes, "+lr_scheduler={type: warmup_cosine}")
    assert type(trainer.train_dataloader).__name__ == "Simulator"
    assert trainer.lr_scheduler.total_steps == 7
    Path("built").unlink()
    [line] = mistakes(recipe, f"+val_dataloader={node}")
    assert "'agents.Simulator' is not a dataloader (torch.utils.data.DataLoader)" in line


def test_what_fills_a_slot_draws_nothing_before_the_model_has(recipe: Path):
    """Given the same seed, when a trainer takes further components, then its weights are those of
    one that takes none."""
    plain = build(recipe, "trainer._target_=paceline.Trainer", "~environment", "~rewards")
    weights = [build(recipe).model.inner[0].weight, plain.model.inner[0].weight]
    assert torch.equal(*weights)


# Mistakes


def test_all_mistakes_in_own_sections_are_told_at_once_with_line_and_nearest_name(recipe: Path):
    recipe.write_text(
        RECIPE.replace("environment:", "enviroment:")
        .replace("agents.Distance, scale", "agents.Distance, scael")
        .replace("agents.Reward}", "agents.Stranger}")
    )
    assert mistakes(recipe, "optimizer.lrr=1") == [
        f"{recipe}:9: enviroment: there is no such key; did you mean 'environment'?",
        "override 'optimizer.lrr=1': optimizer.lrr: SGD has no such argument; did you mean 'lr'?",
        f"{recipe}:13: rewards.0.scael: Distance has no such argument; did you mean 'scale'?",
        f"{recipe}:14: rewards.1._target_: 'agents.Stranger' is not a Reward (agents.Reward).",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+environment.siez=3", "environment.siez: Grid has no such argument; did you mean 'size'"),
        ("environment.size=big", "environment.size: expected integer, got 'big'"),
        ("~environment.size", "agents.yaml:9: environment: Grid needs the argument 'size'."),
        ("~environment", "environment: Agent has no default for it: a recipe needs `environment:`"),
        ("environment=5", "environment: expected a mapping with `_target_:`, got 5"),
        ("rewards=5", "rewards: expected a list or a mapping of names, got 5"),
        ("rewards=[{type: near}]", "rewards.0.type: no Reward has a registered name; give its"),
        ("environment._target_=agents.Gird", "'agents' has no 'Gird'; did you mean 'Grid'?"),
        ("+trainer.rewards=[]", "trainer.rewards: is a key of the recipe's top level: `rewards:`"),
        ("+teacher={}", "teacher: there is no such key."),
        ("trainer._target_=paceline.Trainer", "agents.yaml:9: environment: there is no such key"),
    ],
)
def test_one_mistake_in_an_own_section_is_told_in_plain_words(
    recipe: Path, override: str, expected: str
):
    assert expected in mistakes(recipe, override)[0]


def test_the_sections_of_a_class_that_is_not_found_are_no_mistakes(recipe: Path):
    recipe.write_text(RECIPE.replace("agents.Agent", "agents.Agnet") + "callback: []\n")
    found = [line.partition(": ")[2] for line in mistakes(recipe)]
    assert found == [
        "trainer._target_: 'agents' has no 'Agnet'; did you mean 'Agent'?",
        "callback: there is no such key; did you mean 'callbacks'?",
    ]


def test_a_section_that_the_constructor_does_not_take_is_a_mistake(recipe: Path):
    """Given a constructor that names two slots and hands nothing on, then what the recipe gives for
    the others would be built for nobody."""
    lines = mistakes(recipe, "trainer={_target_: agents.Deaf, epochs: null, progress: null}")
    told = [line for line in lines if "to receive it" in line]
    assert [line.split(": ")[1] for line in told] == [
        "train_dataloader", "loss_fn", "optimizer", "rewards"
    ]  # fmt: skip


def test_a_subclass_may_narrow_a_slot(recipe: Path):
    """Given a class whose model has to be a Policy, then one of torch's is of another kind."""
    [line] = mistakes(
        recipe,
        "trainer._target_=agents.Careful",
        "model={_target_: torch.nn.Linear, in_features: 1, out_features: 1}",
    )
    assert line.endswith("model._target_: 'torch.nn.Linear' is not a Policy (agents.Policy).")
    assert type(build(recipe, "trainer._target_=agents.Careful").model).__name__ == "Policy"


# What a class may declare


def declare(constructor: Callable[..., None] | None = None, **slots: Any) -> type[Trainer]:
    body: dict[str, Any] = {"slots": slots}
    if constructor is not None:
        body["__init__"] = constructor
    return type("Own", (Trainer,), body)


def takes_a_judge(self: Any, *, judge: Any, **settings: Any) -> None:
    Trainer.__init__(self, **settings)


@pytest.mark.parametrize(
    "anything",
    [
        object,
        type,
        dict,
        typing.Any,
        typing.Callable,
        collections.abc.Callable,
        collections.abc.Callable[[int], int],
        collections.abc.Hashable,
        typing.Generic,
        ABC,
        torch.nn.Module | torch.optim.Optimizer,
        list,
        list[object],
        list[Callable],
        "torch.nn.Module",
        None,
    ],
)
def test_what_anything_fits_is_no_kind_of_a_slot(anything: Any):
    with pytest.raises(ConfigError, match=r"'judge': .* is not a base class of components"):
        declare(takes_a_judge, judge=anything)


@pytest.mark.parametrize(
    "name",
    ["seed", "run", "tune", "epochs", "run_dir", "step", "plan", "source", "_judge", "a judge"],
)
def test_the_name_of_a_slot_is_not_taken(name: str):
    with pytest.raises(ConfigError, match=rf"the slots of Own:\n  '{name}': "):
        declare(**{name: torch.nn.Module})


def test_every_key_of_a_recipe_is_taken():
    assert set(Schema.model_fields) <= set(RECIPE_KEYS)


def test_all_slots_that_cannot_be_are_told_as_the_class_is_defined():
    with pytest.raises(ConfigError) as caught:
        declare(model=torch.optim.Optimizer, callbacks=LearningRate, judge=torch.nn.Module)
    assert str(caught.value).splitlines() == [
        "the slots of Own:",
        "  'model': Optimizer does not narrow the inherited slot, which takes Module.",
        "  'callbacks': LearningRate does not narrow the inherited slot, which takes a list of "
        "Callback.",
        "  'judge': Own.__init__ has no argument of this name to receive the component.",
    ]
    with pytest.raises(ConfigError, match=r"Own\.slots: expected a dictionary"):
        type("Own", (Trainer,), {"slots": ["judge"]})


def test_a_slot_that_is_added_later_is_looked_at_all_the_same(recipe: Path, monkeypatch):
    cls = load_recipe(recipe).trainer.target
    monkeypatch.setitem(vars(cls)["slots"], "environment", object)
    with pytest.raises(ConfigError, match="is not a base class of components"):
        load_recipe(recipe)


# Registered names


def test_a_registered_name_works_wherever_an_annotation_says_the_kind(recipe: Path):
    """Given an argument, a list's item and a positional argument that are annotated as modules,
    when the recipe names a registered model, then it is built; `type` elsewhere is only data."""
    policy = "{type: policy, width: 2}"
    trainer = build(
        recipe,
        f"+model.head={policy}",
        f"+model.blocks=[{policy}, {{_target_: torch.nn.Tanh}}]",
        "+model.options={type: policy}",
    )
    kinds = [type(m).__name__ for m in (trainer.model.head, *trainer.model.blocks)]
    assert kinds == ["Policy", "Policy", "Tanh"]
    assert trainer.model.options == {"type": "policy"}
    node = f"{{type: policy, _args_: [4, {policy}]}}"
    assert type(build(recipe, "~model", f"+model={node}").model.head).__name__ == "Policy"


def test_mistakes_in_nested_components_are_told_with_the_rest(recipe: Path):
    lines = mistakes(
        recipe,
        "+model.head={type: polciy}",
        "+model.blocks=[{type: policy, wdith: 2, width: 2}]",
        "+environment.reward={_target_: agents.Stranger}",
    )
    assert [line.partition("': ")[2] for line in lines] == [
        "model.head.type: no model is registered as 'polciy'; did you mean 'policy'? Known: policy",
        "model.blocks.0.wdith: Policy has no such argument; did you mean 'width'?",
        "environment.reward._target_: 'agents.Stranger' is not a Reward (agents.Reward).",
    ]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: registry.register("calback", "mine"),
        lambda: registry.lookup("calback", "progress"),
        lambda: registry.names("calback"),
    ],
)
def test_there_are_no_kinds_beside_those_of_the_table(ask: Callable[[], Any]):
    with pytest.raises(
        ConfigError, match=r"as 'calback'; did you mean 'callback'\? Kinds: trainer"
    ):
        ask()


# What a stranger's recipe may build


def test_no_command_fills_an_own_slot(recipe: Path):
    environment = load_recipe(recipe).parts["environment"].kind
    for target in REACHABLE_COMMANDS:
        with pytest.raises(RecipeError):
            find_target(target, environment, Roots("agents", ["subprocess", "os", "builtins"]))


@pytest.mark.parametrize(
    "target",
    ["agents.Stranger", "agents.Reward", "agents.Agent", "subprocess.Popen", "paceline.Trainer"],
)
@pytest.mark.parametrize(
    "place", ["environment", "+environment.reward", "rewards.0", "+belief", "+rewards.near"]
)
def test_what_is_not_of_the_slots_kind_is_never_constructed(recipe: Path, target: str, place: str):
    """Given a slot whose base class takes everything for its own (belief), or any other, when a
    recipe names a class that does not derive from it, then it is refused and not constructed."""
    if target == "agents.Reward" and "reward" in place:
        target = "agents.Environment"
    changes = ["trainer._target_=agents.Lax", f"{place}={{_target_: {target}}}"]
    if place == "rewards.0":
        changes[1] = f"rewards=[{{_target_: {target}}}]"
    elif place == "+rewards.near":
        changes[1:] = ["~rewards", f"+rewards.near={{_target_: {target}}}"]
    assert f"'{target}' is not a" in mistakes(recipe, *changes, trust=["subprocess"])[0]


@pytest.mark.parametrize(("name", "made"), [("make_text", "a str"), ("make_class", "a type")])
def test_a_function_that_makes_something_else_fills_no_slot(recipe: Path, name: str, made: str):
    with pytest.raises(RecipeError, match=f"returned {made}, which is not an Environment"):
        build(recipe, "~environment", f"+environment={{_target_: agents.{name}}}")


def test_a_kind_is_narrower_than_the_known_one_above_it():
    """Given a slot for one of torch's classes, then its torch subclasses have the known homes."""
    assert kind_of("critic", torch.nn.Module).registry == "model"
    critic = kind_of("critic", torch.nn.Sequential)
    assert find_target("torch.nn.Sequential", critic, Roots()) is torch.nn.Sequential
    with pytest.raises(
        RecipeError, match=r"is not a Sequential \(torch\.nn\.modules\.container\.S"
    ):
        find_target("torch.nn.Linear", critic, Roots())


# What follows from the slots elsewhere


def test_a_run_goes_on_only_with_the_components_it_began_with(recipe: Path):
    build(recipe, "trainer.epochs=1").train(seed=0)
    other = (
        "environment.size=4",
        "+environment.name=moved",
        "rewards.1={_target_: agents.Distance}",
    )
    for change in other:
        key = change.partition("=")[0].lstrip("+")
        changes = [change]
        if key == "rewards.1":
            one = "{_target_: agents.Distance, scale: 2.0}"
            changes = [f"rewards=[{one},{{_target_: agents.Distance}}]"]
        with pytest.raises(ConfigError, match=key):
            build(recipe, *changes).train(seed=0)
    assert build(recipe).train(seed=0).complete


def test_a_preview_names_what_fills_the_slots(recipe: Path):
    shown = preview(load_recipe(recipe)).components
    assert shown["environment"] == "agents.Grid"
    assert (shown["rewards.0"], shown["rewards.1"]) == ("agents.Distance", "agents.Reward")
