"""What `paceline evaluate` leaves of a policy: evaluation.json, and a page to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.log.files import replacing
from paceline.log.html import Colour, Page
from paceline.rl.played import Played, by_case, diversity, gain, summary

JSON_FILE = "evaluation.json"
PAGE_FILE = "evaluation.html"
_BINS = 10  # of a distribution
_SHOWN = 40  # prompts whose dialogues are on the page; the JSON file has all
_LIKELIHOOD = "likelihood"  # the reward of this name


@dataclass(frozen=True)
class FullEvaluation:
    """An evaluation of a trained policy beside its baselines.

    Attributes:
        metrics: of the trained policy, as `evaluate` returns them.
        report: what evaluation.json holds.
    """

    metrics: dict[str, float]
    report: dict[str, Any]

    def write(self, folder: Path) -> list[Path]:
        """Writes evaluation.json and evaluation.html, in place of earlier ones.

        Args:
            folder: of the run.

        Returns:
            The files.
        """
        path = folder / JSON_FILE
        with replacing(path) as file:
            file.write(json.dumps(_finite(self.report), indent=2, allow_nan=False) + "\n")
        page_of(self.report).write(folder / PAGE_FILE)
        return [path, folder / PAGE_FILE]


def report_of(
    played: Mapping[str, Sequence[Played]],
    *,
    kind: str,
    seed: int,
    threshold: float | None,
    attempts: int,
    prompts: Sequence[Any],
) -> dict[str, Any]:
    """All that is said of an evaluation.

    Args:
        played: the episodes of each policy by its name, "trained" first.
        kind: "return" or "reward", what an episode is worth.
        seed: of the intervals' resampling.
        threshold: the value from which on an episode is a success; None to count none.
        attempts: at each prompt.
        prompts: that were played; empty where fresh episodes were.

    Returns:
        Plain values. "policies" has for each policy its `summary` and the `diversity` of its
        probes; "gains" by how much the trained policy is worth more than each other, with the
        paired 95 % interval, and with several attempts "best of N", the same of each case's best of
        as many attempts by both; "cases" what each case was worth to each policy; "distribution"
        how many episodes lie in each of ten bins.
    """
    trained = played["trained"]
    gains: dict[str, Any] = {}
    for name, episodes in played.items():
        if name == "trained":
            continue
        gains[name] = _interval(gain(trained, episodes, seed))
        if attempts > 1:
            best = gain(trained, episodes, seed, best=True)
            gains[f"{name}, best of {attempts}"] = _interval(best)
    cases = []
    values = {name: by_case(episodes) for name, episodes in played.items()}
    for case in sorted({one.case for one in trained}):
        worth = {name: values[name].get(case, []) for name in played}
        line: dict[str, Any] = {"prompt": prompts[case]} if len(prompts) else {"episode": case}
        line |= {"values": worth}
        if threshold is not None:
            line["success"] = {n: _share(v, threshold) for n, v in worth.items()}
        cases.append(line)
    return {
        "kind": kind,
        "threshold": threshold,
        "attempts": attempts,
        "seed": seed,
        "policies": {
            name: {
                **summary(episodes, seed, threshold, attempts),
                "episodes": len(episodes),
                "skipped": sum(one.value is None for one in episodes),
                "length": float(np.mean([one.length for one in episodes])),
                "diversity": diversity(episodes),
            }
            for name, episodes in played.items()
        },
        "gains": gains,
        "distribution": _distribution({n: [one.value for one in p] for n, p in played.items()}),
        "likelihood": {name: _by_likelihood(episodes) for name, episodes in played.items()},
        "cases": cases,
        "dialogues": {
            name: [{"case": one.case, **one.record} for one in episodes if one.record]
            for name, episodes in played.items()
        },
    }


def page_of(report: Mapping[str, Any]) -> Page:
    """The report as a page.

    Args:
        report: from `report_of`.
    """
    page = Page("Evaluation")
    if "checkpoint" in report:
        page.paragraph(f"{report['run']}, {report['checkpoint']}, step {report['step']}.")
    kind, policies = report["kind"], report["policies"]
    page.heading("Policies")
    names = [n for n in dict.fromkeys(k for p in policies.values() for k in p) if n != "diversity"]
    page.table(
        ["policy", *(kind if n == "mean" else n.replace("_", " ") for n in names)],
        [[name, *(p.get(n) for n in names)] for name, p in policies.items()],
    )
    page.paragraph(
        f"low and high are the ends of the mean {kind}'s 95 % interval, for which prompts or "
        "episodes are drawn anew."
    )
    for name, why in report.get("left_out", {}).items():
        page.paragraph(f"Without {name}: {why}.")
    if report["gains"]:
        page.heading("Trained, less another")
        page.table(
            ["the other", f"mean difference of the {kind}", "low", "high"],
            [[n, *(g or [None] * 3)] for n, g in report["gains"].items()],
        )
        page.paragraph("The same episodes or prompts, pair by pair, with a 95 % interval.")
    spread = list(dict.fromkeys(k for p in policies.values() for k in p["diversity"]))
    if spread:
        page.heading("Diversity")
        rows = [[n, *(p["diversity"].get(k) for k in spread)] for n, p in policies.items()]
        page.table(["policy", *spread], rows)
        page.paragraph(
            "distinct is the share of different probes, distance the mean of 1 less the share of "
            "words and word pairs that two probes have in common."
        )
    page.heading(f"Distribution of the {kind}")
    bins = report["distribution"]
    page.table(
        ["from", "to", *policies],
        [[low, high, *counts.values()] for low, high, counts in bins],
    )
    if any(report["likelihood"].values()):
        page.heading("Reward by likelihood")
        page.paragraph(
            "Turns in four equal parts, from the least to the most likely probes: the natural "
            "logarithm of the probability of a token under the target, and the mean reward."
        )
        rows = [[n, *part] for n, parts in report["likelihood"].items() for part in parts]
        page.table(["policy", "from", "to", "turns", "mean reward"], rows)
    page.heading("Cases")
    _cases(page, report)
    _dialogues(page, report)
    return page


def _cases(page: Page, report: Mapping[str, Any]) -> None:
    policies, cases = list(report["policies"]), report["cases"]
    rates = [f"{name}, success" for name in policies] if report["threshold"] is not None else []
    rows = []
    for line in cases[: 10 * _SHOWN]:
        means = [_mean(line["values"][name]) for name in policies]
        rows.append(
            [
                _text(line.get("prompt", line.get("episode"))),
                *means,
                *(line["success"][name] for name in policies if rates),
            ]
        )
    page.table(["case", *policies, *rates], rows)
    if len(rows) < len(cases):
        page.paragraph(f"The first {len(rows)} of {len(cases)}; {JSON_FILE} has all.")


def _dialogues(page: Page, report: Mapping[str, Any]) -> None:
    dialogues = report["dialogues"].get("trained", ())
    if not dialogues:
        return
    page.heading("Dialogues of the trained policy")
    shown = [one for one in dialogues if one["case"] < _SHOWN]
    for one in shown:
        page.spans(_tree(one, report["threshold"]))
    if len(shown) < len(dialogues):
        page.paragraph(f"Of the first {_SHOWN} prompts; {JSON_FILE} has all.")


def _tree(record: Mapping[str, Any], threshold: float | None) -> list[tuple[str, Colour | None]]:
    """An episode as text: each turn below the one before it, further to the right."""
    pieces: list[tuple[str, Colour | None]] = [(f"{_text(record['context'])}\n", "grey")]
    depths: list[int] = []
    for turn in record["turns"]:
        parent = turn["parent"]
        depths.append(1 if parent is None else depths[parent] + 1)
        indent = "    " * depths[-1]
        success = threshold is not None and turn["reward"] >= threshold
        pieces.append((f"{indent}{_text(turn['probe'])}\n", None))
        if turn["response"]:
            pieces.append((f"{indent}-> {_text(turn['response'])}\n", None))
        parts = ", ".join(f"{n} {v:.3g}" for n, v in turn.get("rewards", {}).items())
        worth = f"{indent}{turn['reward']:.3g}" + (f" ({parts})" if parts else "")
        pieces.append((f"{worth}\n", "green" if success else "grey"))
    for why, count in record["skipped"].items():
        pieces.append((f"    given up: {count} ({why})\n", "red"))
    return pieces


def _distribution(values: Mapping[str, Sequence[float | None]]) -> list[tuple[float, float, Any]]:
    known = {name: [v for v in found if v is not None] for name, found in values.items()}
    every = [value for found in known.values() for value in found]
    if not every:
        return []
    edges = np.histogram_bin_edges(every, bins=_BINS)
    counts = {name: np.histogram(found, bins=edges)[0].tolist() for name, found in known.items()}
    return [
        (float(edges[i]), float(edges[i + 1]), {name: c[i] for name, c in counts.items()})
        for i in range(_BINS)
    ]


def _by_likelihood(played: Sequence[Played]) -> list[tuple[float, float, int, float]]:
    """(from, to, turns, mean reward) of four equal parts of the turns, the least likely first."""
    turns = [turn for one in played for turn in one.record.get("turns", ())]
    pairs = sorted(
        (turn["rewards"][_LIKELIHOOD], turn["reward"])
        for turn in turns
        if _LIKELIHOOD in turn.get("rewards", {})
    )
    found = []
    for part in np.array_split(np.array(pairs).reshape(-1, 2), 4):
        if len(part):
            ends = float(part[0, 0]), float(part[-1, 0])
            found.append((*ends, len(part), float(part[:, 1].mean())))
    return found


def _interval(found: tuple[float, float, float] | None) -> list[float] | None:
    return None if found is None else list(found)


def _share(values: Sequence[float], threshold: float) -> float | None:
    return float(np.mean([value >= threshold for value in values])) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """With None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
