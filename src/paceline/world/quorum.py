"""The replica groups that take a step together, as found by torchft's lighthouse and managers."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch

from paceline.errors import ConfigError, PeerError
from paceline.world.environment import ReplicaGroup

_LOCAL = ("localhost", "127.0.0.1", "::1")
_POLL = 0.1  # seconds between a waiting group's checks for a stop
_CONNECT = timedelta(seconds=10)
_ATTEMPTS = 20  # attempts at one step before a group gives up


def missing() -> str | None:
    """A message about a package that replica groups need, if it is not installed; else None."""
    if importlib.util.find_spec("torchft") is not None:
        return None
    return (
        "TORCHFT_LIGHTHOUSE is set, and replica groups need the package torchft: "
        'pip install "paceline[torchft]".'
    )


class Quorum:
    """The groups that are up, from one attempt at a step to the next.

    An attempt is `meet`, some calls of `gather` and `add_up`, and `agree`. A failure in between,
    here or in another group, raises nothing: `agree` then returns that the step does not count.

    Args:
        place: this group's number and the lighthouse.
        timeout: seconds to wait for the other groups.

    Attributes:
        rank, size: this group's rank among those that take this step, and their number.
    """

    def __init__(self, place: ReplicaGroup, timeout: float) -> None:
        self.place = place
        self.rank = 0
        self.size = 1
        self._timeout = timedelta(seconds=timeout)
        self._failed = 0  # attempts in a row
        self._manager: Any = None
        self._group: Any = None
        self._store: Any = None
        self._aside = _Aside()
        self._log_level = logging.NOTSET

    @property
    def is_open(self) -> bool:
        """Whether this group has joined the others."""
        return self._manager is not None

    def open(
        self, step: int, state: Callable[[], Any], load: Callable[[Any], None], transport: Any
    ) -> None:
        """Joins the other groups.

        Args:
            step: steps that this group's state has behind it.
            state: gives this group's state, for a group that is behind.
            load: takes another group's state, if this one is behind.
            transport: how a state gets from one to the other (torchft's CheckpointTransport).

        Raises:
            ConfigError: the lighthouse cannot be reached.
        """
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        # What it logs are its own steps, and each failure with its stack, which is no error here.
        os.environ.setdefault("RUST_LOG", "error")
        from torchft import (  # pyright: ignore[reportMissingImports] - an extra
            Manager,
            ProcessGroupGloo,
        )

        log = logging.getLogger("torchft")
        self._log_level = log.level
        log.setLevel(logging.CRITICAL)
        host = _host(self.place.lighthouse)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._group = ProcessGroupGloo(timeout=self._timeout)
        try:
            self._manager = Manager(
                pg=self._group,
                state_dict=state,
                load_state_dict=load,
                checkpoint_transport=transport,
                min_replica_size=1,  # how many there have to be is the lighthouse's to say
                use_async_quorum=False,
                timeout=self._timeout,
                quorum_timeout=self._timeout,
                connect_timeout=min(self._timeout, _CONNECT),
                rank=0,
                world_size=1,
                store_addr=host,
                store_port=self._store.port,
                lighthouse_addr=self.place.lighthouse,
                replica_id=f"group_{self.place.number}",
                hostname=host,
            )
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"TORCHFT_LIGHTHOUSE={self.place.lighthouse}: there is no lighthouse ({error}). "
                "Start one with `torchft_lighthouse`."
            ) from None
        self._manager._executor = self._aside  # or a group that leaves would wait for the others
        self.stands_at(step)

    def stands_at(self, step: int) -> None:
        """Sets the number of steps that this group's state has done."""
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def meet(self, stops: Callable[[], bool]) -> bool:
        """Agrees on the groups that take the next step; a group that is behind gets their state.

        Args:
            stops: whether to stop waiting.

        Returns:
            Whether the step can be taken.

        Raises:
            PeerError: the others did not join in time, or too many attempts failed.
        """
        while not stops():
            asked = self._aside.submit(self._manager.start_quorum)
            while not asked.done():
                # This group may already be counted in: the others will find that it is gone.
                if stops():
                    return False
                wait([asked], _POLL)
            try:
                asked.result()
            except (RuntimeError, TimeoutError) as error:
                raise PeerError(
                    f"replica group {self.place.number} has not found the others within "
                    f"{self._timeout} ({error}): is the lighthouse at {self.place.lighthouse} "
                    "still running, and does it require more groups than there are "
                    "(--min_replicas)?"
                ) from error
            self.rank = self._manager.participating_rank()
            self.size = self._manager.num_participants()
            if self._manager.errored() is None:
                return True
            self.agree()
        return False

    def gather(self, text: str) -> list[str]:
        """Every group's text, in rank order; empty if the exchange fails."""
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self._add_up(sizes)
        if self._manager.errored() is not None:
            return []
        rows = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
        rows[self.rank, : len(data)] = data
        self._add_up(rows)
        if self._manager.errored() is not None:
            return []
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, sizes, strict=True)]

    @torch.no_grad()
    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sums tensors over the groups, in place. Each group gives the same shapes and dtypes."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            part = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            by_dtype.setdefault(part.dtype, []).append(part)
        for dtype, parts in by_dtype.items():
            flat = torch.cat([part.reshape(-1) for part in parts])
            if dtype == torch.bool:
                flat = flat.to(torch.uint8)
            self._add_up(flat)
            pieces = flat.split([part.numel() for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece.view(part.shape))

    def _add_up(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    def give_up(self, why: str) -> None:
        """Makes this attempt fail."""
        self._manager.report_error(RuntimeError(why))

    def agree(self) -> bool:
        """Whether the step counts: nothing has failed in this group.

        If something failed in this group only, it is behind the others, and gets their state at
        the next `meet`.

        Raises:
            PeerError: too many attempts failed.
        """
        error = self._manager.errored()
        if self._manager.should_commit():
            self._failed = 0
            return True
        self._failed += 1
        if self._failed >= _ATTEMPTS:
            raise PeerError(
                f"replica group {self.place.number} has tried {self._failed} times to take one "
                f"step; the last time: {getattr(error, 'original_exception', error)}"
            )
        return False

    def close(self) -> None:
        """Leaves the other groups, which continue."""
        if self._manager is not None:
            self._manager.shutdown(wait=False)
            self._group.shutdown()
        if self._group is not None:
            logging.getLogger("torchft").setLevel(self._log_level)
        self._manager = self._group = self._store = None


class _Aside:
    """An executor for torchft whose threads do not keep the process from exiting.

    Waiting in the main thread would block signal handlers, and a process waits for the threads of
    the standard executors when it exits.
    """

    def submit(self, work: Callable[..., Any], **arguments: Any) -> Future[Any]:
        """Starts it."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                outcome.set_result(work(**arguments))
            except BaseException as error:  # noqa: BLE001  raised again by `Future.result`
                outcome.set_exception(error)

        threading.Thread(target=run, name="paceline-quorum", daemon=True).start()
        return outcome

    def shutdown(self, wait: bool = True) -> None:
        """Waits for nothing."""


def _host(lighthouse: str) -> str:
    """The host name under which other groups can reach this machine."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    local = urlsplit(lighthouse).hostname in _LOCAL
    return "localhost" if local else socket.gethostname()
