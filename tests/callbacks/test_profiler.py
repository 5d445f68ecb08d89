"""Profiler leaves a trace of the steps it was asked for, and of no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import build

from paceline.callbacks import Profiler
from paceline.errors import ConfigError
from paceline.testing import Ranks, StopAt
from small import settings


def traces(run_dir: Path) -> dict[str, int]:
    """Each trace's name and how many optimizer steps are in it."""
    found = {}
    for path in sorted((run_dir / "trace").glob("*")):
        events = json.loads(path.read_text())["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("ph") == "X"]
        found[path.name] = sum(name.startswith("Optimizer.step#") for name in names)
    return found


@pytest.mark.parametrize(("first", "warmup"), [(5, 2), (1, 0), (2, 3), (12, 1)])
def test_the_steps_asked_for_are_traced(first: int, warmup: int, tmp_path: Path) -> None:
    """Near the start there may be no room for the warm-up, near the end none for all steps."""
    build(tmp_path, Profiler(first, 3, warmup=warmup)).train(seed=5)
    last = min(first + 2, 12)
    assert traces(tmp_path) == {f"steps_{first}-{last}_rank_0.json": last - first + 1}


def test_outside_of_them_the_profiler_is_off(tmp_path: Path) -> None:
    profiler, on = Profiler(5, 3, warmup=2), []
    trainer = build(tmp_path, profiler)
    trainer.on_after_backward = lambda: on.append(
        (trainer.global_step + 1, torch.autograd._profiler_enabled())
    )
    trainer.train(seed=5)
    assert {step for step, enabled in on if enabled} == {5, 6, 7}
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(
    ("stop", "parts"),
    [
        (3, {"steps_5-7_rank_0.json": 3}),
        (6, {"steps_5-6_rank_0.json": 2, "steps_7-7_rank_0.json": 1}),
        (9, {"steps_5-7_rank_0.json": 3}),
    ],
)
def test_a_stopped_run_leaves_the_rest_to_the_next_start(
    stop: int, parts: dict[str, int], tmp_path: Path
) -> None:
    build(tmp_path, Profiler(5, 3), StopAt(stop)).train(seed=5)
    build(tmp_path, Profiler(5, 3)).train(seed=5)
    assert traces(tmp_path) == parts


def test_details_are_there_if_asked_for(tmp_path: Path) -> None:
    build(tmp_path, Profiler(5, 1, shapes=True, memory=True, stacks=True)).train(seed=5)
    text = next((tmp_path / "trace").iterdir()).read_text()
    assert '"Input Dims"' in text
    assert "[memory]" in text
    assert "trainer.py" in text
    build(tmp_path / "plain", Profiler(5, 1)).train(seed=5)
    plain = next((tmp_path / "plain" / "trace").iterdir()).read_text()
    assert '"Input Dims"' not in plain
    assert "[memory]" not in plain
    assert "trainer.py" not in plain


def test_without_a_run_folder_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="give a run_dir"):
        build(None, Profiler()).train(seed=5)


@pytest.mark.parametrize("wrong", [{"first": 0}, {"steps": 0}, {"warmup": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Profiler"):
        Profiler(**wrong)


def profile(folder: Path) -> None:
    from paceline import Trainer

    for name, all_ranks in (("one", False), ("all", True)):
        callbacks = [Profiler(2, 2, warmup=1, all_ranks=all_ranks)]
        Trainer(**settings(callbacks=callbacks, run_dir=folder / name)).train(seed=1)


def test_one_rank_or_all_write(ranks: Ranks, tmp_path: Path) -> None:
    ranks(profile, 2, tmp_path)
    assert list(traces(tmp_path / "one")) == ["steps_2-3_rank_0.json"]
    assert list(traces(tmp_path / "all")) == ["steps_2-3_rank_0.json", "steps_2-3_rank_1.json"]
