"""`paceline evaluate`: validates a checkpoint again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from paceline.cli.options import (
    Checkpoint,
    Nproc,
    Overrides,
    Run,
    Trust,
    Weights,
    WhichWeights,
)
from paceline.cli.ranks import start_ranks

_ROUNDING = 1e-6  # float32 has 24 bits


def evaluate(
    run: Run,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    weights: WhichWeights = Weights.auto,
    nproc: Nproc = None,
    trust: Trust = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Validates a checkpoint of a run again, and says whether the run logged the same.

    This builds the run's trainer, with the code that trained it. Of a policy that was trained by
    reinforcement, evaluation.json and evaluation.html are written in the run's folder, with
    baselines beside it; of others nothing is.
    """
    start_ranks(nproc)
    from paceline.cli.reports import own_output_apart
    from paceline.log.floats import as_text
    from paceline.recipe.trained import load_trainer

    with own_output_apart():
        allowed = tuple(trust or ())
        trained = load_trainer(run, overrides or (), checkpoint=checkpoint, trust=allowed)
        trainer = trained.trainer
        which = {"checkpoint": trained.checkpoint.path, "weights": weights.value}
        beside = getattr(trainer, "full_evaluation", None)
        full = None if beside is None else beside(**which)
        metrics = trainer.evaluate(**which) if full is None else full.metrics
    if not trainer.world.is_main:
        return
    logged = trained.logged
    report: dict[str, Any] = {
        "checkpoint": trained.checkpoint.path.name,
        "step": trained.checkpoint.step,
        "metrics": metrics,
        "logged": logged,
        "equal": None if logged is None else _equal(metrics or {}, logged),
        "difference": None if logged is None else _difference(metrics or {}, logged),
    }
    if full is not None:
        what = {"run": str(run), "checkpoint": report["checkpoint"], "step": report["step"]}
        full.report.update(what)
        report["files"] = [str(path) for path in full.write(run)]
    if as_json:
        for name in ("metrics", "logged"):  # JSON has no NaN
            report[name] = {k: as_text(v) for k, v in (report[name] or {}).items()} or None
        print(json.dumps(report))
    else:
        _show(report)
        if full is not None:
            _show_beside(full.report, report["files"])


def _equal(metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> bool:
    """Whether each metric that was measured is what the run logged, bit by bit."""
    return all(name in logged and _same(value, logged[name]) for name, value in metrics.items())


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)  # NaN is the same as NaN


def _difference(metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> float | None:
    """The largest difference, as a share of the logged value; None if one has no such number."""
    shares = [0.0]
    for name, value in metrics.items():
        before = logged.get(name)
        if before is None or not math.isfinite(before) or not math.isfinite(value):
            return None
        shares.append(abs(value - before) / (abs(before) or 1.0))
    return max(shares)


def _show(report: Mapping[str, Any]) -> None:
    from paceline.runs.text import printable

    metrics, logged = report["metrics"], report["logged"]
    print(f"{report['checkpoint']}, step {report['step']}:")
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        before = value if logged is None else logged.get(name, "nothing")
        beside = "" if _same(value, before) else f"   logged: {before}"
        shown = value if beside else f"{value:.6g}"  # what differs may do so in the last digit
        print(printable(f"  {name:{width}}  {shown}{beside}"))
    if logged is None:
        print("The run logged no validation at this step.")
    elif report["equal"]:
        print("The same as the run logged, bit by bit.")
    elif report["difference"] is not None and report["difference"] <= _ROUNDING:
        print(
            f"The same as the run logged but for rounding (at most {report['difference']:.0e} of a "
            "value): other ranks or batches add up in another order."
        )
    else:
        print("Not the same as the run logged.")


def _show_beside(report: Mapping[str, Any], files: Sequence[str]) -> None:
    """Prints what other policies were worth in the same episodes."""
    for name, gained in report["gains"].items():
        if gained is not None:
            mean, low, high = gained
            print(f"  beside {name}: {mean:+.4g} (95 % interval {low:.4g} to {high:.4g})")
    for name, why in report["left_out"].items():
        print(f"  not beside {name}: {why}")
    print(f"Written: {' and '.join(files)}.")
