"""`paceline train`: trains a recipe."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Nproc, Overrides, RecipeFile, Trust, check_tune
from paceline.cli.ranks import awaits, check_launcher, launch_again
from paceline.errors import ConfigError
from paceline.exit_codes import FAILED

if TYPE_CHECKING:  # torch is imported only once it is needed, so that --help is quick
    from paceline.recipe.recipe import Recipe
    from paceline.trainer.settings import Resume
    from paceline.world.rendezvous import Rendezvous


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Machines on which this command is started.")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where these machines rendezvous.")
    ] = None,
    rdzv_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="The run's name there, to tell runs apart.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to restart all processes after a failure.")
    ] = 0,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Submit to Slurm, with this setting of submitit."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|must|PATH", help="Whether to resume an earlier run."),
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an earlier run aside and start again.")
    ] = False,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Resume although KEY has changed.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="Initial weights from a run or an export.")
    ] = None,
    trust: Trust = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the recipe; build nothing.")
    ] = False,
    replay_failure: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Take the step of this run that was not finite once more, and name the module "
            "that it comes from. Exit code 1 if it is not finite again.",
        ),
    ] = None,
) -> None:
    """Trains a recipe or a RunConfig; the same command resumes a run that was stopped."""
    if fresh and resume != "auto":
        raise ConfigError("--fresh and --resume exclude each other.")
    others = (fresh, resume != "auto", slurm, dry_run, nnodes, max_restarts)
    if replay_failure is not None and any(others):
        raise ConfigError(
            "--replay-failure goes with --nproc, --accept, --init-from and --trust; leave the "
            "other options out."
        )
    with _nothing_collected():
        from paceline.recipe.recipe import is_run_config, load_recipe
        from paceline.trainer.settings import Resume
        from paceline.world.environment import adopt_slurm, follow_launcher
        from paceline.world.rendezvous import ONE_MACHINE

        if nnodes is None:  # else a task of srun is one of the launchers, not of the ranks
            adopt_slurm()
        machines = _machines(nnodes, rdzv_endpoint, rdzv_id)
        started_by_us = follow_launcher()
        if not started_by_us:
            check_launcher(nproc, nnodes, max_restarts)
            if "WORLD_SIZE" not in os.environ and not dry_run:
                awaits(machines)
        flat = is_run_config(recipe)
        allowed = tuple(trust or ())
        loaded = None if flat else load_recipe(recipe, overrides or (), trust=allowed)
        if loaded is not None:
            check_tune(loaded)
    here = started_by_us or "WORLD_SIZE" in os.environ
    alone = here or (nproc or 1, machines, max_restarts) == (1, ONE_MACHINE, 0)
    how = Resume("fresh" if fresh else resume, accept=tuple(accept or ()), init_from=init_from)
    if loaded is None:
        if replay_failure is not None:
            raise ConfigError("--replay-failure takes recipes, and no RunConfig.")
        if slurm:
            raise ConfigError("--slurm takes recipes; start a RunConfig with srun.")
        if not alone and not dry_run:
            raise typer.Exit(launch_again(nproc or 1, machines, max_restarts))
        return _train_config(recipe, overrides or (), allowed, how, dry_run)
    if replay_failure is not None:
        from paceline.checkup.replay import last_failure

        last_failure(replay_failure)  # before any process is started for it
        if alone:
            return _replay(loaded, replay_failure, how)
    if slurm or resume == "must":
        loaded.check_folder_stays("--slurm" if slurm else "--resume must")
    if dry_run:
        _print(loaded)
    elif slurm:
        _submit(loaded, slurm, (nproc, nnodes, max_restarts) == (None, None, 0) and not here)
    elif alone:
        _train(loaded, how)
    else:
        raise typer.Exit(launch_again(nproc or 1, machines, max_restarts))


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Switches garbage collection off while modules are imported: there is no garbage yet.

    With torch in memory each collection takes as long as the work that it interrupts, and there is
    one more at the end of the process.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _machines(nnodes: int | None, endpoint: str | None, name: str | None) -> Rendezvous:
    from paceline.world.rendezvous import Rendezvous

    if nnodes is None and (endpoint or name):
        raise ConfigError(
            f"--rdzv-{'endpoint' if endpoint else 'id'} is for several machines: give their number "
            "with --nnodes."
        )
    return Rendezvous(nnodes or 1, endpoint, name or Rendezvous.id)


def _submit(recipe: Recipe, settings: Sequence[str], alone: bool) -> None:
    from paceline.cli.slurm import submit

    if not alone:
        raise ConfigError(
            "--slurm submits a job whose tasks are the processes: set their number with "
            "--slurm nodes=N --slurm tasks_per_node=N, and leave out other launchers' options."
        )
    # Beside the run folder, which --fresh moves aside.
    folder = recipe.run_dir.with_name(f"{recipe.run_dir.name}.slurm")
    job = submit(recipe.name, folder, sys.argv[1:], settings)
    print(f"submitted as job {job}; its output is in {folder / job}")


def _train(recipe: Recipe, resume: Resume) -> None:
    from paceline.recipe.seeds import train_recipe, train_seeds

    if recipe.seeds:
        if train_seeds(recipe, resume).failed:
            raise typer.Exit(FAILED)
    else:
        train_recipe(recipe, resume)


def _replay(recipe: Recipe, run: Path, resume: Resume) -> None:
    """Takes the run's step that was not finite once more, and says where that began."""
    from paceline.checkup.replay import replay_failure, seed_of
    from paceline.cli.reports import own_output_apart
    from paceline.errors import Preempted
    from paceline.recipe.builder import build_trainer

    seed = seed_of(run)
    if recipe.seeds and seed is not None:
        recipe = recipe.of_seed(seed)
    if seed not in (None, recipe.seed):
        raise ConfigError(f"{run} was trained with seed {seed}: write seed={seed}.")
    try:
        with own_output_apart():
            trainer = build_trainer(recipe, resume=resume)
            replay = replay_failure(trainer, run)
    except Preempted as stop:
        print(f"paceline: the replay was stopped by {stop.result.stopped_by}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if trainer.world.is_main:
        print(replay, flush=True)
    if replay.reproduced:
        raise typer.Exit(FAILED)


def _train_config(
    path: Path, overrides: Sequence[str], trust: Sequence[str], resume: Resume, dry_run: bool
) -> None:
    """Trains a file in RunConfig's form, or only checks and prints it."""
    import yaml

    from paceline.tune import RunConfig
    from paceline.tune.running import failed, train_config
    from paceline.world.world import World

    config = RunConfig.from_yaml(path, overrides, trust=trust)
    if dry_run:
        config.validate_for_execution()
        if World().is_main:
            print(yaml.safe_dump(config.to_dict(), sort_keys=False).rstrip())
            for warning in config.validate_semantics():
                print(f"paceline: warning: {warning}", file=sys.stderr, flush=True)
        return
    mean = train_config(config, resume=resume)
    if World().is_main:
        print(f"mean val/loss: {mean:.6g}", flush=True)
    if failed(config):
        raise typer.Exit(FAILED)


def _print(recipe: Recipe) -> None:
    from paceline.world.world import World

    if not World().is_main:
        return
    print(recipe.composed.text().rstrip())
    for decision, setting in recipe.plan:
        print(f"plan: {decision}  [{setting}]")
