"""The helper process of `Ranks`: imports what is slow once, and forks the ranks."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint

from paceline.testing.ranks import free_port, packed, unpacked

# What makes a rank write the stacks of its threads: a fatal signal, which no trainer handles.
_TRACE = signal.SIGABRT
_TRACED = 1.0  # seconds in which it writes them


def serve(descriptor: int) -> None:
    """Answers the requests of one `Ranks` until it is closed."""
    connection = Connection(descriptor)
    gc.disable()  # until a rank begins: what is imported stays
    _warm_up()
    for module in unpacked(connection.recv_bytes()):
        importlib.import_module(module)
    _finalize_nothing()
    under_way: dict[tuple[int, ...], Path] = {}  # folders by the ranks' process ids
    while True:
        try:
            verb, *request = unpacked(connection.recv_bytes())
        except EOFError:
            for pids, folder in under_way.items():  # nobody has waited for
                _wait(pids, folder, 0)
                shutil.rmtree(folder)
            return
        if verb == "wait":
            pids, limit = request
            folder = under_way.pop(tuple(pids))
            connection.send_bytes(packed(_wait(pids, folder, limit)))
            shutil.rmtree(folder)
            continue
        path, module, call, size = request
        sys.path[:] = path
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001  whatever the user's module raises
            connection.send_bytes(packed(traceback.format_exc()))
            continue
        gc.collect()
        gc.freeze()  # a rank's collections would otherwise touch, and so copy, all of this memory
        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        pids = _fork(size)
        if isinstance(pids, int):  # a rank
            return _be_a_rank(pids, folder, call)
        under_way[tuple(pids)] = folder
        connection.send_bytes(packed(pids))


def _warm_up() -> None:
    """Imports what torch imports late, and each rank would otherwise import anew."""
    torch.set_num_threads(1)
    importlib.import_module("paceline.trainer.trainer")
    importlib.import_module("torch.distributed.tensor.debug")
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()  # imports torch._dynamo


def _finalize_nothing() -> None:
    """Ranks exit without finalizing what was imported: for torch's operators that is slow."""
    for each in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        each.atexit = False


def _fork(size: int) -> list[int] | int:
    """The ranks' process ids; in a rank, its number."""
    os.environ["MASTER_PORT"] = str(free_port())
    os.environ["WORLD_SIZE"] = str(size)
    pids: list[int] = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            return rank
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # so that its loader workers can be killed with it
        pids.append(pid)
    return pids


def _be_a_rank(rank: int, folder: Path, call: bytes) -> None:
    """Runs the function, then exit handlers, and exits without tearing down the interpreter."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 0
    gc.enable()
    try:
        function, args = unpacked(call)
        (folder / f"{rank}.value").write_bytes(packed(function(*args)))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: Sequence[int], folder: Path, limit: float) -> list[tuple[Any, ...]]:
    """How each rank ended: exit code, packed value, output and seconds, as in `Outcome`."""
    start = time.monotonic()
    ended: dict[int, tuple[int | None, float]] = {}
    while len(ended) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    seconds = time.monotonic() - start
                    ended[rank] = os.waitstatus_to_exitcode(status), seconds
        if time.monotonic() - start > limit:
            hanging = {rank: pid for rank, pid in enumerate(pids) if rank not in ended}
            _kill(list(hanging.values()))
            ended |= dict.fromkeys(hanging, (None, time.monotonic() - start))
        time.sleep(0.005)
    return [_outcome(rank, *ended[rank], folder) for rank in range(len(pids))]


def _kill(pids: Sequence[int]) -> None:
    """Kills ranks that hang, after they and their loader workers have written where."""
    for pid in pids:
        os.killpg(pid, _TRACE)
    time.sleep(_TRACED if pids else 0)
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _outcome(rank: int, code: int | None, seconds: float, folder: Path) -> tuple[Any, ...]:
    output, value = folder / f"{rank}.txt", folder / f"{rank}.value"
    return (
        code,
        value.read_bytes() if value.exists() else None,
        output.read_text(errors="replace") if output.exists() else "",
        seconds,
    )
