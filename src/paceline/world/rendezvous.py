"""Where the launchers of several machines find each other."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.errors import ConfigError

if TYPE_CHECKING:  # torch's launcher is imported only to launch
    from torch.distributed.elastic.rendezvous import RendezvousParameters


@dataclass(frozen=True)
class Rendezvous:
    """How the launchers of several machines find each other; the same on all of them.

    Args:
        nnodes: the number of machines.
        endpoint: "HOST:PORT" on one of them; None with one machine.
        id: the run's name there, which separates it from others at the same endpoint.

    Raises:
        ConfigError: there are several machines and no endpoint, or a malformed one.
    """

    nnodes: int = 1
    endpoint: str | None = None
    id: str = "paceline"

    def __post_init__(self) -> None:
        if self.endpoint is None and self.nnodes > 1:
            raise ConfigError(
                f"--nnodes {self.nnodes}: give --rdzv-endpoint HOST:PORT, a free port on one of "
                "the machines, the same on all of them."
            )
        if self.endpoint is not None and not re.fullmatch(r".+:\d{1,5}", self.endpoint):
            raise ConfigError(f"--rdzv-endpoint {self.endpoint}: it has to be HOST:PORT.")

    def parameters(self) -> RendezvousParameters:
        """The same for torch."""
        from torch.distributed.elastic.rendezvous import RendezvousParameters

        endpoint, name = self.endpoint, self.id
        if endpoint is None:
            endpoint, name = "localhost:0", uuid.uuid4().hex  # a free port
        host = endpoint.rpartition(":")[0]
        return RendezvousParameters(
            backend="c10d",
            endpoint=endpoint,
            run_id=name,
            min_nodes=self.nnodes,
            max_nodes=self.nnodes,
            # Else workers get this machine's name, which it may not be able to resolve.
            local_addr=host if host in ("localhost", "127.0.0.1") else None,
        )


ONE_MACHINE = Rendezvous()
