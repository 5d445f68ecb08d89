"""`paceline tune`: searches the settings with which a recipe does best."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Nproc, Overrides, Trust
from paceline.cli.ranks import start_ranks
from paceline.errors import ConfigError
from paceline.exit_codes import FAILED

if TYPE_CHECKING:
    from paceline.tune.study import Study


def tune(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|STUDY",
            help="A recipe with a section `tune:`, or the folder of a study to continue.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that run trials side by side.")
    ] = 1,
    nproc: Nproc = None,
    add: Annotated[
        int, typer.Option(min=0, metavar="N", help="Run N trials more than `tune.trials`.")
    ] = 0,
    revive: Annotated[
        str | None,
        typer.Option(
            metavar="I,J", help="Train these pruned trials to their end.", show_default=False
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an earlier study aside and begin anew.")
    ] = False,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept", help="Continue although the study was begun with another space or metric."
        ),
    ] = False,
    trust: Trust = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print what is searched; train nothing.")
    ] = False,
) -> None:
    """Runs the trials of a study; the same command continues one that was stopped or killed.

    The study is a folder of ordinary runs, the recipe's run folder. `best.yaml` there is the recipe
    of the best trial.
    """
    from paceline.tune.study import Study, TrialsFailed
    from paceline.world.world import World

    numbers = _numbers(revive)
    if workers > 1 and (nproc or 1) > 1:
        raise ConfigError("--workers with --nproc: workers of several ranks do not exist yet.")
    study = Study(
        recipe, overrides=overrides or (), trust=tuple(trust or ()), fresh=fresh, accept=accept
    )
    if dry_run:
        _describe(study)
        return
    start_ranks(nproc)
    try:
        study.optimize(workers=workers, add=add, revived=numbers)
    except TrialsFailed as error:
        from paceline.log.secrets import mask_credentials

        print(f"paceline: {mask_credentials(str(error))}", file=sys.stderr, flush=True)
        raise typer.Exit(FAILED) from None
    if World().is_main:
        for line in summary(study):
            print(line, flush=True)


def _numbers(text: str | None) -> list[int]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--revive {text}: expected numbers of trials, such as --revive 3,7.")
    return [int(word) for word in words]


def _describe(study: Study) -> None:
    """Prints what would be searched, and where."""
    settings = study.settings
    named = zip(settings.metrics, settings.directions, strict=True)
    print(f"study: {study.folder.path}")
    print("optimises: " + ", ".join(f"{metric} ({direction})" for metric, direction in named))
    print(f"trials: {settings.trials}, sampler {settings.sampler['type']}", end="")
    print(f", pruner {settings.pruner['type']}")
    for parameter in study.space.parameters:
        if parameter.kind == "choices":
            what = ", ".join(str(name) for name, _ in parameter.choices)
        else:
            what = f"{parameter.kind} from {parameter.low:g} to {parameter.high:g}"
            what += ", log" if parameter.log else ""
            what += f", step {parameter.step:g}" if parameter.step is not None else ""
        when = ", ".join(f"{key} is {value}" for key, value in parameter.when)
        print(f"  {parameter.key}: {what}" + (f" (when {when})" if when else ""))


def summary(study: Study) -> list[str]:
    """What a study has come to, in lines.

    Args:
        study: with its trials.
    """
    from paceline.log.files import shown
    from paceline.tune.folder import BEST_FILE
    from paceline.tune.study import best_of

    trials = study.trials
    names = [trial.state.name.lower() for trial in trials]
    words = {"complete": "complete", "pruned": "pruned", "fail": "failed", "running": "open"}
    counts = ", ".join(f"{names.count(k)} {word}" for k, word in words.items() if k in names)
    lines = [f"{len(trials)} trials in {shown(study.folder.path)}: {counts or 'none'}"]
    best = best_of(trials, study.settings)
    if best is not None:
        lines.append(f"best: trial {best.number}, {study.settings.metrics[0]} {best.value:.6g}")
        lines += [f"  {key} = {value}" for key, value in study.best_params.items()]
        lines.append(f"its recipe: {shown(study.folder.path / BEST_FILE)}")
    return lines
