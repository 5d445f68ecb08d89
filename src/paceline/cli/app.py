"""The command `paceline`. Each subcommand has its own file beside this one."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from paceline.cli.data import data
from paceline.cli.doctor import doctor
from paceline.cli.evaluate import evaluate
from paceline.cli.export import export
from paceline.cli.list import list_names
from paceline.cli.new import new
from paceline.cli.predict import predict
from paceline.cli.preflight import preflight
from paceline.cli.preview import preview
from paceline.cli.ranks import announce_failure
from paceline.cli.rollouts import rollouts
from paceline.cli.runs import runs
from paceline.cli.streams import make_lasting
from paceline.cli.sync import sync
from paceline.cli.train import train
from paceline.cli.tune import tune
from paceline.errors import CheckpointError, ConfigError, PacelineError
from paceline.exit_codes import FAILED, USAGE

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(tune)
app.command()(runs)
app.command()(preflight)
app.command()(evaluate)
app.command()(predict)
app.command()(export)
app.command()(data)
app.command()(rollouts)
app.command()(sync)
app.command()(preview)
app.command("list")(list_names)
app.command()(new)
app.command()(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"paceline {version('paceline')}")
        raise typer.Exit


@app.callback()
def paceline(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train PyTorch models from recipes.

    Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 75 stopped by a signal, a time limit or a
    stop file, and saved: the same command resumes the run.
    """


def run() -> None:
    """Runs the command line and exits with its code."""
    make_lasting()
    try:
        app(prog_name="paceline")
    except PacelineError as error:
        if not _is_told_by_another(error):
            _show(error)
        _end(USAGE if isinstance(error, ConfigError) else FAILED, error)
    except Exception as error:  # noqa: BLE001 - of the user's own code
        if not _is_told_by_another(error):
            from paceline.log.traceback import told_in_full

            who = f"{_rank()} failed:\n" if _rank() else ""
            print(f"{who}{told_in_full(error)}", file=sys.stderr, flush=True)
        _end(FAILED, error)


def _end(code: int, error: Exception) -> NoReturn:
    """Exits, after informing those that wait for this process: other ranks, other launchers."""
    if _rank():
        from paceline.world.environment import tell_launcher
        from paceline.world.meeting import announce_exit

        tell_launcher(error)
        announce_exit(code, error)
    announce_failure(code, error)
    sys.exit(code)


def _is_told_by_another(error: Exception) -> bool:
    """Whether another rank failed first and shows its error, so that here a line is enough."""
    from paceline.log.secrets import mask_credentials
    from paceline.log.traceback import SWITCH, behind_another

    found = behind_another(error)
    if found is None or os.environ.get(SWITCH) == "full":
        return False
    failed, what, is_all = found
    rank, place = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if not is_all:
        line = f"rank {rank} failed too: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    elif place == int(failed == rank - place):  # the first on this machine but for that one
        line = f"rank {rank} ended, as the others did, because {what}"
    else:
        return True
    print(mask_credentials(line), file=sys.stderr, flush=True)
    return True


def _show(error: PacelineError) -> None:
    """An error as one message, with the traceback if the user's own code is the cause."""
    from rich.console import Console
    from rich.text import Text

    from paceline.log.secrets import mask_credentials
    from paceline.log.traceback import told_in_full
    from paceline.runs.text import printable

    console = Console(stderr=True, soft_wrap=True)
    cause = error.__cause__
    while isinstance(cause, PacelineError):  # which says what it has to say in its message
        cause = cause.__cause__
    of_disk = isinstance(error, CheckpointError) and isinstance(cause, OSError)
    if cause is not None and not of_disk and not isinstance(error, ConfigError):
        console.print(Text(told_in_full(cause)), style="dim")
    where = f"{_rank()}: " if _rank() else ""
    # Mistakes in a recipe need no class name; other errors do.
    name = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    told = "\n".join(map(printable, mask_credentials(f"{name}{error}").split("\n")))
    console.print(Text.assemble((f"{where}error: ", "bold red"), told))


def _rank() -> str | None:
    """`"rank 3"` in a world of several processes, else None."""
    return f"rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
