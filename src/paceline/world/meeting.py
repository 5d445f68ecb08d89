"""Where the ranks meet before they are a process group: the store of their rendezvous.

Until they have met, nobody but a launcher knows of a rank that fails or is signalled, and the
others would wait for it. An agent (torchrun, `paceline train --nproc`) ends them; started
without one (srun), they learn of it here. The first word in the store counts: that all have met, or
who has left and why. So either all go on or none does.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from paceline.errors import ConfigError, PeerError, in_a_line
from paceline.exit_codes import STOPPED, USAGE
from paceline.world import signals
from paceline.world.forks import spare_parents_garbage
from paceline.world.layout import Parallel

# The stores through which this process joined others, by address. They are kept while the process
# lives, so that a second run needs no new rendezvous at a port that the first one has just
# released, and so that other ranks can still read the error of a rank whose group is gone.
_meetings: dict[tuple[str, str], Any] = {}
_held = 0  # meetings of this process that are over, equal on all ranks
_has_met = False  # the ranks have, and the run does not handle this rank's signals yet
_announced = False  # the others know why this rank exits, or the run informs them
_WORD = "word"  # the key of the first word
_MET = "met"
_POLL = 0.02  # seconds between two looks
_IN_PASSING = 1.0  # seconds for which a rank tries to inform the others of a signal
_LINGER = 10.0  # seconds for which rank 0 keeps the store for the others, and they look for it


def join(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """Creates the process group, each with its own prefix in the rendezvous store.

    Args:
        backend: of the process group.
        rank, size: this process's, and their number.
        timeout: of every wait.

    Raises:
        ConfigError: the launcher's environment gives the number of processes, but no rendezvous;
            or another rank has left for such an error.
        PeerError: another rank has left.
    """
    global _held, _has_met, _announced
    store = PrefixStore(f"paceline/{_held + 1}", _store(rank, size, timeout))
    try:
        word = _await_all(store, rank, size, timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise PeerError(
            "rank 0, whose store it was, left before the ranks had met; see its own output."
        ) from error
    if word != _MET:
        _held, _announced = _held + 1, True
        store.set(f"left/{rank}", "")
        raise _left(*json.loads(word))
    _has_met, _announced = True, False
    _held += 1
    spare_parents_garbage()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def announce_exit(code: int, why: str | BaseException) -> bool:
    """Informs the other ranks, before they have met, that this one exits.

    Does nothing where an agent looks after them, and after the run has informed them.

    Args:
        code: with which it exits.
        why: the error, or the signal's name.

    Returns:
        False if they have met already: then the run informs them.
    """
    global _held, _announced
    if _has_met:
        return False
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if _announced or size == 1 or not place or _has_agent() or dist.is_initialized():
        return True
    _announced = True
    seconds = _IN_PASSING if code == STOPPED else _LINGER  # at a signal it is soon killed
    deadline = time.monotonic() + seconds
    if rank != 0 and not _is_open(seconds):
        return True
    left = timedelta(seconds=max(deadline - time.monotonic(), _POLL))
    try:
        store = PrefixStore(f"paceline/{_held + 1}", _store(rank, size, left))
        said = json.dumps([rank, code, why if isinstance(why, str) else in_a_line(why)])
        if store.compare_set(_WORD, "", said).decode() == _MET:
            return False
        _held += 1
        store.set(f"left/{rank}", "")
        if rank == 0:  # whose store it is
            _await(store, [f"left/{other}" for other in range(size)], seconds)
    except Exception:  # noqa: BLE001  no other rank is there
        pass
    return True


def announced() -> None:
    """The run has informed the other ranks why this one exits, or failed because of another."""
    global _announced
    _announced = True


def end() -> None:
    """The meeting is over: the run handles this rank's signals, or its process group is closed."""
    global _has_met
    _has_met = False


def begin() -> None:
    """A new run is made, whose ranks have yet to meet: what an earlier one announced is past."""
    global _has_met, _announced
    _has_met = _announced = False


signals.announce_exit = announce_exit


