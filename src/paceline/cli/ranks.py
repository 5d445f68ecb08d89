"""A command on several processes: who starts them, and which options fit that."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import typer

from paceline.errors import ConfigError, in_a_line

if TYPE_CHECKING:
    from paceline.world.rendezvous import Rendezvous


def start_ranks(nproc: int | None) -> None:
    """Starts the processes that `--nproc` asks for, unless this is one of them, and exits.

    Args:
        nproc: how many; None for this process alone, or for as many as a launcher has started.

    Raises:
        ConfigError: another launcher has started other processes.
    """
    from paceline.world.environment import adopt_slurm, follow_launcher
    from paceline.world.rendezvous import ONE_MACHINE

    adopt_slurm()
    if follow_launcher():
        return
    check_launcher(nproc, None, 0)
    if (nproc or 1) > 1 and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(launch_again(nproc or 1, ONE_MACHINE, 0))


def check_launcher(nproc: int | None, nnodes: int | None, max_restarts: int) -> None:
    """Rejects launcher options in a process that another launcher has started.

    Args:
        nproc, nnodes, max_restarts: as given to the command.

    Raises:
        ConfigError: they ask for other processes.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is None:
        return
    given = {
        f"--nproc {nproc}": nproc not in (None, int(world)),
        f"--nnodes {nnodes}": nnodes is not None,
        f"--max-restarts {max_restarts}": max_restarts > 0,
    }
    wrong = ", ".join(option for option, is_wrong in given.items() if is_wrong)
    if wrong:
        raise ConfigError(
            f"{wrong}: this process was already started as one of {world}; leave it out, or give "
            "it to the launcher that started them."
        )


def launch_again(nproc: int, machines: Rendezvous, max_restarts: int) -> int:
    """Starts this command anew in several processes, and waits for them.

    Args:
        nproc: processes on this machine.
        machines: those that take part.
        max_restarts: how often to start all again after a failure.

    Returns:
        The exit code.
    """
    from paceline.recipe.resolvers import handed_over
    from paceline.world.launch import launch

    awaits(None)  # it tells the others itself what fails from now on
    # The workers get this command line as it was given. Those of several machines agree themselves.
    handing = handed_over() if machines.nnodes == 1 else contextlib.nullcontext()
    with handing:
        return launch(nproc, sys.argv[1:], machines=machines, max_restarts=max_restarts)


_awaited: Rendezvous | None = None  # where the launchers of other machines wait for this one


def awaits(machines: Rendezvous | None) -> None:
    """Notes that the launchers of other machines wait for this process; or no longer, with None.

    Args:
        machines: how they find each other.
    """
    global _awaited
    _awaited = machines if machines is not None and machines.nnodes > 1 else None


def announce_failure(code: int, error: Exception) -> None:
    """Tells the launchers that wait for this one, if any, that it never comes.

    Args:
        code: with which it exits.
        error: why.
    """
    global _awaited
    if _awaited is None:
        return
    machines, _awaited = _awaited, None
    from torch.distributed.elastic.rendezvous import RendezvousError

    from paceline.world.launchers import LINGER, Launchers

    with contextlib.suppress(RendezvousError):  # no other has come yet
        Launchers(machines, LINGER).tell(code, in_a_line(error))
