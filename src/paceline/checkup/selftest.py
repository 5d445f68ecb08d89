"""Tests some of the promises in a few seconds on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paceline.checkpoint import CheckpointPolicy, NativeEngine
from paceline.checkpoint.comparison import differing
from paceline.checkup.preflight import told
from paceline.checkup.report import Check, readable_seconds
from paceline.data.loader import open_training
from paceline.data.source import WindowSize
from paceline.errors import some
from paceline.trainer.callback import Callback
from paceline.trainer.trainer import Trainer
from paceline.world.world import World

_STEPS, _STOP = 12, 5
_HUGE = 10**9
_UNEVEN = 13  # samples, split over two ranks
_PATIENCE = 120.0  # seconds for two processes to import torch and train on these
_RANKS = 2


class PromiseBrokenError(Exception):
    """A self-test observed something that contradicts a promise."""


class NotPossibleError(Exception):
    """A self-test cannot run on this machine."""


def self_tests() -> list[Check]:
    """Trains tiny runs in a temporary folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="paceline-doctor-") as folder:
        return [_tested(name, test, Path(folder) / name.split()[0]) for name, test in TESTS.items()]


def _tested(name: str, test: Callable[[Path], str], folder: Path) -> Check:
    folder.mkdir()
    try:
        return Check(name, "PASS", test(folder))
    except NotPossibleError as error:
        return Check(name, "SKIP", str(error))
    except PromiseBrokenError as error:
        return Check(name, "FAIL", str(error))
    except Exception as error:  # noqa: BLE001 - any error here is a finding
        return Check(name, "FAIL", told(error))


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("self-test")


def _train(run_dir: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A small network with dropout on shuffled data, for a few steps or up to a stop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True),
        max_steps=_STEPS,
        max_grad_norm=1.0,
        deterministic=torch.accelerator.is_available(),
        log_every=1,
        callbacks=list(callbacks),
        progress=False,
        run_dir=run_dir,
        **settings,
    )
    trainer.train(seed=1)
    return trainer


def exact_resume(folder: Path) -> str:
    """A run that was stopped and resumed ends like an uninterrupted one."""
    whole = _train(folder / "whole", _StopAt(0))
    _train(folder / "parts", _StopAt(_STOP))
    parts = _train(folder / "parts", _StopAt(0))
    differences = differing(whole.state_dict(), parts.state_dict(), "state")
    rows = [(folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    if rows[0] != rows[1]:
        differences.append("metrics.jsonl")
    if differences:
        raise PromiseBrokenError(f"differs after a resume: {some(differences)}")
    return f"stopped at step {_STOP} of {_STEPS} and resumed: state and rows equal bit by bit"


def a_flipped_bit(folder: Path) -> str:
    """A damaged checkpoint is set aside and the previous one is used."""
    policy = CheckpointPolicy(every_epochs=None, every_steps=4, keep_last=2)
    _train(folder / "run", checkpoint=policy)
    saved = NativeEngine(folder / "run" / "checkpoints", policy, World())
    before, newest = saved.list()[-2:]
    victim = max(newest.path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found = saved.newest()
    if found is None or found.step != before.step or newest.path.exists():
        raise PromiseBrokenError("a checkpoint with a flipped bit was not set aside")
    return f"one bit flipped in step {newest.step}: set aside, step {found.step} is used"


class _Virtual(Dataset):
    """More samples than fit on any disk, computed on demand."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return _HUGE

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.tensor([float(index)])


def any_place(folder: Path) -> str:
    """The end of the data is reached without reading what comes before."""
    data = _Virtual()
    source = open_training(DataLoader(data, 4, shuffle=True), WindowSize(), 1, World())
    start = time.perf_counter()
    source.load_state_dict({"epoch": 0, "offset": _HUGE - 4})
    source.start_epoch(0)
    draw = source.draw()
    assert draw is not None
    draw.batch(0)
    seconds = time.perf_counter() - start
    source.close()
    if len(data.read) != 4 or len(set(data.read)) != 4:
        raise PromiseBrokenError(f"the last batch of 10^9 samples read {len(data.read)} samples")
    return f"the last of 10^9 samples reached in {readable_seconds(seconds)}, reading 4"


def every_sample_once(folder: Path) -> str:
    """An uneven number of samples on two processes: each is seen once."""
    codes, errors = _run_ranks(folder)
    if any(codes):
        last = [text.strip().splitlines()[-1] for text in errors if text.strip()]
        raise PromiseBrokenError(f"exited with codes {codes}: {'; '.join(last)}")
    shares = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(_RANKS)]
    if sorted(index for share in shares for index in share) != list(range(_UNEVEN)):
        raise PromiseBrokenError(f"the samples were split as {shares}")
    sizes = " and ".join(str(len(share)) for share in shares)
    return f"{_UNEVEN} samples on {_RANKS} gloo processes: {sizes}, each once"


def _run_ranks(folder: Path) -> tuple[list[int], list[str]]:
    """Starts the ranks and waits; returns their exit codes and what they wrote to stderr.

    Raises:
        NotPossibleError: this machine cannot start processes, or they cannot connect.
        PromiseBrokenError: they did not exit in time.
    """
    ranks: list[subprocess.Popen[str]] = []
    deadline = time.monotonic() + _PATIENCE
    try:
        shared = _environment()
        for rank in range(_RANKS):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "paceline.checkup.selftest", str(folder)],
                    env={**os.environ, **shared, **own},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        errors = [each.communicate(timeout=deadline - time.monotonic())[1] for each in ranks]
    except subprocess.TimeoutExpired:
        text = f"two processes did not finish a tiny run within {_PATIENCE:.0f} s"
        raise PromiseBrokenError(text) from None
    except OSError as error:
        raise NotPossibleError(f"no process can be started here: {error}") from error
    finally:
        for each in ranks:
            if each.poll() is None:
                each.kill()
                each.communicate()
    return [each.returncode for each in ranks], errors


def _environment() -> dict[str, str]:
    """The environment variables of both ranks, with a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(_RANKS),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, whatever devices there are
        "HIP_VISIBLE_DEVICES": "",
    }


class _Ids(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        self.seen += trainer.window.ids()


def _be_a_rank(folder: Path) -> None:
    """The work of each process: one epoch over the uneven data."""
    model = nn.Linear(1, 1)
    ids = _Ids()
    x = torch.arange(_UNEVEN, dtype=torch.float32)[:, None]
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(TensorDataset(x, x), 3, shuffle=True),
        epochs=1,
        callbacks=[ids],
        progress=False,
    )
    trainer.train(seed=1)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([int(i) for i in ids.seen]))


TESTS: dict[str, Callable[[Path], str]] = {
    "P1 exact resume": exact_resume,
    "P4 every sample once": every_sample_once,
    "P5 a flipped bit": a_flipped_bit,
    "P12 any place at once": any_place,
}

if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]))
