"""Whatever a recipe or an override says, it is read or refused with a RecipeError."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.recipe import load_recipe

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
KEYS = st.sampled_from(
    ["trainer", "model", "optimizer", "callbacks", "_target_", "type", "_args_", "run", "seed",
     "epochs", "dataset", "train_dataloader", "checkpoint", "code", "defaults", "lr", "loss_fn"]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["torch.nn.Linear", "torch.optim.AdamW", "torch.utils.data.DataLoader", "progress", "???",
     "${seed}", "${oc.env:X}", "${", "", "../x", "toy.Net", "\u0000", "warmup_cosine"]
)  # fmt: skip
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@QUICK
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_tree_is_read_or_refused(tmp_path: Path, tree: dict):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_recipe(path)


@QUICK
@given(st.text(max_size=60) | st.text(alphabet=":-[]{}&*!|>'\"%@`#,?\n ab", max_size=40))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str):
    path = tmp_path / "toy.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        load_recipe(path)


@QUICK
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
