"""An argument arrives as its annotation says."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import decimal
import enum
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.recipe.components import fit


class Act(enum.Enum):
    RELU = "relu"
    TANH = "tanh"


@dataclasses.dataclass
class Crop:
    size: int
    mask: Path = Path("none")
    act: Act = Act.RELU


HOUR, DAY = datetime.timedelta(hours=1), datetime.date(2020, 1, 2)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (Act, "tanh", Act.TANH),
        (Act, "TANH", Act.TANH),
        (Act | None, "TANH", Act.TANH),
        (typing.Optional[Act], None, None),  # noqa: UP045
        (str | Act, "tanh", Act.TANH),
        (Act | str, "other", "other"),
        (list[Act], ["tanh", "RELU"], [Act.TANH, Act.RELU]),
        (dict[Act, int], {"tanh": 1}, {Act.TANH: 1}),
        (torch.dtype, "torch.float64", torch.float64),
        (torch.dtype | None, "bfloat16", torch.bfloat16),
        (torch.device, "cuda:0", torch.device("cuda:0")),
        (list[Path], ["a"], [Path("a")]),
        (Path | None, "a", Path("a")),
        (list[tuple[int, int]], [[1, 2]], [(1, 2)]),
        (set[int], [1, 2, 2], {1, 2}),
        (dict[int, float], {0: 1.0, 1: 50}, {0: 1.0, 1: 50.0}),
        (dict[str, float], {0: 1.0}, {"0": 1.0}),
        (dict, {0: [{1: 2}]}, {0: [{1: 2}]}),
        (Any, {0: [{1: 2}]}, {0: [{1: 2}]}),
        (datetime.timedelta, "PT1H", HOUR),
        (datetime.date, "2020-01-02", DAY),
        (decimal.Decimal, "1.10", decimal.Decimal("1.10")),
        (Crop, {"size": 1, "mask": "x", "act": "tanh"}, Crop(1, Path("x"), Act.TANH)),
        (list[Crop], [{"size": 1}], [Crop(1)]),
        (int | str, "1", "1"),
        (str | int, 1, 1),
        (float | int, 1, 1),
        (collections.abc.Iterable[int], [1, 2], [1, 2]),
    ],
)
def test_a_value_arrives_as_its_annotation_says(hint: Any, value: Any, expected: Any) -> None:
    arrived = fit(value, hint)
    assert arrived == expected
    assert type(arrived) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (Act, "gelu", "expected 'relu' or 'tanh', got 'gelu'"),
        (torch.dtype, "relu", "expected a dtype of torch, got 'relu'"),
        (dict[int, float], {"a": 1.0}, "expected integer, "),
        (Crop, {"size": "1"}, "expected integer"),
        (int, "1", "expected integer, got '1'"),
        (set[int], ["a"], "expected integer"),
        (torch.Size | None, [1, 2], "expected torch.Size | None, got [1, 2]"),
    ],
)
def test_what_does_not_fit_is_a_mistake(hint: Any, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^expected") as caught:
        fit(value, hint)
    assert expected in str(caught.value)


def test_numbers_stay_numbers_as_keys_of_a_recipe(recipe) -> None:
    from paceline.recipe import build_trainer, load_recipe

    path = recipe(model={"_target_": "toy.Keyed", "width": 4, "weights": {0: 1.0, 1: 50.0}})
    code = path.with_name("toy.py")
    code.write_text(
        code.read_text()
        + "\nclass Keyed(Net):\n    def __init__(self, width, weights):\n"
        + "        super().__init__(width)\n        self.weights = weights\n"
    )
    assert build_trainer(load_recipe(path)).model.weights == {0: 1.0, 1: 50.0}
