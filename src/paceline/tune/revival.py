"""Revival: a pruned trial goes on from its checkpoint, as if it had never been pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.log.files import shown
from paceline.tune.folder import HOME, REVIVES, StudyFolder

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def check_revivals(
    trials: Sequence[FrozenTrial], folder: StudyFolder, numbers: Sequence[int]
) -> None:
    """Raises if a trial cannot be revived; all that cannot are listed.

    Args:
        trials: of the study.
        folder: of the study.
        numbers: of the trials.

    Raises:
        ConfigError: a trial was not pruned, is itself a revival, or has no folder here.
    """
    wrong = [
        f"  trial {number} {why}" for number in numbers if (why := _why(trials, folder, number))
    ]
    if wrong:
        from optuna.trial import TrialState

        pruned = [str(trial.number) for trial in trials if trial.state == TrialState.PRUNED]
        raise ConfigError(
            "these cannot be revived:\n"
            + "\n".join(wrong)
            + f"\nPruned are: {', '.join(pruned) or 'none'}."
        )


def _why(trials: Sequence[FrozenTrial], folder: StudyFolder, number: int) -> str:
    from optuna.trial import TrialState

    if not 0 <= number < len(trials):
        return f"does not exist: there are {len(trials)}."
    trial = trials[number]
    if trial.state != TrialState.PRUNED:
        return f"was not pruned: it is {trial.state.name.lower()}."
    if not folder.trial(number).is_dir():
        return f"has no folder here: {shown(folder.trial(number))}."
    return ""


def is_revived(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether a trial was revived and did not fail after that.

    Args:
        trials: of the study.
        number: of the pruned trial.
    """
    from optuna.trial import TrialState

    return any(
        trial.user_attrs.get(REVIVES) == number and trial.state != TrialState.FAIL
        for trial in trials
    )


def revive(study: optuna.Study, folder: StudyFolder, number: int) -> int:
    """Adds a trial that goes on with a pruned one; to be called under the study's lock.

    Optuna's trials do not change once they have ended, so this is a new one that names the old. It
    has the same parameters and reports, counts outside `tune.trials`, and is trained in the old
    one's folder. It is under way from its first moment, and held by no process: the next that looks
    for a trial takes it.

    Args:
        study: of Optuna.
        folder: of the study.
        number: of the pruned trial.

    Returns:
        The new trial's number.
    """
    from optuna.trial import TrialState, create_trial

    old = study.get_trials(deepcopy=False)[number]
    template = create_trial(
        state=TrialState.RUNNING,
        params=old.params,
        distributions=old.distributions,
        intermediate_values=old.intermediate_values,
        user_attrs={HOME: folder.read().get(HOME), REVIVES: number},
    )
    added = study._storage.create_new_trial(study._study_id, template_trial=template)
    return study._storage.get_trial(added).number
