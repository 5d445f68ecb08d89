"""What hides a command behind the recipe's own code, a trusted package, or a lie, is refused too.

Each attempt would leave a file behind, so that what ran cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import RecipeError
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.targets import KINDS, Roots, find_target

Write = Callable[..., Path]
TOUCH = {"_args_": ["touch owned"]}

# Names in a module of the user's own that lead out of it, or are not what they say.
SNEAKY = """
import builtins, functools, importlib, os, subprocess
import os as renamed
import os.path as nested
from os import system, popen
from subprocess import Popen as Net
import torch
from torch import nn
from torch.hub import load

shout = lambda *a, **k: open("owned", "w")
touch = functools.partial(os.system, "touch owned")
lib = importlib


class Liar(nn.Module):
    def __init__(self, *a, **k):
        super().__init__()
        open("owned", "w").close()

    def __init_subclass__(cls):
        pass

    @staticmethod
    def command(text):
        os.system(text)

    @classmethod
    def made(cls, *a):
        return cls()

    def method(self):
        open("owned", "w").close()


class Poser:
    __module__ = "torch.nn.modules.linear"
    __qualname__ = "Linear"

    def __init__(self, *a, **k):
        open("owned", "w").close()


class Meta(type(nn.Module)):
    def __call__(cls, *a, **k):
        open("owned", "w").close()
        return super().__call__(*a, **k)


def wrong_kind(*a, **k):
    return 3


def disguised(*a, **k):
    open("owned", "w").close()


disguised.__module__ = "os"


class Lazy:
    def __getattr__(self, name):
        open("owned", "w").close()
        return os.system


lazy = Lazy()
"""

REFUSED_ANYWHERE = [
    "sneaky.os.system",
    "sneaky.renamed.system",
    "sneaky.nested.os.system",
    "sneaky.system",
    "sneaky.popen",
    "sneaky.Net",
    "sneaky.subprocess.run",
    "sneaky.builtins.eval",
    "sneaky.builtins.exec",
    "sneaky.importlib.import_module",
    "sneaky.lib.import_module",
    "sneaky.load",
    "sneaky.torch.hub.load",
    "sneaky.torch.load",
    "sneaky.torch.nn.Linear",
    "sneaky.nn.Linear",
    "sneaky.shout",
    "sneaky.touch",
    "sneaky.disguised",
    "sneaky.Poser",
    "sneaky.lazy.system",
    "sneaky.lazy.__class__",
    "sneaky.Liar.__init__",
    "sneaky.Liar.__init_subclass__",
    "sneaky.__builtins__.eval",
    "sneaky.Liar.method.__globals__",
    "sneaky.nothing",
]


@pytest.fixture
def sneaky(recipe: Write, tmp_path: Path) -> Iterator[Roots]:
    """The recipe's own code is `sneaky.py`; in the end nothing has left a file."""
    path = recipe()
    (tmp_path / "sneaky.py").write_text(SNEAKY)
    path.write_text("code: sneaky.py\n")
    with pytest.raises(RecipeError):  # which has nothing else in it
        load_recipe(path)
    yield Roots("sneaky")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("target", REFUSED_ANYWHERE)
def test_the_users_own_module_is_no_door_to_what_it_has_imported(sneaky: Roots, target: str):
    for kind in KINDS.values():
        with pytest.raises(RecipeError):
            find_target(target, kind, sneaky)


@pytest.mark.parametrize("target", ["sneaky.wrong_kind", "sneaky.Liar.command"])
@pytest.mark.parametrize("kind", ["trainer", "optimizer"])
def test_functions_that_may_be_called_are_of_the_users_own(sneaky: Roots, target: str, kind: str):
    """A function of the user's own code is a factory; what it must not be is somebody else's."""
    found = find_target(target, KINDS[kind], sneaky)
    assert found.__module__ == "sneaky"


SLOTS = ["model", "optimizer", "lr_scheduler", "loss_fn", "train_dataloader", "val_dataloader"]
WAYS = ["plain", "partial", "interpolated", "environment", "nested"]


