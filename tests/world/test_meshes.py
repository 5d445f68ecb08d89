"""How ranks are laid out: which of them are together in what, and nothing for one rank alone."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from paceline import Parallel
from paceline.testing import Ranks
from paceline.world.world import World

LAYOUTS = [
    Parallel(tensor=2, expert=2),
    Parallel(dp_shard=4, expert=2),
    Parallel(expert=2),
    Parallel(context=2, tensor=2),
    Parallel(pipeline=2, dp_shard=2),
]


def laid_out() -> list[dict[str, Any]]:
    """The ranks of each mesh with this one's place in the other dimensions, by its dimension."""
    found = []
    for parallel in LAYOUTS:
        with closing(World(parallel).open()) as world:
            named = {"": world.mesh, "context": world.context_mesh, "expert": world.expert_mesh}
            found.append(
                {
                    name: {n: mesh[n].mesh.tolist() for n in mesh.mesh_dim_names or ()}
                    for name, mesh in named.items()
                    if mesh is not None
                }
            )
    return found


def test_each_dimension_is_of_the_ranks_that_share_something(ranks: Ranks) -> None:
    """Of dimensions of one rank there is but the one that FSDP2 asks for."""
    split, sharded, copied, sequences, stages = ranks(laid_out, 4)[3]
    assert split == {
        "": {"dp_replicate": [1, 3], "dp_shard": [3], "tensor": [2, 3]},
        "expert": {"dp_shard": [3], "expert": [1, 3], "tensor": [2, 3]},
    }
    assert sharded == {
        "": {"dp_shard": [0, 1, 2, 3]},
        "expert": {"dp_shard": [1, 3], "expert": [2, 3]},
    }
    assert copied == {
        "": {"dp_replicate": [0, 1, 2, 3], "dp_shard": [3]},
        "expert": {"dp_replicate": [1, 3], "dp_shard": [3], "expert": [2, 3]},
    }
    assert sequences == {
        "": {"dp_replicate": [1, 3], "dp_shard": [3], "tensor": [2, 3]},
        "context": {"context": [1, 3]},
    }
    assert stages == {"": {"pipeline": [1, 3], "dp_shard": [2, 3]}}
