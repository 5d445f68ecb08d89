"""What is sampled, mixed and split depends on the arguments alone."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.lm.data.mixing import content, mix, sample, split

ROWS = [{"text": f"row {i}"} for i in range(1000)]


@given(n=st.integers(1, 200), count=st.integers(1, 200), seed=st.integers(0, 5))
def test_a_sample_is_without_replacement_and_in_order(n, count, seed) -> None:
    got = sample(n, count=count, seed=seed)
    assert len(got) == min(n, count)
    assert (np.diff(got) > 0).all()
    assert set(got) <= set(range(n))
    assert {*got} <= {*sample(n, count=count + 3, seed=seed)}


def test_a_sample_by_ratio_depends_on_the_seed_alone(caplog) -> None:
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].tobytes(), random.getstate()  # pyright: ignore
    a, again, b = (sample(ROWS, ratio=0.25, seed=seed) for seed in (1, 1, 2))
    assert (np.random.get_state()[1].tobytes(), random.getstate()) == before  # pyright: ignore
    assert len(a) == 250
    assert list(a) == list(again) != list(b)
    assert list(sample(10, ratio=0.5, seed=3)) == [2, 4, 5, 7, 8]  # in every version and process
    assert len(sample(3, ratio=0.01, seed=0)) == 1
    with caplog.at_level(logging.WARNING):
        assert list(sample(4, count=9, seed=0)) == [0, 1, 2, 3]
    assert "9 rows was asked for, but there are 4: all are taken" in caplog.text


def test_a_sample_needs_one_number_in_range() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "either a ratio or a count"),
        ({"ratio": 0.5, "count": 1}, "either a ratio or a count"),
        ({"ratio": 1.5}, "ratio=1.5: above 0 and at most 1"),
        ({"count": 0}, "count=0: at least 1"),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            sample(10, seed=0, **settings)


sources = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([0, 0.5, 1, 1.5, 2, 3])), max_size=4
)


@given(sources)
def test_each_sample_comes_as_often_as_its_weight(sources) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    order = mix(sizes, weights)
    assert (order == mix(sizes, weights)).all()
    seen, first = Counter(order.tolist()), 0
    for size, weight in sources:
        times = [seen[i] for i in range(first, first + size)]
        assert sum(times) == int(weight) * size + round(weight % 1 * size)
        assert {*times} <= {int(weight), int(weight) + (weight % 1 > 0)}
        first += size
    assert len(order) == sum(seen.values())


def test_sources_are_spread_evenly_over_the_whole() -> None:
    order = mix([60, 20], [1, 1])
    assert [(order[i : i + 8] >= 60).sum() for i in range(0, 80, 8)] == [2] * 10
    assert list(order[order < 60]) == list(range(60))
    assert list(mix([3], [2])) == [0, 1, 2, 0, 1, 2]
    assert {*mix([40], [0.5], seed=1)} != {*mix([40], [0.5], seed=2)}
    for sizes, weights, message in (
        ([3], [1, 2], "1 sources have 2 weights"),
        ([3], [-1], r"weights\[0\]=-1: 0 or more"),
        ([3], [float("nan")], "0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            mix(sizes, weights)


def test_a_row_is_on_the_same_side_whatever_else_is_there() -> None:
    parts = split(ROWS, {"train": 0.8, "eval": 0.2})
    assert {*parts} == {"train", "eval"}
    assert sorted(map(str, [*parts["train"], *parts["eval"]])) == sorted(map(str, ROWS))
    assert 150 < len(parts["eval"]) < 250
    more = split([*ROWS[500:], {"text": "new"}, *ROWS[:10]], {"train": 0.8, "eval": 0.2})
    assert [row for row in more["eval"] if row in ROWS[500:]] == [
        row for row in parts["eval"] if row in ROWS[500:]
    ]
    assert [row["text"] for row in parts["eval"]][:2] == sorted(
        (row["text"] for row in parts["eval"]), key=lambda text: int(text[4:])
    )[:2]
    nested = split(parts["train"], {"a": 0.5, "b": 0.5}, seed=1)
    assert 300 < len(nested["a"]) < 500
    assert list(split(ROWS, {"a": 1.0})["a"]) == ROWS
    assert len(split(ROWS, {"a": 0.0, "b": 1.0})["a"]) == 0
    for shares in ({"a": 0.5, "b": 0.4}, {}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ConfigError, match="sum to 1"):
            split(ROWS, shares)


def test_duplicates_are_on_one_side_even_with_other_ids() -> None:
    rows = [{"id": i, "messages": [{"role": "user", "content": f"{i // 4}"}]} for i in range(400)]
    train, held_out = split(rows, {"a": 0.5, "b": 0.5}).values()
    assert len(train)
    assert len(held_out)
    assert not {content(row) for row in train} & {content(row) for row in held_out}
    by_id = split(rows, {"a": 0.5, "b": 0.5}, by=lambda row: str(row["id"]).encode())
    assert {content(row) for row in by_id["a"]} & {content(row) for row in by_id["b"]}
    assert content({"a": 1}) != content({"a": 2})
    assert content({"text": "a", "id": 1}) == content({"text": "a", "id": 2})
