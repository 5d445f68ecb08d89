"""What each rank does in the tests of several ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from faults import FaultyDisk, QuickDisk, fails_at
from paceline.checkpoint import CheckpointPolicy, NativeEngine, read_manifest
from paceline.errors import CheckpointError, MismatchError, StateError
from paceline.world.layout import Parallel
from paceline.world.world import World

WHOLE = torch.arange(35.0).reshape(7, 5)  # 7 rows: uneven over 2 and over 4 ranks


def state(world: World, value: float) -> dict[str, Any]:
    """Replicated, sharded and per-rank parts; `value` tells saves apart."""
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        "model": {"plain": torch.full((64,), value), "sharded": sharded(WHOLE + value, mesh)},
        "optimizer": {"exp_avg": sharded(torch.full((3,), value), mesh)},
        "progress": (1, float("inf")),
        "rank": {str(world.rank): {"rng": torch.full((2,), world.rank + value), "x": world.rank}},
    }


def sharded(whole: torch.Tensor, mesh: Any) -> DTensor:
    return distribute_tensor(whole, mesh, [Shard(0)])


def check(tree: dict[str, Any], value: float, saved_by: int) -> None:
    assert bool((tree["model"]["plain"] == value).all())
    for tensor, whole in (
        (tree["model"]["sharded"], WHOLE + value),
        (tree["optimizer"]["exp_avg"], torch.full((3,), value)),
    ):
        got = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(got, whole)
    assert tree["progress"] == (1, float("inf"))
    assert list(tree["rank"]) == [str(r) for r in range(saved_by)]
    for rank in range(saved_by):
        assert tree["rank"][str(rank)]["rng"].tolist() == [rank + value] * 2
        assert tree["rank"][str(rank)]["x"] == rank


def save(folder: Path, world: World) -> None:
    """Both ways of saving, with training's own collectives going on during the background one."""
    checkpoints = made(folder, world, keep_last=None)
    checkpoints.recover()
    assert checkpoints.newest() is None
    assert checkpoints.required_bytes(state(world, 1.0)) > 64 * 4 + 35 * 4 + 16
    checkpoints.save(state(world, 1.0), 1)
    total = torch.ones(1)
    for _ in range(50):
        world.all_reduce(total)
    checkpoints.save(state(world, 2.0), 2, synchronous=True)
    assert [c.step for c in checkpoints.list()] == [1, 2]
    saved = [(n.kind, n.step, n.path) for n in checkpoints.poll()]  # every rank knows
    assert saved == [("saved", n, folder / f"step_{n:08d}") for n in (1, 2)]
    check(checkpoints.load(folder / "step_00000001"), 1.0, world.size)
    newest = checkpoints.newest()
    assert newest is not None
    manifest = read_manifest(newest.path)
    assert manifest.ranks == world.size
    check(checkpoints.load(newest.path), 2.0, world.size)
    names = [len(file.name) for file in manifest.files if "shard" in file.name]
    assert len(names) == world.size  # every rank wrote a part
    stored = sum(f.bytes for f in manifest.files if "shard" in f.name)
    assert stored < world.size * 2000  # what is replicated was written once
    checkpoints.close()


def load(folder: Path, world: World) -> None:
    """A state saved by two ranks is loaded, whole or into this world's own shards."""
    checkpoints = made(folder, world)
    newest = checkpoints.newest()
    assert newest is not None
    check(checkpoints.load(newest.path), 2.0, 2)
    own = state(world, 0.0)
    own["model"]["sharded"] = own["model"]["sharded"].double()
    with pytest.raises(MismatchError, match=r"sharded: float32\[7, 5\] in .*float64\[7, 5\] here"):
        checkpoints.load(newest.path, into=own)
    own = state(world, 0.0)
    got = checkpoints.load(newest.path, into=own)
    assert (
        got["model"]["sharded"].to_local().data_ptr()
        == own["model"]["sharded"].to_local().data_ptr()
        or own["model"]["sharded"].to_local().numel() == 0
    )
    check(got, 2.0, 2)
    checkpoints.save(state(world, 4.0), 3, synchronous=True)
    check(checkpoints.load(folder / "step_00000003"), 4.0, world.size)
    checkpoints.close()


def failures(folder: Path, world: World) -> None:
    """Whatever goes wrong on one rank, both know, nobody waits, and the next save succeeds."""
    checkpoints = made(folder, world)
    checkpoints.save(state(world, 1.0), 1, synchronous=True)
    for asynchronous in (False, True):
        for at in range(1, 4):  # its file is created, written, synced
            if world.rank == 1:
                checkpoints._disk = fails_at(at)
            error: CheckpointError | None = None
            if asynchronous:
                checkpoints.save(state(world, 2.0), 2)
                error = checkpoints.wait()
            else:
                with pytest.raises(CheckpointError) as caught:
                    checkpoints.save(state(world, 2.0), 2, synchronous=True)
                error = caught.value
            assert "rank 1: No space left" in str(error)
            checkpoints._disk = QuickDisk()
    assert [c.step for c in checkpoints.list()] == [1]

    extra = {"mine": {"lock": threading.Lock() if world.rank == 1 else 0}}
    with pytest.raises(StateError, match=r"rank 1: mine\.lock: a _thread\.lock"):
        checkpoints.save(state(world, 2.0) | extra, 2)
    with pytest.raises(StateError, match=r"differ in the state at callbacks\.timer\.elapsed"):
        checkpoints.save({"callbacks": {"timer": {"elapsed": world.rank, "n": 1}}}, 2)
    with pytest.raises(StateError, match="differ in the state at model/w"):
        checkpoints.save({"model": {"w": torch.ones(2 + world.rank)}}, 2)

    checkpoints.save(state(world, 3.0), 3)
    newest = checkpoints.newest()
    assert newest is not None
    check(checkpoints.load(newest.path), 3.0, world.size)
    (newest.path / "state.json").write_text("{}") if world.is_main else None
    world.barrier()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        made(folder, world).load(newest.path)
    checkpoints.close()


def killed(folder: Path, world: World) -> None:
    """One rank is killed in a save: the other gets an error soon, and the old one survives."""
    checkpoints = made(folder, world)
    checkpoints.save(state(world, 1.0), 1, synchronous=True)

    def fault(n: int, name: str, args: tuple[Any, ...]) -> None:
        if world.rank == 1 and name == "write":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints._disk = FaultyDisk(fault)
    start = time.monotonic()
    checkpoints.save(state(world, 2.0), 2)
    assert checkpoints.wait() is not None
    assert time.monotonic() - start < 30
    checkpoints.close()
    os._exit(0)  # the process group is broken, and leaving it in order would wait for the dead


def made(folder: Path, world: World, **policy: Any) -> NativeEngine:
    checkpoints = NativeEngine(folder, CheckpointPolicy(**policy), world)
    checkpoints._disk = QuickDisk()
    return checkpoints


def play(scene: str, folder: Path) -> None:
    """One rank of a scene."""
    world = World(Parallel(timeout=40)).open()
    try:
        globals()[scene](folder, world)
        dist.barrier()
    finally:
        world.close()
