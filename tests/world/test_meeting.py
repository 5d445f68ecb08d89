"""The ranks' meeting before they are a process group: all go on, or none does and knows why."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from paceline.errors import ConfigError
from paceline.exit_codes import USAGE
from paceline.testing import Ranks
from paceline.world import meeting

SOON = timedelta(seconds=3)


def meet_or_leave() -> str:
    """Rank 1 leaves twice before they meet, for a mistake; then both meet."""
    rank = int(os.environ["RANK"])
    said = []
    for mistake in ("no such file", "no such key"):
        if rank == 1:
            meeting.begin()
            assert meeting.announce_exit(USAGE, ConfigError(mistake))
        else:
            with pytest.raises(ConfigError) as caught:
                meeting.join("gloo", rank, 2, SOON)
            said.append(str(caught.value))
    meeting.begin()
    meeting.join("gloo", rank, 2, SOON)
    return "; ".join(said)


def test_a_rank_that_leaves_before_they_meet_ends_the_other_for_its_reason(ranks: Ranks) -> None:
    first, _ = ranks(meet_or_leave, 2)
    assert first == "; ".join(
        f"rank 1 failed before the ranks had met: ConfigError: no such {what}"
        for what in ("file", "key")
    )


def test_each_start_has_a_name_of_its_own_in_a_store_that_is_kept() -> None:
    """As an agent keeps its store when it starts failed workers again."""
    store, names = HashStore(), []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            both = [
                pool.submit(meeting._name_of_this_start, store, rank, 2, SOON) for rank in (0, 1)
            ]
            first, second = (each.result() for each in both)
            assert first == second
            names.append(first)
    assert len(set(names)) == 3
