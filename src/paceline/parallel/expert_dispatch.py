"""Rows on their way to experts that are shared out over ranks, and back (expert parallelism).

Each rank has some of the experts of a mixture, and rows for any of them: rows go to the ranks of
their experts, and what became of them comes back (Lepikhin et al., 2020,
https://arxiv.org/abs/2006.16668).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from paceline.errors import DataError


def dispatch(
    rows: torch.Tensor, counts: torch.Tensor, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Sends rows to the ranks of their experts. Every rank has to call it, also without rows.

    Args:
        rows: [n, ...], sorted by expert.
        counts: rows for each of all experts, integers [experts].
        mesh: the ranks, with equally many experts each, the first ones on the first rank.

    Returns:
        The rows of all ranks for this one's experts, sorted by expert, [m, ...]; how many there are
        for each of its experts; and what sends their results [m, ...] back as [n, ...].

    Raises:
        DataError: the counts cannot be those of the experts, or do not add up to the rows.
    """
    group, ranks = mesh.get_group(), mesh.size()
    if counts.dim() != 1 or len(counts) % ranks or counts.is_floating_point():
        raise DataError(
            f"the counts of rows by expert are {str(counts.dtype).removeprefix('torch.')} "
            f"{list(counts.shape)}: expected integers, one for each expert of {ranks} ranks."
        )
    arriving = all_to_all_single(counts.contiguous(), None, None, group)
    both = torch.stack([counts, arriving]).view(2, ranks, -1)
    leave, arrive = both.tolist()  # waits for the device: the sizes of what is sent are the host's
    sent, received = [[sum(by_expert) for by_expert in sizes] for sizes in (leave, arrive)]
    if sum(sent) != len(rows):
        raise DataError(f"the counts add up to {sum(sent)} rows, and there are {len(rows)}.")
    by_rank = all_to_all_single_autograd(rows.contiguous(), received, sent, group)

    def combine(results: torch.Tensor) -> torch.Tensor:
        back = _turned(results, [list(sizes) for sizes in zip(*arrive, strict=True)])
        return all_to_all_single_autograd(back, sent, received, group)

    return _turned(by_rank, arrive), both[1].sum(0), combine


def _turned(rows: torch.Tensor, sizes: list[list[int]]) -> torch.Tensor:
    """Rows that are sorted by i and then by j, `sizes[i][j]` of each, sorted by j and then by i."""
    pieces, width = rows.split(list(chain(*sizes))), len(sizes[0])
    return torch.cat([piece for j in range(width) for piece in pieces[j::width]])
