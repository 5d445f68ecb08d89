"""What ranks have read, compared and lent, so that all of them run equally many micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from paceline.errors import DataError
from paceline.world.world import World


def fingerprint(batches: Sequence[Any]) -> bytes:
    """Tells what ranks read apart, by the tensors in their last batch; empty without any."""
    held = [leaf for leaf in tree_leaves(batches[-1:]) if isinstance(leaf, torch.Tensor)]
    digest = hashlib.sha256()
    for tensor in held:
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.digest() if held else b""


def check_alike(read: Sequence[Any], world: World) -> None:
    """Refuses ranks that work on the same samples and have read different ones.

    Args:
        read: what each rank has read.
        world: the ranks; those that work on the same samples follow one another.

    Raises:
        DataError: on every rank.
    """
    alike = world.size // world.dp_size
    for first in range(0, world.size, alike):
        if len(set(read[first : first + alike])) > 1:
            raise DataError(
                f"ranks {first} to {first + alike - 1} work on the same samples (parallel.tensor, "
                "parallel.context), and their loaders give them different ones: a loader that "
                "keeps its own order takes the share dp_rank of dp_size (trainer.world), which is "
                "not RANK of WORLD_SIZE."
            )


def borrowed(world: World, counts: Sequence[int], batches: Sequence[Any]) -> Any:
    """A batch for ranks that have none yet to stand in with; to be called on all ranks.

    Args:
        world: the ranks.
        counts: the micro-batches of each; one of them at least has some.
        batches: this rank's.

    Returns:
        The first batch of the first rank that has one.
    """
    lender = next(rank for rank, count in enumerate(counts) if count)
    lent = None
    if world.rank == lender:
        lent = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), batches[0])
    return world.all_gather_object(lent)[lender]