def _left(rank: int, code: int, why: str) -> Exception:
    """What ends this rank because another has left."""
    if code == STOPPED:
        signals.leave(f"{why} to rank {rank}")
    error = ConfigError if code == USAGE else PeerError
    return error(f"rank {rank} failed before the ranks had met: {why}")


def agreed_text(name: str, text: str) -> str:
    """One rank's text, on all ranks; that of the first start, where an agent keeps its store.

    Args:
        name: what it is.
        text: this rank's.

    Returns:
        The text of the rank that came first; this rank's, if there is no other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size <= 1 or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return text
    rank, timeout = int(os.environ.get("RANK", "0")), timedelta(seconds=Parallel().timeout)
    store = _store(rank, size, timeout)
    while isinstance(store, PrefixStore):  # each start has a prefix of its own
        store = store.underlying_store
    key = f"paceline/agreed/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{name}"
    agreed = store.compare_set(key, "", text).decode()
    if not _has_agent():
        store.set(f"{key}/{rank}", "")
        if rank == 0:  # whose store it is: one that trains nothing leaves when all have read it
            others = [f"{key}/{other}" for other in range(1, size)]
            atexit.register(_await, store, others, _LINGER)
    return agreed


def _is_open(seconds: float) -> bool:
    """Whether rank 0 opens its store within a time.

    torch's own attempt to connect would do, but for its failure: composing the trace takes as long
    again as a rank has that is signalled.
    """
    deadline = time.monotonic() + seconds
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection(where, timeout=left).close()
            return True
        except OSError:
            time.sleep(_POLL)
    return False


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store in which this start's ranks meet.

    Raises:
        ConfigError: the launcher's environment gives the number of processes, but no rendezvous.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size}, but {' and '.join(missing)} not set: start the processes with "
            "torchrun, srun or `paceline train --nproc`, which set them."
        )
    where = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if where in _meetings:
        _meetings[where].set_timeout(timeout)
        return _meetings[where]
    if _has_agent():
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        store = PrefixStore(_name_of_this_start(store, rank, size, timeout), store)
    else:  # as torch does, but rank 0 does not wait in it for the others, who may have failed
        host, port = where[0], int(where[1])
        store = TCPStore(
            host, port, size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True
        )
    return _meetings.setdefault(where, store)


def _name_of_this_start(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ranks agree on, and that no earlier start of theirs had.

    An agent keeps its store when it restarts failed workers, with all keys of the dead ones, and
    its count of restarts may differ from another machine's. So each rank writes a random mark and
    accepts only an answer to that mark.

    Raises:
        PeerError: the others did not join in time.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"mark/{rank}", mine)
    missing = set(range(1, size))
    while missing and time.monotonic() < deadline:
        if rank == 0:
            missing -= {other for other in missing if _has_taken(store, other, mine)}
        elif store.check([f"answer/{rank}"]):
            mark, _, name = store.get(f"answer/{rank}").decode().partition(" ")
            if mark == mine:
                store.set(f"taken/{name}/{rank}", "")
                return name
        time.sleep(_POLL)
    if missing:
        raise PeerError(f"rank {rank} has waited {timeout} for the others to join.")
    return mine


def _has_taken(store: Store, other: int, name: str) -> bool:
    """Writes rank 0's answer to another rank's mark; returns whether that rank has read it."""
    if store.check([f"mark/{other}"]):
        store.set(f"answer/{other}", f"{store.get(f'mark/{other}').decode()} {name}")
    return store.check([f"taken/{name}/{other}"])


def _await_all(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Waits for the other ranks in Python, where signals are handled: torch's wait blocks them.

    Returns:
        The first word.
    """
    store.set(f"here/{rank}", "")
    if _has_agent():
        _await(store, [f"here/{other}" for other in range(size)], timeout.total_seconds())
        return _MET
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check([_WORD]):
        all_here = store.check([f"here/{other}" for other in range(size)])
        if all_here or time.monotonic() > deadline:
            return store.compare_set(_WORD, "", _MET).decode()
        time.sleep(_POLL)
    return store.get(_WORD).decode()


def _await(store: Store, keys: list[str], seconds: float) -> None:
    """Waits until all keys are there, or for as long."""
    deadline = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(_POLL)
