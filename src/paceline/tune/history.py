"""`trials.jsonl`: the trials of a study in lines, from which a lost database is made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from paceline.log.floats import revived

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def line_of(trial: FrozenTrial, **more: Any) -> dict[str, Any]:
    """What a line says of a trial.

    Args:
        trial: of Optuna, as its storage has it.
        **more: what only Paceline knows: `seeds`, `revives`, `folder`, `cause`, `restarts`.

    Returns:
        Plain values. Distributions are in Optuna's own JSON.
    """
    from optuna.distributions import distribution_to_json

    return {
        "number": trial.number,
        "state": trial.state.name,
        "params": dict(trial.params),
        "distributions": {
            name: json.loads(distribution_to_json(each))
            for name, each in trial.distributions.items()
        },
        "reports": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "values": None if trial.values is None else list(trial.values),
        "started": _text(trial.datetime_start),
        "ended": _text(trial.datetime_complete),
        "user_attrs": dict(trial.user_attrs),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def rebuild(study: optuna.Study, lines: Mapping[int, Mapping[str, Any]]) -> int:
    """Adds the trials of lines to a study that has none.

    A trial that was being trained waits to go on under its number with its parameters. For a number
    without a line, which no process has recorded, there is a failed trial, so that the numbers of
    the others stay.

    Args:
        study: without trials.
        lines: the last line of each trial, by its number.

    Returns:
        How many were added.
    """
    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState, create_trial

    numbers = range(max(lines) + 1) if lines else ()
    for number in numbers:
        line = lines.get(number)
        if line is None:
            study.add_trial(create_trial(state=TrialState.FAIL))
            continue
        state = TrialState[line["state"]]
        unfinished = not state.is_finished()
        params = {name: revived(value) for name, value in line["params"].items()}
        values = line["values"] if state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        study.add_trial(
            create_trial(
                state=TrialState.WAITING if unfinished else state,
                values=None if values is None else [float(revived(v)) for v in values],
                params={} if unfinished else params,
                distributions={}
                if unfinished
                else {
                    name: json_to_distribution(json.dumps(each))
                    for name, each in line["distributions"].items()
                },
                intermediate_values={}
                if unfinished
                else {int(step): float(revived(value)) for step, value in line["reports"]},
                user_attrs=dict(line["user_attrs"]),
                system_attrs={"fixed_params": params} if unfinished else {},
            )
        )
    return len(numbers)


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
