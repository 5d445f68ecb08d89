"""`paceline train`: a run from a recipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.errors import ConfigError

if TYPE_CHECKING:  # torch is imported when it is known to be needed, so that --help is quick
    from paceline.recipe.recipe import Recipe
    from paceline.trainer.settings import Resume


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|must|PATH", help="Go on with an earlier run, or not."),
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an earlier run aside and start again.")
    ] = False,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Resume although KEY has changed.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="First weights from a run or an export.")
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Let the recipe name things from PACKAGE too."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it, and build nothing.")
    ] = False,
) -> None:
    """Trains what a recipe describes; started again, it goes on where it stopped."""
    if fresh and resume != "auto":
        raise ConfigError("--fresh and --resume exclude each other.")
    with _stop_cleanly_before_training():
        from paceline.recipe.recipe import load_recipe
        from paceline.trainer.settings import Resume
        from paceline.world.launch import follow_launcher

        follow_launcher()
        loaded = load_recipe(recipe, overrides or (), trust=tuple(trust or ()))
        if dry_run:
            _print(loaded)
        elif _is_worker(nproc):
            mode = "fresh" if fresh else resume
            _train(loaded, Resume(mode=mode, accept=tuple(accept or ()), init_from=init_from))
        else:
            raise typer.Exit(_launch(nproc or 1))


def _is_worker(nproc: int | None) -> bool:
    """Whether this process trains, rather than start those that do."""
    world = os.environ.get("WORLD_SIZE")
    if world is None:
        return nproc is None or nproc == 1
    if nproc not in (None, int(world)):
        raise ConfigError(
            f"--nproc {nproc}: this process was started as one of {world} already; leave it out."
        )
    return True


def _launch(nproc: int) -> int:
    from paceline.world.launch import launch

    # The workers get this command line as it was given.
    return launch(nproc, sys.argv[1:])


def _train(recipe: Recipe, resume: Resume) -> None:
    from paceline.recipe.seeds import train_recipe, train_seeds

    if recipe.seeds:
        train_seeds(recipe, resume)
    else:
        train_recipe(recipe, resume)


def _print(recipe: Recipe) -> None:
    print(recipe.composed.text().rstrip())
    for decision, setting in recipe.plan:
        print(f"plan: {decision}  [{setting}]")


@contextlib.contextmanager
def _stop_cleanly_before_training() -> Iterator[None]:
    """A signal while imports run and objects are built is a clean stop too: nothing is lost.

    The trainer has handlers of its own while it trains.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(75)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
