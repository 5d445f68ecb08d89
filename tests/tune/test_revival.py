"""Pruned trials that go on: by hand and for the audit, which says what pruning has cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuned_recipes import TUNE, write

from endings import ending
from paceline.errors import ConfigError
from paceline.tune import Study
from paceline.tune.audit import audit_due, clopper_pearson, is_audited, pruning_cost
from paceline.tune.folder import REVIVES

NEVER = TUNE.replace(
    "{type: median, n_startup_trials: 2, n_warmup_steps: 2}", "{type: threshold, upper: 1.e9}"
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, Study]]:
    """One whose pruner is at work, and one that is the same without."""
    folder = tmp_path_factory.mktemp("revived")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = Study(write(folder)).optimize()
        write(folder, NEVER)
        whole = Study(folder / "toy.yaml", overrides=["run.name=whole"])
        yield study, whole.optimize()


def pruned(study: Study) -> list[int]:
    return [trial.number for trial in study.trials if trial.state.name == "PRUNED"]


def test_a_revived_trial_ends_as_one_that_was_never_pruned(
    studies: tuple[Study, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study, whole = studies
    number, *_ = pruned(study)
    before = study.trials
    again = Study(study.folder.path).optimize(revived=[number])
    assert f"trial {number} goes on as trial 6.\n" in capsys.readouterr().err
    assert [repr(trial) for trial in again.trials[:6]] == [repr(trial) for trial in before]
    new, old = again.trials[6], whole.trials[number]
    assert len(again.trials) == 7
    assert new.user_attrs[REVIVES] == number
    assert (new.state, new.values, new.params) == (old.state, old.values, old.params)
    assert new.intermediate_values == old.intermediate_values
    assert ending(study.folder.trial(number)) == ending(whole.folder.trial(number))
    line = study.folder.lines()[6]
    assert (line["revives"], line["folder"]) == (number, f"trials/trial_{number:04d}")
    assert not study.folder.trial(6).exists()

    # The same command again, and a start without it, find nothing to do.
    Study(study.folder.path).optimize(revived=[number])
    assert capsys.readouterr().err == f"paceline: trial {number} was revived before.\n"
    assert len(Study(study.folder.path).optimize().trials) == 7


@pytest.mark.parametrize("number", [99, -1])
def test_what_cannot_be_revived_is_listed(studies: tuple[Study, Study], number: int) -> None:
    study, _ = studies
    complete = study.best_trial.number
    with pytest.raises(ConfigError) as caught:
        Study(study.folder.path).optimize(revived=[complete, number])
    text = str(caught.value)
    assert f"trial {complete} was not pruned: it is complete." in text
    assert f"trial {number} does not exist" in text
    assert f"Pruned are: {', '.join(map(str, pruned(study)))}." in text


def test_a_functions_trials_cannot_be_revived(tmp_path: Path) -> None:
    study = Study(lambda trial: trial.suggest_float("x", 0, 1), tmp_path / "s")
    with pytest.raises(ConfigError, match="no checkpoints"):
        study.optimize(1, revived=[0])


def test_a_revival_that_was_killed_goes_on(
    studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, whole = studies
    number = pruned(study)[-1]
    assert number != pruned(study)[0]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.tune.study.train_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        Study(study.folder.path).optimize(revived=[number])
    monkeypatch.undo()
    again = Study(study.folder.path).optimize()
    [new] = [trial for trial in again.trials if trial.user_attrs.get(REVIVES) == number]
    assert new.values == whole.trials[number].values
    assert ending(study.folder.trial(number)) == ending(whole.folder.trial(number))


def test_the_audit_trains_its_sample_and_says_what_pruning_has_cost(
    studies: tuple[Study, Study],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study, whole = studies
    monkeypatch.chdir(tmp_path)
    audited = Study(write(tmp_path), overrides=["tune.audit=1.0"]).optimize()
    assert [trial.user_attrs.get(REVIVES) for trial in audited.trials[6:]] == pruned(study)
    for trial in audited.trials[6:]:
        assert trial.values == whole.trials[trial.user_attrs[REVIVES]].values
    cost = json.loads((audited.folder.path / "study.json").read_text())["audit"]
    count = len(pruned(study))
    assert (cost["pruned"], cost["audited"], cost["failed"]) == (count, count, 0)
    said = capsys.readouterr().err
    assert f"audit: {count} trials were pruned; of {count} trained to the end, " in said
    ends = [whole.trials[number].value or 0 for number in pruned(study)]
    best = min(t.value for t in audited.trials[:6] if t.state.name == "COMPLETE" and t.value)
    assert cost["better"] == sum(end < best for end in ends)
    assert [cost["low"], cost["high"]] == list(clopper_pearson(cost["better"], count))
    Study(audited.folder.path).optimize()
    assert said.endswith(capsys.readouterr().err)


def test_the_sample_is_a_share_that_follows_from_seed_and_number() -> None:
    chosen = [number for number in range(5000) if is_audited(1, number, 0.1)]
    assert 430 < len(chosen) < 570
    assert chosen != [number for number in range(5000) if is_audited(2, number, 0.1)]
    assert set(chosen) < {number for number in range(5000) if is_audited(1, number, 0.2)}
    assert not any(is_audited(1, number, 0.0) for number in range(100))
    assert all(is_audited(1, number, 1.0) for number in range(100))


def test_the_interval_is_exact() -> None:
    # By hand: 1 - 0.025 ** (1 / n) for none of n, and 0.025 ** (1 / n) for all of n.
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1.0))
    low, high = clopper_pearson(3, 10)  # of published tables
    assert (round(low, 4), round(high, 4)) == (0.0667, 0.6525)


def test_the_cost_counts_the_sample_alone() -> None:
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize")
    for state, value, revives in (
        (TrialState.COMPLETE, 5.0, None),
        *[(TrialState.PRUNED, None, None)] * 4,
        (TrialState.COMPLETE, 6.0, 1),
        (TrialState.COMPLETE, 4.0, 2),
        (TrialState.FAIL, None, 3),
    ):
        attributes = {} if revives is None else {REVIVES: revives}
        study.add_trial(create_trial(state=state, value=value, user_attrs=attributes))
    trials = study.get_trials()
    cost = pruning_cost(trials, 0, 1.0, "max")
    assert (cost.pruned, cost.audited, cost.failed, cost.better) == (4, 2, 1, 1)
    assert "of 2 trained to the end, 1 more failed, 1 would have beaten the best" in cost.text()
    assert audit_due(trials, 0, 1.0) == [4]
    none = pruning_cost(trials, 0, 0.0, "max")
    assert (none.audited, none.low, none.high) == (0, 0.0, 1.0)
    assert "none of the sample has ended" in none.text()
