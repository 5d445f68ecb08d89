"""Studies of recipes and functions, with one worker in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tuned_recipes import TUNE, write

from endings import ending
from paceline.errors import ConfigError
from paceline.recipe.recipe import load_recipe
from paceline.recipe.seeds import train_recipe
from paceline.runs.listing import find_runs
from paceline.testing import rows
from paceline.trainer.settings import Resume
from paceline.tune import Study, TrialsFailed


def lines(folder: Path) -> list[dict[str, Any]]:
    """The newest line of each trial, without what differs between two studies."""
    found: dict[int, dict[str, Any]] = {}
    for text in (folder / "trials.jsonl").read_text().splitlines():
        record = json.loads(text)
        found[record["number"]] = record
    for record in found.values():
        for name in ("started", "ended", "restarts", "attributes"):
            del record[name]
    return [found[number] for number in sorted(found)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Study]]:
    """A study of 6 trials, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder / "runs/p/s", Study(write(folder)).optimize()


def test_a_study_is_a_folder_of_ordinary_runs(done: tuple[Path, Study]) -> None:
    folder, study = done
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    wanted = {"recipe.yaml", "study.json", "study.db", "trials.jsonl", "best.yaml", "trials"}
    assert names - {"study.db-wal", "study.db-shm"} == {*wanted, "claims", "code"}
    runs = sorted(find_runs(folder), key=lambda run: run.name)
    assert [run.name for run in runs] == [f"trials/trial_{i:04d}" for i in range(6)]
    assert [trial.number for trial in study.trials] == list(range(6))
    for run, line, trial in zip(runs, lines(folder), study.trials, strict=True):
        assert run.status == line["state"].lower() == trial.state.name.lower()
        assert (line["params"], line["folder"]) == (trial.params, run.name)
        assert line["values"] == trial.values
        reports = [[step, value] for step, value in trial.intermediate_values.items()]
        assert line["reports"] == reports
        if run.status == "complete":
            assert [run.metrics["val/loss"]] == trial.values
            assert len(reports) == 10


def test_the_pruner_was_at_work_and_its_runs_say_so(done: tuple[Path, Study]) -> None:
    folder, study = done
    pruned = [run for run in find_runs(folder) if run.status == "pruned"]
    assert 0 < len(pruned) < 6
    for run in pruned:
        assert run.record["stopped_by"] == "pruned"
        trial = study.trials[int(run.name[-4:])]
        # A report is the last validation at or before its share of the steps.
        last, value = max(trial.intermediate_values.items())
        assert 2 <= last < 10
        assert run.record["epoch"] == last
        assert trial.value == value == run.metrics["val/loss"]


def test_a_trials_recipe_trains_alone(done: tuple[Path, Study], tmp_path: Path) -> None:
    folder, study = done
    best = study.best_trial
    kept = folder / f"trials/trial_{best.number:04d}"
    recipe = load_recipe(kept / "recipe.yaml", [f"run.dir={tmp_path / 'alone'}"])
    assert "tune" not in recipe.tree
    train_recipe(recipe, Resume())
    assert ending(tmp_path / "alone")["models"] == ending(kept)["models"]
    assert rows(tmp_path / "alone") == rows(kept)


def test_the_best_trials_recipe_trains_too(done: tuple[Path, Study]) -> None:
    folder, study = done
    recipe = load_recipe(folder / "best.yaml")
    assert recipe.run_dir.name == "best"
    assert train_recipe(recipe, Resume()).metrics["val/loss"] == study.best_value
    assert study.best_params["optimizer.lr"] == recipe.tree["optimizer"]["lr"]


def test_it_is_complete_and_is_continued_from_its_folder(done: tuple[Path, Study]) -> None:
    folder, _ = done
    before = lines(folder)
    Study(folder).optimize()
    assert lines(folder) == before
    Study(folder).optimize(add=1)
    Study(folder).optimize()
    assert lines(folder)[:6] == before
    assert len(lines(folder)) == 7


def test_another_space_is_refused_or_accepted_or_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "tune: {trials: 1, space: {optimizer.lr: {float: [0.1, 0.2]}}}\n")
    Study(file).optimize()
    write(tmp_path, "tune: {trials: 2, space: {optimizer.lr: {float: [0.1, 0.3]}}}\n")
    with pytest.raises(ConfigError, match=r"tune\.space\.optimizer\.lr: it is different"):
        Study(file).optimize()
    assert len(Study(file, accept=True).optimize().trials) == 2
    assert len(Study(file).optimize().trials) == 2  # it is the study's own now
    write(tmp_path, "tune: {trials: 1, space: {optimizer.lr: [0.1, 0.2]}}\n")
    with pytest.raises(ConfigError, match="another kind or other choices"):
        Study(file, accept=True).optimize()
    assert len(Study(file, fresh=True).optimize().trials) == 1
    assert "moved to runs/p/s.1" in capsys.readouterr().err


