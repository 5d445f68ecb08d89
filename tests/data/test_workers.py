"""Loader workers leave signals to the process they work for, and die with it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from paceline import Trainer, World
from paceline.testing import Ranks


class Signalled(Dataset):
    """Its workers get every signal that asks for a stop; samples tell which worker read them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        worker = get_worker_info()
        if worker is not None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return torch.ones(1), torch.tensor([-1.0 if worker is None else worker.id])


class Watched(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.workers: list[float] = [*getattr(self, "workers", []), *batch[1].flatten().tolist()]
        return super().training_step(batch, batch_idx)


def train(loader: DataLoader[Any]) -> Watched:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Watched(model, optimizer, None, nn.MSELoss(), loader, epochs=2, progress=False)
    trainer.train()
    return trainer


def touch(worker_id: int) -> None:
    """A `worker_init_fn`."""
    Path(f"worker-{worker_id}").touch()


@pytest.mark.parametrize("persistent", [False, True])
def test_signals_to_workers_change_nothing(
    persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given two workers that are signalled at every sample, when a run trains, then it ends as
    ever, with the loader's own worker_init_fn called in each and left in its place."""
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(
        Signalled(), 3, num_workers=2, worker_init_fn=touch, persistent_workers=persistent
    )
    trainer = train(loader)
    assert trainer.result.stopped_by == "epochs"
    assert sorted(trainer.workers) == [0.0] * 12 + [1.0] * 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0", "worker-1"]
    assert loader.worker_init_fn is touch


class Broken(Dataset):
    """Has one sample that cannot be read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 7:
            raise ValueError("on purpose")
        return torch.ones(1), torch.ones(1)


class FailsOn(Trainer):
    """Fails in its own step."""

    where = ""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._or_fail("training step", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self._or_fail("validation step", batch))

    def _or_fail(self, here: str, batch: Any) -> torch.Tensor:
        if self.where == here:
            raise ValueError("on purpose")
        return self.loss(batch)


@pytest.mark.parametrize(
    "where", ["training data", "validation data", "training step", "validation step"]
)
def test_no_worker_outlives_an_error_that_is_kept(where: str) -> None:
    """Given an error that the caller holds, as a notebook does, the run's workers are gone."""
    whole, broken = TensorDataset(torch.ones(12, 1), torch.ones(12, 1)), Broken()
    model = nn.Linear(1, 1)
    trainer = FailsOn(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(
            broken if where == "training data" else whole, 2, num_workers=2
        ),
        val_dataloader=DataLoader(
            broken if where == "validation data" else whole, 2, num_workers=2
        ),
        epochs=1,
        progress=False,
    )
    trainer.where = where
    with pytest.raises(Exception, match="on purpose") as held:
        trainer.train()
    assert multiprocessing.active_children() == []
    assert held.value.__traceback__ is not None


class Slow(Dataset):
    """Says which processes read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        (self.folder / f"pid-{os.getpid()}").touch()
        time.sleep(0.05)
        return torch.ones(1), torch.ones(1)


def train_slowly(folder: Path) -> None:
    train(DataLoader(Slow(folder), 2, num_workers=2))


def test_workers_die_with_their_process(ranks: Ranks, tmp_path: Path) -> None:
    """Given a run that is killed with SIGKILL, its workers are gone soon after."""
    run = ranks.start(train_slowly, 1, tmp_path)
    # One more has read a few samples first, by which a resumed run knows the data.
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 3)
    run.signal(signal.SIGKILL)
    run.wait(60)
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which its new parent has yet to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(happens: Any) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Collecting(Dataset):
    """Collects garbage wherever it is read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        gc.collect()
        return torch.tensor(index)


def read_after_a_run() -> list[int]:
    gc.disable()
    world = World().open()
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    held: list[Any] = [group]
    held.append(held)  # a cycle: it waits for garbage collection
    world.close()
    del group, held
    numbers = [number.item() for number in DataLoader(Collecting(), num_workers=1)]
    assert not gc.isenabled(), "as it was"
    return numbers


def test_a_worker_does_not_collect_the_process_groups_of_an_earlier_run(ranks: Ranks) -> None:
    """Their destructor waits for threads, which a forked process does not have."""
    assert ranks(read_after_a_run, 2) == [[0, 1], [0, 1]]
