"""P12 O(1) resume: getting back to batch n costs the same for n = 10 and n = 10^9."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paceline import Trainer
from paceline.data.order import Permutation, Shuffled
from paceline.testing import StopAt

HUGE = 10**9


class Virtual(Dataset):
    """A thousand million samples that are computed when asked for; counts how many were."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return HUGE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(index)
        return torch.tensor([index % 7, index % 11]).float(), torch.tensor([1.0])


def train(run_dir: Path, data: Virtual, stop: int) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(data, 4, shuffle=True),
        epochs=1,
        callbacks=[StopAt(stop)],
        progress=False,
        run_dir=run_dir,
    )
    trainer.train(seed=1)
    return trainer


def test_resume_reads_no_sample_that_the_stopped_run_had_seen(tmp_path: Path) -> None:
    """Given a run whose place is moved to the middle of 10^9 samples, when it goes on for two
    steps, then eight samples are read and no other but those that tell the data's content."""
    first, second = Virtual(), Virtual()
    train(tmp_path, first, 3)
    trainer = train(tmp_path, second, 5)
    content = [0, HUGE // 2, HUGE - 1, 0]
    assert first.read[:4] == second.read[:4] == content
    seen, later = first.read[4:], second.read[4:]
    assert (len(seen), len(later)) == (12, 8)
    assert not set(seen) & set(later)
    order = Shuffled(HUGE, trainer.seed)
    assert seen + later == list(order.slice(0, 0, 20))


def test_any_position_is_computed_alone() -> None:
    """The order at the far end takes one block, however long the way there."""
    order = Shuffled(HUGE, seed=3)
    far = order.slice(0, HUGE - 10, HUGE)
    assert len(set(far)) == 10
    assert len(order._block) <= 4096
    assert max(far) < HUGE


def test_the_order_is_a_permutation() -> None:
    import numpy as np

    for n in (1, 2, 3, 10, 97, 1000, 4097):
        images = Permutation(n, key=n)(np.arange(n))
        assert sorted(images.tolist()) == list(range(n))
