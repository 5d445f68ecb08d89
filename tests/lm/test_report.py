"""The report's numbers are those that counting one by one gives."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from paceline.errors import ConfigError
from paceline.lm.data import report as module
from paceline.lm.data.report import COMMON, GRAM, Fill, Report, report_on
from paceline.lm.data.sample import Sample
from paceline.lm.data.token_store import store_for


def sample(ids: list[int] | range, trained: int = 1) -> Sample:
    array = np.array(list(ids), np.int32)
    return Sample(array, np.where(np.arange(len(array)) < len(array) - trained, -100, array))


def printed(report: Report) -> str:
    file = io.StringIO()
    Console(file=file, width=100).print(report)
    return file.getvalue()


def test_counts_lengths_and_what_was_left_out(tmp_path: Path) -> None:
    manual = [sample(range(i, 2 * i), trained=2) for i in range(2, 12)]
    talk = [sample([1, 2]), sample([7]), sample([1, 2]), manual[0], manual[0]]
    evaluation = {"held out": [sample(range(100, 140))]}
    reported = report_on(
        {"manual": manual, "talk": talk},
        evaluation,
        packs=Fill(rows=5, capacity=20, tokens=98),
        dropped={"talk": {"no trained token left": 2}, "held out": {"empty": 1}},
        truncated={"manual": {"too long": 3}, "talk": {"too long": 4}},
    )
    assert reported.train["manual"].lengths == {
        "min": 2,
        "p25": 4,
        "p50": 6,
        "p75": 9,
        "p95": 11,
        "p99": 11,
        "max": 11,
    }
    found = reported.to_json()
    part = {"samples": 10, "tokens": 65, "trained": 20, "duplicates": 0}
    assert found["train"]["manual"].items() >= part.items()
    assert found["train"]["talk"]["duplicates"] == 2
    whole = {"samples": 15, "tokens": 74, "trained": 27, "duplicates": 3}
    assert found["total"].items() >= whole.items()
    assert found["total"]["dropped"] == {"no trained token left": 2}
    assert found["total"]["truncated"] == {"too long": 7}
    assert found["packs"] == {"rows": 5, "capacity": 20, "tokens": 98, "fill": 0.98}
    assert found["evaluation"]["held out"]["dropped"] == {"empty": 1}
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["train", "total", "evaluation", "overlap", "packs"]
    text = printed(reported)
    for shown in ("manual", "held out (eval)", "no trained token left", "98.00 %", "by 13 tokens"):
        assert shown in text
    # A store gives the same, block by block.
    store = store_for(tmp_path, {"sources": "manual"}, lambda: manual)
    assert report_on({"manual": store}).total == report_on({"manual": manual}).total


def test_a_source_without_samples_has_no_lengths() -> None:
    reported = report_on({"none": []}, {"nor here": [], "short": [sample([1])]})
    assert reported.total.lengths == {}
    assert reported.overlap["nor here"].samples == 0
    assert reported.overlap["short"].too_short == 1
    assert "none" in printed(reported)
    with pytest.raises(ConfigError, match="none is the name of a training and of an evaluation"):
        report_on({"none": []}, {"none": []})


def grams(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]


few_ids = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=22), min_size=1, max_size=8)


@settings(max_examples=60)
@given(train=few_ids, evaluation=few_ids, block=st.integers(1, 60), common=st.integers(1, 4))
def test_overlap_is_what_comparing_every_run_gives(
    train: list[list[int]], evaluation: list[list[int]], block: int, common: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "COMMON", common)
        patch.setattr(module, "_SLOTS", (16, 64))  # nearly full: many false hits of the filter
        reported = report_on(
            {"a": [sample(ids) for ids in train[::2]], "b": [sample(ids) for ids in train[1::2]]},
            {"e": [sample(ids) for ids in evaluation]},
        )
    there = [gram for ids in train for gram in grams(ids)]
    shared = 0
    for ids in evaluation:
        counts = [there.count(gram) for gram in grams(ids)]
        covered = {i + k for i, n in enumerate(counts) if n > common for k in range(GRAM)}
        free = [n for i, n in enumerate(counts) if not covered & set(range(i, i + GRAM))]
        shared += ids in train or any(free)
    overlap = reported.overlap["e"]
    assert overlap.exact == sum(ids in train for ids in evaluation)
    assert overlap.by_grams == shared
    assert overlap.too_short == sum(len(ids) < GRAM for ids in evaluation)
    ours = {gram for ids in evaluation for gram in grams(ids)}
    assert overlap.common == sum(there.count(gram) > common for gram in ours)
    unique = {tuple(ids) for ids in train}
    assert reported.total.duplicates == len(train) - len(unique)


def test_a_system_prompt_is_no_overlap_and_thirteen_ids_are() -> None:
    generator = np.random.default_rng(1)
    prompt = list(range(20))

    def talk() -> list[int]:
        return prompt + generator.integers(100, 10**6, 30).tolist()

    train = [talk() for _ in range(COMMON + 1)]
    ours = [talk() for _ in range(4)]
    ours[1] += train[3][25 : 25 + GRAM]
    ours[2] += train[3][25 : 24 + GRAM]
    ours[3] = train[5]
    overlap = report_on(
        {"t": [sample(ids) for ids in train]}, {"e": [sample(ids) for ids in ours]}
    ).overlap["e"]
    assert (overlap.samples, overlap.exact, overlap.by_grams) == (4, 1, 2)
    assert overlap.common == len(prompt) - GRAM + 1