@pytest.mark.parametrize(
    ("slot", "how"), [*zip(SLOTS, ["plain"] * 6, strict=True), *(("loss_fn", w) for w in WAYS[1:])]
)
def test_however_a_command_is_brought_in_it_is_refused(
    recipe: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slot: str, how: str
):
    """Given a command as a target, written out, put together, looked up or hidden in an argument,
    when the recipe is read and built, then it is refused and has not run."""
    monkeypatch.setenv("TARGET", "torch.os.system")
    command: dict[str, Any] = {"_target_": "torch.os.system", **TOUCH}
    node: Any = {
        "plain": command,
        "partial": command | {"_partial_": True, "_convert_": "all", "_recursive_": False},
        "interpolated": command | {"_target_": "${run.name}.os.${run.project}"},
        "environment": command | {"_target_": "${oc.env:TARGET}"},
        "nested": {
            "_target_": "toy.Net",
            "width": [{"deep": command}],
            "depth": {"a": {"b": [command]}},
        },
    }[how]
    path = recipe(run={"name": "torch", "project": "system"}, **{slot: node})
    with pytest.raises(RecipeError, match=r"'torch\.os' is the module 'os', which belongs"):
        build_trainer(load_recipe(path))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("key", ["_partial_", "_convert_", "_recursive_", "_mode_", "__class__"])
def test_hydras_keys_of_instantiation_do_not_exist(recipe: Write, key: str):
    with pytest.raises(RecipeError, match=rf"model\.{key}: Hydra only composes recipes"):
        load_recipe(recipe(model={"_target_": "toy.Net", "width": 3, key: True}))


@pytest.mark.parametrize("target", [3, None, [], {"a": 1}, True, "", ".", "torch", "torch.", "..a"])
def test_a_target_that_is_no_dotted_path_is_refused(recipe: Write, target: object):
    with pytest.raises(RecipeError, match=r"model\._target_: "):
        load_recipe(recipe(model={"_target_": target, "width": 1}))


def test_positional_arguments_reach_no_argument_that_the_builder_gives(recipe: Write):
    path = recipe(optimizer={"_target_": "torch.optim.AdamW", "_args_": [[1, 2]], "lr": 0.1})
    with pytest.raises(RecipeError, match=r"optimizer\._args_: they reach 'params'"):
        load_recipe(path)


# --trust


def test_trust_opens_one_package_and_only_for_kinds_that_fit(tmp_path: Path, monkeypatch):
    package = tmp_path / "kindly"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nfrom torch import nn, optim\n"
        "class Net(nn.Module): pass\nclass Sgd(optim.SGD): pass\n"
    )
    (tmp_path / "other.py").write_text("open('owned', 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trusted = Roots(trusted=["kindly"])
    assert find_target("kindly.Net", KINDS["model"], trusted).__name__ == "Net"
    for target, kind in (
        ("kindly.Net", "optimizer"),
        ("kindly.Sgd", "model"),
        ("kindly.Net", "callback"),
        ("kindly.os.system", "model"),
        ("kindly.nn.Linear", "model"),
        ("kindly.optim.SGD", "optimizer"),
        ("other.anything", "model"),
        ("kindlyother.Net", "model"),
    ):
        with pytest.raises(RecipeError):
            find_target(target, KINDS[kind], trusted)
    assert not Path("owned").exists()
    with pytest.raises(RecipeError, match="--trust kindly"):
        find_target("kindly.Net", KINDS["model"], Roots())


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "subprocess.run", "subprocess.Popen", "importlib.import_module"],
)
@pytest.mark.parametrize("slot", ["model", "optimizer", "train_dataloader", "callbacks"])
def test_trust_in_a_package_makes_no_model_of_its_commands(recipe: Write, target: str, slot: str):
    """Given trust in the standard library itself, then its commands still fill no slot."""
    node: Any = {"_target_": target, **TOUCH}
    with pytest.raises(RecipeError, match=r"is not|another name|not annotated"):
        load_recipe(
            recipe(**{slot: [node] if slot == "callbacks" else node}), trust=[target.split(".")[0]]
        )
    assert not Path("owned").exists()
