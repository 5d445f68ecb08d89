"""P9 Wrong before expensive: every mistake of a recipe at once, each with its place and what is
right, before anything is built."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import Paceline
from paceline.errors import RecipeError
from paceline.recipe import load_recipe
from paceline.testing import Ranks

CODE = """
from pathlib import Path
from torch import nn
from torch.utils.data import Dataset

class Net(nn.Module):
    def __init__(self, width: int, blocks: list[nn.Module] | None = None, sizes: list[int] = ()):
        Path("built").touch()

class Points(Dataset):
    def __init__(self, n: int = 8):
        Path("built").touch()
    def __getitem__(self, i): ...
"""
RECIPE = """\
defaults: [{optimizer: adam}, _self_]
code: points.py
trainer:
  epochs: 2
  progress: false
model:
  _target_: points.Net
  width: 4
loss_fn: {_target_: torch.nn.MSELoss}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: points.Points, n: 8}
  batch_size: 4
"""
ADAM = "_target_: torch.optim.AdamW\nlr: 1e-3\n"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working folder holds the recipe and its code, which is forgotten afterwards."""
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "adam.yaml").write_text(ADAM)
    (folder / "points.py").write_text(CODE)
    (folder / "r.yaml").write_text(RECIPE)
    path = list(sys.path)
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path[:] = path
        sys.modules.pop("points", None)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[None]:
    with inside(tmp_path):
        yield


def mistakes(*overrides: str) -> list[str]:
    """One line a mistake; nothing was built on the way."""
    text = ""
    try:
        load_recipe("r.yaml", overrides)
    except RecipeError as error:
        text = str(error)
    assert not Path("built").exists()
    assert text, "no mistake was found"
    head, *lines = text.splitlines()
    assert head.startswith(f"{len(lines)} mistakes in" if len(lines) > 1 else "a mistake in")
    return [line.strip() for line in lines]


# One of each kind: (what is done to the recipe, its place, what the answer says).
FILE = {
    "a misspelt key of the top level": (("code:", "coed: 1\ncode:"), 2, "did you mean 'code'?"),
    "a misspelt setting": (("  epochs: 2", "  epochs: 2\n  pression: x"), 5, "'precision'?"),
    "a misspelt argument": (("width: 4", "width: 4\n  wdith: 4"), 9, "did you mean 'width'?"),
    "a wrong type": (("width: 4", "width: four"), 8, "expected integer, got 'four'"),
    "a wrong type in a list": (("width: 4", "width: 4\n  sizes: [1, x]"), 9, "expected integer"),
    "a wrong type deep inside": (("n: 8", "n: many"), 12, "expected integer, got 'many'"),
    "a missing argument": (("  width: 4", ""), 6, "Net needs the argument 'width'"),
    "an unknown target": (("points.Net", "points.Nett"), 7, "did you mean 'Net'?"),
    "a target of another kind": (("torch.nn.MSELoss", "torch.optim.SGD"), 9, "is not a loss_fn"),
    "a key that stands twice": (("epochs: 2", "epochs: 2\n  epochs: 3"), 5, "in line 4 already"),
    "nothing to end the run": (("  epochs: 2\n", ""), 3, "say where the run ends"),
    "an epoch too few": (("epochs: 2", "epochs: 0"), 4, "expected at least 1, got 0"),
    "patience with nothing": (("epochs: 2", "epochs: 2\n  early_stop: 3"), 5, "metric_monitor="),
    "a batch that cannot be made": (
        ("epochs: 2", "epochs: 2\n  global_batch_size: 6"),
        5,
        "must be a multiple of 4",
    ),
    "a code file that is missing": (("points.py", "pints.py"), 2, "there is no file"),
    "an unknown variable": (("width: 4", "width: ${nowhere.width}"), 8, "cannot be resolved"),
    "an unset variable": (("width: 4", "width: ${oc.env:NOT_SET_HERE}"), 8, "NOT_SET_HERE"),
    "a group without that file": (("optimizer: adam", "optimizer: adm"), 1, "'adam'?"),
}


@pytest.mark.parametrize("kind", FILE)
def test_a_mistake_in_the_file_is_told_with_its_line(project: None, kind: str):
    check_file(kind)


def check_file(kind: str) -> None:
    (old, new), line, answer = FILE[kind]
    Path("r.yaml").write_text(RECIPE.replace(old, new))
    [told] = mistakes()
    assert told.startswith(f"r.yaml:{line}: ")
    assert answer in told


