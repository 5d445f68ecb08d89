"""The audit: trains some of the pruned trials to the end, and says what pruning has cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.tune.folder import REVIVES

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

LEVEL = 0.95


def is_audited(seed: int, number: int, share: float) -> bool:
    """Whether a trial is in the audit's sample, should it be pruned.

    It follows from the seed and the number alone: how the trial did has no influence.

    Args:
        seed: of the study.
        number: of the trial.
        share: of all trials that are in the sample, from 0 to 1.
    """
    digest = hashlib.sha256(f"audit {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def clopper_pearson(found: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a share, from a sample.

    Args:
        found: how many of the sample have a property.
        of: the size of the sample, at least 1.
        level: the chance with which such an interval covers the true share, at the least.

    Returns:
        Its ends, from 0 to 1.
    """
    from scipy.stats import beta

    rest = (1 - level) / 2
    low = 0.0 if found == 0 else float(beta.ppf(rest, found, of - found + 1))
    high = 1.0 if found == of else float(beta.ppf(1 - rest, found + 1, of - found))
    return low, high


@dataclass(frozen=True)
class PruningCost:
    """What pruning has cost, as far as the audit tells.

    Attributes:
        pruned: how many trials were pruned.
        audited: how many of them the audit has trained to the end.
        failed: how many failed when they went on; nothing is known of them.
        better: how many of the audited ones beat the best trial that was not pruned.
        low, high: the 95 % interval of the share of pruned trials that would have beaten it; from
            0 to 1 where none was audited.
    """

    pruned: int
    audited: int
    failed: int
    better: int
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """A line about it."""
        if not self.audited:
            return f"audit: {self.pruned} trials were pruned, and none of the sample has ended."
        more = f", {self.failed} more failed" if self.failed else ""
        return (
            f"audit: {self.pruned} trials were pruned; of {self.audited} trained to the end{more}, "
            f"{self.better} would have beaten the best. The share among all pruned ones is between "
            f"{self.low:.1%} and {self.high:.1%} (95 % confidence)."
        )


def audit_due(trials: Sequence[FrozenTrial], seed: int, share: float) -> list[int]:
    """The pruned trials that the audit has yet to revive, by number.

    Args:
        trials: of the study.
        seed: of the study.
        share: `tune.audit`.
    """
    from optuna.trial import TrialState

    revived = {trial.user_attrs.get(REVIVES) for trial in trials}
    return [
        trial.number
        for trial in trials
        if trial.state == TrialState.PRUNED
        and trial.number not in revived
        and is_audited(seed, trial.number, share)
    ]


def pruning_cost(
    trials: Sequence[FrozenTrial], seed: int, share: float, direction: str
) -> PruningCost:
    """What pruning has cost: how many of the audited trials would have beaten the best.

    The best is that of the trials that were not pruned. A trial revived by hand counts only if it
    is in the audit's sample: those that a person chooses say nothing about the others.

    Args:
        trials: of the study.
        seed: of the study.
        share: `tune.audit`.
        direction: "min" or "max".
    """
    from optuna.trial import TrialState

    sign = 1.0 if direction == "min" else -1.0
    pruned = {trial.number for trial in trials if trial.state == TrialState.PRUNED}
    best, ends, failed = float("inf"), dict[int, float](), set[int]()
    for trial in trials:
        number = trial.user_attrs.get(REVIVES)
        if number is None and trial.state == TrialState.COMPLETE and trial.value is not None:
            best = min(best, sign * trial.value)
        elif number in pruned and is_audited(seed, int(number), share):
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                ends[int(number)] = sign * trial.value
            elif trial.state == TrialState.FAIL:
                failed.add(int(number))
    better = sum(end < best for end in ends.values())
    low, high = clopper_pearson(better, len(ends)) if ends else (0.0, 1.0)
    return PruningCost(len(pruned), len(ends), len(failed - set(ends)), better, low, high)
