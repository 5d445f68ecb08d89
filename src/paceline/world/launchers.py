"""What the launchers of several machines tell each other: that one of them has failed, and why.

Each would otherwise wait for the others until its time is over. The word is left in the store of
their rendezvous, where each looks whenever it reads what has become of the rendezvous: once a
second while it waits for the others, and as often as it looks after its workers.

A word from before they have met is for those that still wait. So a command that is started by
mistake, at the address of a run that is under way, does not end that run.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousHandler
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    C10dRendezvousBackend,
    create_backend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from paceline.errors import ConfigError, PacelineError, PeerError
from paceline.exit_codes import USAGE
from paceline.world.rendezvous import Rendezvous

LINGER = 10.0  # seconds for which one that has failed looks for the others, to be heard by them
_POLL = 0.1  # seconds between two looks


class FailedElsewhereError(RendezvousError):
    """A launcher of another machine has failed.

    Args:
        code: with which it exits.
        host: the machine.
        why: in a line.
    """

    def __init__(self, code: int, host: str, why: str) -> None:
        super().__init__(why)
        kind = ConfigError if code == USAGE else PeerError
        self.error: PacelineError = kind(f"the launcher on {host} has failed: {why}")


class Launchers:
    """The launchers that make up a run, as one of them sees them.

    Args:
        machines: how they find each other.
        seconds: that it takes at most to reach their store; torch's own time if None.

    Attributes:
        handler: torch's handle of their rendezvous. What waits there, or looks after workers,
            raises FailedElsewhereError.

    Raises:
        RendezvousError: their store cannot be reached.
    """

    def __init__(self, machines: Rendezvous, seconds: float | None = None) -> None:
        parameters = machines.parameters()
        if seconds is not None:
            parameters.config["read_timeout"] = str(int(seconds))
        _, self._store = create_backend(parameters)
        self._backend = _Backend(self._store, parameters.run_id)
        self._others = machines.nnodes - 1
        self.handler: RendezvousHandler = create_handler(self._store, self._backend, parameters)
        self.local_addr = parameters.local_addr

    def have_met(self) -> None:
        """From now on only what one of those that have met says is heard."""
        self._backend.has_met = True

    def tell(self, code: int, why: str) -> None:
        """Tells the others that this one has failed, and waits a little until they have heard.

        Args:
            code: with which it exits.
            why: in a line.
        """
        if not self._others:
            return
        with contextlib.suppress(Exception):  # the others, or their store, may be gone
            word = json.dumps([code, socket.gethostname(), why])
            self._store.compare_set(self._backend.word, "", word)
            deadline = time.monotonic() + LINGER
            while time.monotonic() < deadline:
                if self._store.add(f"{self._backend.word}/heard", 0) >= self._others:
                    break
                time.sleep(_POLL)


class _Backend(C10dRendezvousBackend):
    """torch's, but whoever reads the rendezvous' state hears of a launcher that has failed."""

    def __init__(self, store: Store, run_id: str) -> None:
        super().__init__(store, run_id)
        self.has_met = False
        self._words = store, f"paceline/{run_id}/failed"
        self._heard = False

    @property
    def word(self) -> str:
        """The key of the word."""
        return f"{self._words[1]}/{'within' if self.has_met else 'before'}"

    def get_state(self) -> Any:
        if self._call_store("check", [self.word]):
            code, host, why = json.loads(self._call_store("get", self.word))
            if not self._heard:
                self._call_store("add", f"{self.word}/heard", 1)
            self._heard = True
            raise FailedElsewhereError(code, host, why)
        return super().get_state()
