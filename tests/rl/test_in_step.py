"""Rollouts with sharded models: ranks generate differently often, and all of them stay in step."""

from __future__ import annotations

import pytest
import torch
from text_runs import sharded_weights_after

from paceline.testing import Ranks


@pytest.mark.parametrize("episodes", [3, 1], ids=["2 and 1", "1 and none"])
def test_sharded_ranks_with_unequal_shares_train_as_one_process(
    ranks: Ranks, episodes: int
) -> None:
    (alone,) = ranks(sharded_weights_after, 1, episodes, 1)
    for weights in ranks(sharded_weights_after, 2, episodes, 2):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)
