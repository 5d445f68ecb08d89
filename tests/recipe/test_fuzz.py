"""Whatever a recipe or an override says, it is read or refused with a RecipeError; nothing runs.

`PACELINE_FUZZ=10000 pytest tests/recipe/test_fuzz.py` draws that many recipes.
"""

from __future__ import annotations

import contextlib
import os
import string
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.recipe import load_recipe

TESTS = 4  # which share the recipes to draw
EXAMPLES = int(os.environ.get("PACELINE_FUZZ", "60")) // TESTS
pytestmark = pytest.mark.timeout(300 + EXAMPLES)
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="PACELINE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
KEYS = st.sampled_from(
    ["trainer", "model", "optimizer", "callbacks", "_target_", "type", "_args_", "run", "seed",
     "epochs", "dataset", "train_dataloader", "checkpoint", "code", "defaults", "lr", "loss_fn",
     "seeds", "groups", "params", "schedulers", "milestones", "lr_scheduler", "_partial_",
     "_convert_", "_recursive_", "metric_monitor", "parallel", "loggers", "batch_size", "hydra"]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["torch.nn.Linear", "torch.optim.AdamW", "torch.utils.data.DataLoader", "progress", "???",
     "${seed}", "${oc.env:X}", "${", "", "../x", "toy.Net", "\u0000", "warmup_cosine",
     "torch.os.system", "os.system", "builtins.eval", "subprocess.Popen", "toy.torch.hub.load",
     "torch.utils.collect_env.run", "torch.load", "${oc.env:HOME}", "touch owned", "vectors",
     "${len:${model}}", "${multiply:2,x}", "${model}", "${oc.create:${trainer}}",
     "torch.optim.lr_scheduler.SequentialLR", "torch.optim.lr_scheduler.LambdaLR", "1e-3"]
)  # fmt: skip
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=12,
)
RECIPE = {
    "code": "toy.py",
    "trainer": {"epochs": 2, "progress": False},
    "model": {"_target_": "toy.Net", "width": 4},
    "loss_fn": {"_target_": "torch.nn.MSELoss"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01, "groups": [{"params": "vectors"}]},
    "lr_scheduler": {"type": "warmup_cosine", "warmup": 0.1},
    "train_dataloader": {
        "_target_": "torch.utils.data.DataLoader",
        "dataset": {"_target_": "toy.Points"},
        "batch_size": 8,
    },
    "callbacks": [{"type": "progress"}],
    "checkpoint": {"every_epochs": 1},
    "run": {"name": "x"},
}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No command is started, nothing unpickled, and no file comes to be."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"something was run: {args}")

    for module, names in (
        (subprocess, ("Popen", "run", "check_output")),
        (os, ("system", "popen", "execv", "posix_spawn")),
        (torch, ("load",)),
        (torch.hub, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.chdir(tmp_path)
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"toy.py", "toy.yaml", "__pycache__"}


@st.composite
def changed_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A right recipe in which up to three values have been replaced, added or taken out."""
    recipe: Any = deepcopy(RECIPE)
    for _ in range(draw(st.integers(1, 3))):
        node = recipe
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            change = draw(st.sampled_from(["replace", "remove", "add"]))
            if change == "remove":
                del node[key]
            elif change == "replace" or isinstance(node, list):
                node[key] = draw(VALUES)
            else:
                node[draw(KEYS)] = draw(VALUES)
            break
    return recipe


@FUZZ
@given(changed_recipes())
def test_any_change_of_a_right_recipe_is_read_or_refused(recipe, tree: dict):
    path = recipe()
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_recipe(path)


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_tree_is_read_or_refused(tmp_path: Path, tree: dict):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_recipe(path)


@FUZZ
@given(st.text(max_size=60) | st.text(alphabet=":-[]{}&*!|>'\"%@`#,?\n ab", max_size=40))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str):
    path = tmp_path / "toy.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        load_recipe(path)


@FUZZ
@given(
    st.lists(
        st.text(alphabet=string.printable, max_size=20)
        | st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), KEYS, TEXTS)
        | st.builds("{}.{}={}".format, KEYS, KEYS, st.integers() | TEXTS),
        max_size=3,
    )
)
def test_any_overrides_are_read_or_refused(recipe, overrides: list[str]):
    path = recipe()
    with contextlib.suppress(ConfigError):
        load_recipe(path, overrides)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError):
        load_recipe(path)
    path.unlink()