def test_a_lost_storage_is_rebuilt_from_the_lines(tmp_path: Path) -> None:
    def square(trial: Any) -> float:
        x = trial.suggest_float("x", -1, 1)
        trial.set_user_attr("note", "kept")
        for step in range(3):
            trial.report(x + step, step)
        if trial.number == 2:
            raise ValueError("on purpose")
        return x * x

    study = Study(square, tmp_path / "s").optimize(6)
    before = study.trials
    for file in (tmp_path / "s").glob("study.db*"):
        file.unlink()
    with open(tmp_path / "s/trials.jsonl", "a") as file:
        file.write('{"number": 7, "sta')  # torn
    again = Study(square, tmp_path / "s")
    for old, new in zip(before, again.trials, strict=True):
        assert (old.state, old.params, old.values) == (new.state, new.params, new.values)
        assert old.distributions == new.distributions
        assert old.intermediate_values == new.intermediate_values
        assert old.user_attrs == new.user_attrs
    whole = Study(square, tmp_path / "whole").optimize(9)
    again.optimize(9)
    assert [t.params for t in again.trials] == [t.params for t in whole.trials]
    assert len(lines(tmp_path / "s")) == 9


def test_failures_are_kept_with_their_trace_and_end_the_study_in_a_row(tmp_path: Path) -> None:
    def fails(trial: Any) -> Any:
        if trial.number < 2:
            return math.nan if trial.number == 0 else "nothing"
        raise ValueError("on purpose")

    study = Study(fails, tmp_path, settings={"max_failures": 3})
    with pytest.raises(TrialsFailed, match=r"3 trials in a row(?s:.)*ValueError: on purpose"):
        study.optimize(20)
    found = lines(tmp_path)
    assert [line["state"] for line in found] == ["FAIL"] * 3
    assert "nan" in found[0]["cause"]
    assert "no number" in found[1]["cause"]
    assert "in fails" in found[2]["cause"]
    with pytest.raises(TrialsFailed):
        Study(fails, tmp_path, settings={"max_failures": 3}).optimize(20)
    assert len(lines(tmp_path)) == 6  # the next start counts anew


def test_a_trial_whose_loss_is_not_finite_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tune = """\
tune:
  trials: 3
  first: [{optimizer.lr: 1.0e+9}]
  space: {optimizer.lr: {float: [0.1, 1.0e+9], log: true}}
"""
    study = Study(write(tmp_path, tune)).optimize()
    assert study.trials[0].params == {"optimizer.lr": 1e9}
    assert study.trials[0].state.name == "FAIL"
    assert "NonFiniteError" in lines(tmp_path / "runs/p/s")[0]["cause"]
    assert len(study.trials) == 3


def test_the_best_value_several_metrics_and_several_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tune = """\
tune:
  {trials: 2, value: best, seeds: [3, 4], over_seeds: worst, sampler: random,
   space: {optimizer.lr: {float: [1.0, 2.0]}}}
"""
    study = Study(write(tmp_path, tune)).optimize()
    for line in lines(tmp_path / "runs/p/s"):
        assert line["values"] == max(line["seeds"].values())
        for seed, values in line["seeds"].items():
            found = rows(tmp_path / "runs/p/s" / line["folder"] / f"seed_{seed}")
            assert values == [min(row["val/loss"] for row in found if "val/loss" in row)]
    assert load_recipe(tmp_path / "runs/p/s/best.yaml").seed == 3
    assert len({run.name for run in find_runs(study.folder.path)}) == 4


def test_several_metrics_have_no_single_best_trial(tmp_path: Path) -> None:
    settings = {"metric": ["a", "b"], "direction": ["min", "max"], "sampler": "nsga2"}
    study = Study(lambda trial: (trial.suggest_float("x", 0, 1), 2.0), tmp_path, settings=settings)
    study.optimize(3)
    assert [line["values"][1] for line in lines(tmp_path)] == [2.0] * 3
    with pytest.raises(ConfigError, match="no single best"):
        _ = study.best_trial


def test_a_timeout_begins_no_further_trial(tmp_path: Path) -> None:
    study = Study(lambda trial: 1.0, tmp_path, settings={"timeout": 1e-9}).optimize(5)
    assert study.trials == []


def test_a_function_needs_a_folder_and_a_recipe_its_own_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a folder"):
        Study(lambda trial: 1.0)
    with pytest.raises(ConfigError, match="section `tune:`"):
        Study(write(tmp_path, TUNE), settings={"trials": 3})
    with pytest.raises(ConfigError, match="it is for recipes"):
        Study(lambda trial: 1.0, tmp_path, settings={"seeds": [1, 2]})
