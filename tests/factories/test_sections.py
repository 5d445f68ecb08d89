"""Typed sections of a recipe: every mistake at once with its line, and numbers as people write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError, RecipeError
from paceline.factories import Config, HumanFloat, HumanInt, get_config
from paceline.recipe import build_trainer, load_recipe
from paceline.recipe.typed import human_number

Write = Callable[..., Path]

BAD = """\
code: mine.py
trainer: {type: mine, epochs: 3, scael: 50%}
model: {widht: 8}
data:
  micro_batch_size: none
  sources: [{type: row, rows: 2^4}, {type: rows, sample_ratio: 5, row: 1}]
  eval_sources: [{type: rows}]
optimizer: {type: sgdd, lr: 1e-2}
lr_scheduler: {warmup: -1}
train_dataloader: {_target_: torch.utils.data.DataLoader}
checkpoint: [{type: paceline, every_epochs: 1}, {type: sums}, {type: native}, {type: sum}, 3]
"""


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def test_all_mistakes_of_all_sections_at_once(recipe: Write) -> None:
    path = recipe(BAD)
    head, *lines = refusal(path)
    expected = {
        "2: trainer.scael": "Mine has no such setting; did you mean 'scale'?",
        "3: model.widht": "did you mean 'width'?",
        "5: data.micro_batch_size": "expected a whole number, such as 4096, 1.25K, 128Ki or 2^20, "
        "got 'none'",
        "6: data.sources.0.type": "no data_source is registered as 'row'; did you mean 'rows'?",
        "6: data.sources.1.sample_ratio": "expected less than or equal to 1, got 5",
        "6: data.sources.1.row": "did you mean 'rows'?",
        "7: data.eval_sources": "expected a mapping, each data_source by name, got [",
        "8: optimizer.type": "did you mean 'sgd'?",
        "9: lr_scheduler.warmup": "expected greater than or equal to 0, got -1",
        "10: train_dataloader": "there is no such key",
        "11: checkpoint.1": "it would never save: give every_steps, every_epochs, on_best or",
        "11: checkpoint.2": "a run resumes from one engine, and the list has one already",
        "11: checkpoint.3.type": "registered as 'sum'; did you mean 'sums'?",
        "11: checkpoint.4": "expected an engine with its `type:`, got 3",
    }
    for place, message in expected.items():
        [line] = [line for line in lines if line.strip().startswith(f"{path}:{place}: ")]
        assert message in line
    assert head == f"{len(expected)} mistakes in {path}:"
    assert len(lines) == len(expected)


def test_what_does_not_fit_together_and_what_is_no_section(recipe: Write) -> None:
    both = {"type": "rows", "sample_ratio": 0.5, "sample_count": 3}
    path = recipe(
        model=[1], data={"sources": [both]}, optimizer={"type": "sgd"}, lr_scheduler={"type": 3}
    )
    text = "\n".join(refusal(path))
    assert "data.sources.0: sample_ratio and sample_count exclude each other" in text
    assert "model: expected a mapping of settings, got [1]" in text
    assert "optimizer: optimizer.lr is missing." in text
    assert "lr_scheduler.type: expected a name, got 3" in text
    path = recipe(data={"sources": {"type": "rows"}})
    [_, line] = refusal(path)
    assert "data.sources: expected a list, one data_source an item, got {'type': 'rows'}" in line


def test_the_first_factory_needs_no_type_and_others_are_listed_ones(recipe: Write) -> None:
    """`wide` is registered, and no factory of this trainer."""
    config = load_recipe(recipe()).config
    assert (config.model.type, config.model.width) == ("tiny", 8)  # pyright: ignore
    assert config.lr_scheduler.type == "linear"  # pyright: ignore
    path = recipe(model={"type": "wide"})
    [_, line] = refusal(path)
    assert line.endswith(
        "model.type: 'wide' is none of those that this trainer takes: tiny. "
        "`trainer.skip_validation: true` takes it all the same."
    )
    trainer = build_trainer(load_recipe(path, ["trainer.skip_validation=true"]))
    trainer.train()
    assert type(trainer.model).__name__ == "Linear"


@given(
    whole=st.integers(0, 10**6),
    after=st.text("0123456789", max_size=4),
    unit=st.sampled_from(["", *"kKmMbBtT", "ki", "Ki", "KI", "Mi", "mI", "Gi", "Ti"]),
    sign=st.sampled_from(["", "-", "+"]),
)
def test_a_number_with_a_unit_is_its_exact_product(
    whole: int, after: str, unit: str, sign: str
) -> None:
    text = f"{sign}{whole}" + (f".{after}" if after else "")
    base, exponent = (1024 if unit[1:] else 1000), "kmbt".find(unit[:1].lower()) + 1
    exponent = {"g": 3}.get(unit[:1].lower(), exponent) if unit else 0
    exact = Decimal(text) * base**exponent
    found = human_number(f" {text}{unit} ")
    assert found == (int(exact) if exact == int(exact) else float(exact))
    assert isinstance(found, int) == (exact == int(exact))
    share = human_number(f"{text} %")
    assert (share, type(share)) == (float(Decimal(text) / 100), float)


@given(st.text(st.sampled_from("0123456789.eE+-_^%kKmMiIbGtT \u0663"), max_size=12))
def test_any_other_text_is_no_number_and_no_error(text: str) -> None:
    found = human_number(text)
    assert found is None or abs(found) < 10**309
    for kind in (HumanInt, HumanFloat):
        made: Any = type("Own", (Config,), {"__annotations__": {"value": kind}})
        try:
            value = made(value=text).value
        except ValueError:
            continue
        assert value == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1.25K", 1250), ("128Ki", 131072), ("2^20", 1048576), ("10^6", 1000000),
        ("1_000", 1000), ("7B", 7 * 10**9), ("0.5", 0.5), ("5%", 0.05), ("3e-5", 3e-5),
        ("-2M", -2000000), ("1e400", None), ("9^9999", None), ("9" * 400, None), ("nan", None),
        ("-2^2", None), ("1KK", None), ("", None), ("K", None), ("٣K", None),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, number: float | None) -> None:
    assert human_number(text) == number
    assert type(human_number(text)) is type(number)


def test_plain_settings_take_such_numbers_too_and_other_texts_stay_texts(recipe: Write) -> None:
    loaded = load_recipe(
        recipe(),
        [
            "+trainer.max_steps=1K", "+trainer.log_every='2^3'", "+trainer.max_grad_norm=50%",
            "+trainer.validate_every=1K", "+checkpoint.every_steps=1.5K",
            "+data.num_workers='2^1'", "+trainer.metric_monitor={metric_name: loss, min_delta: 1%}",
        ],
    )  # fmt: skip
    trainer = build_trainer(loaded)
    found = (trainer.max_steps, trainer.log_every, trainer.max_grad_norm, trainer.validate_every)
    assert found == (1000, 8, 0.5, 1000)
    assert trainer.checkpoint_policy.every_steps == 1500
    assert trainer.metric_monitor is not None
    assert trainer.metric_monitor.min_delta == 0.01
    assert loaded.config.data.num_workers == 2  # pyright: ignore
    for value, why in (
        ("'1'", "expected integer, got '1'"),
        ("10%", "expected integer, got '10%'"),
        ("1.5", "expected integer, got 1.5"),
    ):
        [_, line] = refusal(recipe(), f"+trainer.max_steps={value}")
        assert why in line


def test_a_config_comes_from_a_file_or_a_dictionary(recipe: Write, tmp_path: Path) -> None:
    path = recipe()
    config = get_config(path, ["trainer.scale=2"])
    assert (config.scale, config.model.width, config.data.sources[0].rows) == (2.0, 8, 16)
    tree = yaml.safe_load(path.read_text())
    before = copy.deepcopy(tree)
    same = get_config(tree)
    assert (same.scale, tree) == (0.5, before)
    assert same.model_dump() == get_config(str(path)).model_dump()
    with pytest.raises(ConfigError, match="overrides are for a recipe's file"):
        get_config(tree, ["trainer.scale=2"])
    with pytest.raises(RecipeError, match="did you mean 'scale'"):
        get_config(tree | {"trainer": {"type": "mine", "scael": 2}})
    with pytest.raises(ConfigError, match=r"has no factories: `load_recipe` and `build_trainer`"):
        get_config(_plain())


def _plain() -> dict[str, Any]:
    linear = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 1}
    return {
        "trainer": {"epochs": 1},
        "model": linear,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "loss_fn": {"_target_": "torch.nn.MSELoss"},
        "train_dataloader": {
            "_target_": "torch.utils.data.DataLoader",
            "dataset": {"_target_": "torch.utils.data.TensorDataset"},
        },
    }
