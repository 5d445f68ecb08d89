"""A simulated world: this process acts as rank 0 of many that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from paceline.errors import ConfigError
from paceline.world.layout import Parallel
from paceline.world.world import World


class WorldOnPaper(World):
    """Rank 0 of a run on devices that need not be there.

    Data and placement see the layout. For everything else this is a world of one: it neither
    communicates nor waits. Collectives of a sharded or split model use torch's "fake" backend,
    which does nothing.

    Args:
        parallel: the layout.
        ranks: the number of ranks.

    Attributes:
        ranks: the number of simulated ranks.

    Raises:
        ConfigError: the layout does not match that many ranks.
    """

    on_paper = True

    def __init__(self, parallel: Parallel, ranks: int) -> None:
        self.parallel = parallel
        self.ranks = ranks
        self.copies, self.shards = parallel.sizes(ranks)
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.dp_rank, self.dp_size = 0, self.copies * self.shards
        self.device = torch.device("cpu")
        self.mesh = self.control_group = None
        self.timeout = parallel.timeout
        self.part, self.parts = 0, ranks // parallel.tensor
        self.stage, self._stage_size = 0, ranks
        self.context_mesh = self.expert_mesh = self._parts_group = None
        self._owns_group = False

    def open(self) -> WorldOnPaper:
        """Makes the meshes, if models are sharded or split, or sequences are split.

        Raises:
            ConfigError: this process is already in a process group.
        """
        context = self.parallel.context
        if not (self.parallel.partitions_state or context > 1) or self.mesh is not None:
            return self
        if dist.is_initialized():
            raise ConfigError("this process is in a process group: simulate layouts outside of it.")
        # Both imports register something: the backend, and shapes for its collectives.
        import torch.distributed._tools.fake_collectives  # noqa: F401
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=self.ranks, store=FakeStore())
        self._owns_group = True
        self.mesh = self._make_mesh()
        self.context_mesh = self._make_context_mesh() if context > 1 else None
        return self

    @contextmanager
    def as_one_of_many(self) -> Iterator[None]:
        """A context in which `size` is the simulated one, for sharding; DDP needs real ranks."""
        self.size = self.ranks if self.parallel.partitions_state else 1
        try:
            yield
        finally:
            self.size = 1