OVERRIDES = {
    "trainr.epochs=3": "trainr: there is no such key; did you mean 'trainer'?",
    "optimizer.leaning_rate=1": "optimizer.leaning_rate: AdamW has no such argument; did you mean",
    "model.width=1.5": "model.width: expected integer, got 1.5",
    "model.blocks=[{_target_: torch.nn.Linear, in_features: a, out_features: 1}]": (
        "model.blocks.0.in_features: expected integer, got 'a'"
    ),
    "callbacks=[{type: progres}]": "callbacks.0.type: no callback is registered as 'progres'; did",
    "lr_scheduler._target_=torch.os.system": "lr_scheduler._target_: 'torch.os' is the module 'os'",
    "trainer.resume=auto": "trainer.resume: is `--resume`",
    "epochs=3": "epochs: there is no such key here; it belongs under `trainer:`.",
    "checkpoint.every_steps=0": "checkpoint: checkpoint: every_steps must be a whole number",
    "~nothing": "Could not delete from config. 'nothing' does not exist.",
    "+trainer.epochs=5": "",
}


def test_mistakes_of_all_overrides_are_told_in_one_answer(project: None):
    """Given as many mistakes as overrides and two that are not even key=value, when the recipe is
    read, then each is told with the override's own text."""
    lines = mistakes(*OVERRIDES, "what is this", "=1")
    told = {text: answer for text, answer in OVERRIDES.items() if answer}
    for text, answer in told.items():
        assert any(line.startswith(f"override {text!r}: {answer}") for line in lines), (text, lines)
    assert any("'what is this' is not key=value" in line for line in lines)
    assert any("'=1' is not key=value" in line for line in lines)


def test_mistakes_of_file_groups_and_overrides_are_told_together(project: None):
    """Given a mistake in each of three places at once, then all three are in the answer."""
    check_together()


def check_together() -> None:
    Path("r.yaml").write_text(RECIPE.replace("width: 4", "wide: 4\n  wide: 5"))
    Path("optimizer/adam.yaml").write_text(ADAM + "betas: [0.9]\n")
    text = "\n".join(mistakes("a b", "trainer.precision=bf61"))
    assert "r.yaml:9: model.wide: duplicate key: it is in line 8 already" in text
    assert "r.yaml:8: model.wide: Net has no such argument" in text
    assert "r.yaml:6: model: Net needs the argument 'width'" in text
    assert "optimizer/adam.yaml:3: optimizer.betas" in text
    assert "override 'trainer.precision=bf61': trainer.precision: expected" in text
    assert "'a b' is not key=value" in text


def test_what_only_follows_from_a_mistake_is_not_told(project: None):
    Path("r.yaml").write_text(RECIPE.replace("code: points.py", "code: nothing.py"))
    assert len(mistakes()) == 1  # not that points.Net is unknown
    Path("r.yaml").write_text(RECIPE.replace("width: 4", "width: ${oc.env:NOT_SET_HERE}"))
    assert len(mistakes()) == 1  # not that None is no integer


def test_a_missing_recipe_is_one_line_with_the_nearest_name(project: None):
    with pytest.raises(
        RecipeError, match=r"there is no recipe file 'rr.yaml'; did you mean 'r.yam"
    ):
        load_recipe("rr.yaml")


def test_numbers_without_a_point_and_merge_keys_are_read_as_meant(project: None):
    """Given what YAML 1.1 makes of `1e-3` (text) and keys merged from an anchor elsewhere."""
    shared = "sizes: &sizes {width: 3}\n" + RECIPE.replace("  width: 4", "  <<: *sizes")
    Path("r.yaml").write_text(shared)
    loaded = load_recipe("r.yaml")
    assert loaded.parts["optimizer"].kwargs["lr"] == 0.001
    assert loaded.parts["model"].kwargs == {"width": 3}


def test_the_command_answers_with_code_2_and_no_traceback(project: None, ranks: Ranks):
    words = ["train", "r.yaml", "trainr.epochs=3", "optimizer.leaning_rate=1"]
    code, _, err = Paceline(Path.cwd(), ranks)(*words)
    assert code == 2
    assert "did you mean 'trainer'?" in err
    assert "did you mean 'lr'?" in err
    assert "Traceback" not in err
    assert not Path("built").exists()


def check_in(folder: Path, kind: str | None = None) -> None:
    """What a broken trainer has to fail: one kind of mistake, or mistakes everywhere."""
    with inside(folder):
        check_together() if kind is None else check_file(kind)
