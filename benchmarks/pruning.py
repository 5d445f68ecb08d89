"""Pruning replayed on stored real curves: what each pruner spends, and what it loses.

The sets in `curves/` (see `pruning_curves.py`) are replayed in orders drawn at random, one trial
after the other, each with its 20 reports; the pruners are those of `tune.pruner`. `wilcoxon`
compares seeds instead of reports, and is replayed on the set that has several.

- spent: the share of all reports that were trained.
- best pruned: in how many orders the best configuration of the set was pruned.
- regret: the value of the best complete trial minus that of the set's best, in per cent of the
  latter; the mean over the orders, and the largest.
- audit: in how many orders with pruned trials the 95 % interval from a tenth of them covers the
  true share of pruned trials that would have beaten the best; where the sample is empty the
  interval is that from 0 to 1, and these orders are counted apart.

    python benchmarks/pruning.py [--rounds 20] [--scan]

`--scan` shows `predicted_final` with other `top_k` and `z`: its defaults were chosen by that.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import common
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from paceline.tune import predicted_final
from paceline.tune.audit import clopper_pearson, is_audited
from paceline.tune.pruners import pruner_for

CURVES = Path(__file__).parent / "curves"
REPORTS = 20
SHARE = 0.1  # of the pruned trials that the audit trains to the end
PRUNERS: list[dict[str, Any]] = [
    {"type": "none"},
    {"type": "median"},
    {"type": "percentile", "percentile": 25.0},
    {"type": "halving"},
    {"type": "hyperband"},
    {"type": "patient", "patience": 3, "pruner": {"type": "median"}},
    {"type": "threshold", "upper": 2.5, "n_warmup_steps": 10},
    {"type": "wilcoxon"},
    {"type": "predicted_final"},
]


class Replay:
    """What pruners see of a study, without a storage.

    Args:
        trials: the list that grows.
    """

    direction = StudyDirection.MINIMIZE

    def __init__(self, trials: list[FrozenTrial]) -> None:
        self._trials = trials

    def get_trials(
        self, deepcopy: bool = True, states: Collection[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials so far."""
        return [t for t in self._trials if states is None or t.state in states]

    @property
    def best_trial(self) -> FrozenTrial:
        """The best complete trial."""
        ended = self.get_trials(states=(TrialState.COMPLETE,))
        return min(ended, key=lambda trial: trial.value or 0.0)  # ValueError if there is none


def replayed(
    settings: dict[str, Any], curves: list[list[float]], value: str = "end"
) -> list[tuple[int, bool]]:
    """How many reports each trial gives, and whether it is pruned then.

    Args:
        settings: of the pruner.
        curves: of the trials in their order.
        value: a trial's value: the "end" of its curve, or the "mean".
    """
    pruner, trials, found = (
        pruner_for(settings, REPORTS),
        list[FrozenTrial](),
        list[tuple[int, bool]](),
    )
    study: Any = Replay(trials)
    for number, curve in enumerate(curves):
        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        trials.append(trial)
        for step, reported in enumerate(curve, 1):
            trial.intermediate_values[step] = reported
            if pruner.prune(study, trial):
                trial.state = TrialState.PRUNED
                break
        else:
            trial.state = TrialState.COMPLETE
            trial.value = curve[-1] if value == "end" else statistics.fmean(curve)
        found.append((step, trial.state == TrialState.PRUNED))
    return found


def order_of(settings: dict[str, Any], curves: list[list[float]], seed: int) -> dict[str, Any]:
    """One order: what it spends and loses, and what the audit says."""
    order = list(range(len(curves)))
    random.Random(seed).shuffle(order)
    mine = [curves[i] for i in order]
    by_mean = settings["type"] == "wilcoxon"
    lengths = replayed(settings, mine, "mean" if by_mean else "end")
    ends = [statistics.fmean(curve) if by_mean else curve[-1] for curve in mine]
    pruned = [i for i, (_, ended) in enumerate(lengths) if ended]
    best = min(ends)
    reached = min(end for i, end in enumerate(ends) if i not in pruned)
    better = [i for i in pruned if ends[i] < reached]
    sample = [i for i in pruned if is_audited(seed, i, SHARE)]
    hit = sum(i in better for i in sample)
    low, high = clopper_pearson(hit, len(sample)) if sample else (0.0, 1.0)
    share = len(better) / len(pruned) if pruned else 0.0
    return {
        "spent": sum(length for length, _ in lengths) / sum(map(len, mine)),
        "lost": best < reached,
        "regret": 100 * (reached / best - 1),
        "pruned": len(pruned),
        "sample": len(sample),
        "share": share,
        "interval": [low, high],
        "covers": low <= share <= high,
    }


def sets() -> dict[str, list[dict[str, Any]]]:
    """The stored configurations with their curves, by set."""
    names = ("digits", "manual", "schedules")
    return {name: json.loads((CURVES / f"{name}.json").read_text()) for name in names}


def curves_of(settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[float]] | None:
    """The values that a pruner compares; None where the set has none."""
    if settings["type"] == "wilcoxon":
        return [row["ends"] for row in rows] if "ends" in rows[0] else None
    return [row["losses"] for row in rows]


def named(settings: dict[str, Any]) -> str:
    """A pruner with its arguments."""
    given = [
        f"{key} {value['type'] if key == 'pruner' else value}"
        for key, value in settings.items()
        if key != "type"
    ]
    return settings["type"] + (f" ({', '.join(given)})" if given else "")


def row_of(settings: dict[str, Any], orders: list[dict[str, Any]]) -> list[str]:
    """A pruner's line in the table."""
    count = len(orders)
    audited = [one for one in orders if one["pruned"]]
    empty = sum(not one["sample"] for one in audited)
    regrets = [one["regret"] for one in orders]
    return [
        named(settings),
        f"{statistics.fmean(one['spent'] for one in orders):.2f}",
        f"{sum(one['lost'] for one in orders)} of {count}",
        f"{statistics.fmean(regrets):.1f} ({max(regrets):.1f})",
        f"{sum(one['covers'] for one in audited)} of {len(audited)} ({empty} empty)",
    ]


def main() -> None:
    parser = common.arguments(__doc__, rounds=20)
    parser.add_argument("--scan", action="store_true", help="predicted_final, other settings")
    options = parser.parse_args()
    at = common.machine()
    # The curves are the same in every order; so are the fits.
    predicted_final.predict_final = functools.cache(predicted_final.predict_final)
    pruners = PRUNERS
    if options.scan:
        pruners = [
            {"type": "predicted_final", "top_k": k, "z": z}
            for k in (1, 3, 5)
            for z in (0.0, 1.0, 2.0, 2.75, 3.5)
        ]
    text, data = "# Pruning replayed on stored real curves\n", dict[str, Any]()
    text += (
        f"\n60 configurations a set, {options.rounds} orders; regret in per cent: mean (most).\n"
    )
    for name, rows in sets().items():
        lines = []
        for settings in pruners:
            curves = curves_of(settings, rows)
            if curves is None:
                continue
            orders = [order_of(settings, curves, seed) for seed in range(options.rounds)]
            data.setdefault(name, {})[named(settings)] = orders
            lines.append(row_of(settings, orders))
        head = ["pruner", "spent", "best pruned", "regret", "audit covers"]
        text += f"\n## {name}\n\n{common.table(head, lines)}\n"
    common.save("pruning", text, {"orders": data}, at, trial=options.scan)


if __name__ == "__main__":
    main()
