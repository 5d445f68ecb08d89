"""A save cut short at any of its file operations leaves the run with an intact checkpoint."""

from __future__ import annotations

import errno
import itertools
from contextlib import suppress
from pathlib import Path

import pytest

from faults import Died, FaultyDisk, dies_at, fails_at, in_child, leftovers, opened, state, value_of
from paceline.errors import CheckpointError


def save_in_child(folder: Path, disk: FaultyDisk, step: int, asynchronous: bool) -> bool:
    def work() -> None:
        with opened(folder, disk, asynchronous=asynchronous, keep_last=1) as checkpoints:
            checkpoints.save(state(2), step)

    return in_child(work)


@pytest.mark.parametrize("step", [20, 10], ids=["pruning", "replacing"])
@pytest.mark.parametrize(("how", "asynchronous"), [("power", False), ("kill", True)])
def test_killed_at_any_operation_a_save_loses_nothing_before_it(
    tmp_path: Path, how: str, asynchronous: bool, step: int
) -> None:
    """Given a checkpoint of step 10, a save dies; then the old state or the new one is loaded."""
    survivors = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        with opened(folder) as checkpoints:
            checkpoints.save(state(1), 10, synchronous=True)
        ended = save_in_child(folder, dies_at(n, how), step, asynchronous)

        with opened(folder) as checkpoints:
            checkpoints.recover()
            newest = checkpoints.newest()
            assert newest is not None
            survivors.append(value_of(checkpoints.load(newest.path)))
            assert not [e for e in checkpoints.poll() if e.kind == "damaged"]
            assert leftovers(folder) == []
            checkpoints.save(state(3), 30, synchronous=True)
            assert checkpoints.list()[-1].save_id > newest.save_id
        if ended:
            break

    assert n > 20  # the operations of a save were really counted
    assert survivors == sorted(survivors)  # once the new one is safe it stays so
    assert survivors[0] == 1
    assert survivors[-1] == 2


@pytest.mark.parametrize("step", [20, 10], ids=["beside", "replacing"])
def test_a_save_that_only_lacked_its_rename_is_adopted(tmp_path: Path, step: int) -> None:
    def fault(n: int, name: str, args: tuple) -> None:
        if name == "rename" and args[0].name.endswith(".new") and "step" in args[0].name:
            raise Died

    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(1), 10, synchronous=True)
    with suppress(Died), opened(tmp_path, FaultyDisk(fault)) as checkpoints:
        checkpoints.save(state(2), step, synchronous=True)

    with opened(tmp_path) as checkpoints:
        checkpoints.recover()
        assert [notice.kind for notice in checkpoints.poll()] == ["recovered"]
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 2
        assert (tmp_path / "latest").read_text() == f"step_{step:08d}\n"


def test_a_replacement_that_cannot_be_put_in_place_puts_the_old_one_back(tmp_path: Path) -> None:
    def fault(n: int, name: str, args: tuple) -> None:
        if name == "rename" and args[0].name == ".step_00000010.new":
            raise OSError(errno.EIO, "Input/output error")

    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(1), 10, synchronous=True)
        checkpoints._disk = FaultyDisk(fault)
        with pytest.raises(CheckpointError, match="Input/output error"):
            checkpoints.save(state(2), 10, synchronous=True)
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 1
        assert leftovers(tmp_path) == []


def test_killed_during_the_recovery_from_a_kill_nothing_is_lost_either(tmp_path: Path) -> None:
    """Given every way a replacing save can die, recovery dies at each of its own operations too."""
    for n in itertools.count(1):
        for m in itertools.count(1):
            folder = tmp_path / f"{n}-{m}"
            with opened(folder) as checkpoints:
                checkpoints.save(state(1), 10, synchronous=True)
            saved = recovered = False
            with suppress(Died), opened(folder, dies_at(n, "raise"), keep_last=1) as checkpoints:
                checkpoints.save(state(2), 10, synchronous=True)
                saved = True
            with suppress(Died), opened(folder, dies_at(m, "raise")) as checkpoints:
                checkpoints.recover()
                recovered = True
            with opened(folder) as checkpoints:
                checkpoints.recover()
                newest = checkpoints.newest()
                assert newest is not None
                assert value_of(checkpoints.load(newest.path)) in (1, 2)
                assert leftovers(folder) == []
            if recovered:
                break
        if saved:
            break
    assert n > 20


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("step", [20, 10], ids=["pruning", "replacing"])
def test_a_failure_of_any_one_operation_is_reported_and_the_next_save_succeeds(
    tmp_path: Path, asynchronous: bool, step: int
) -> None:
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        with opened(folder, keep_last=1, asynchronous=asynchronous) as checkpoints:
            checkpoints.save(state(1), 10, synchronous=True)
            checkpoints.poll()
            whole, checkpoints._disk = checkpoints._disk, fails_at(n)
            checkpoints.save(state(2), step)
            failed = checkpoints.wait() is not None
            done = checkpoints._disk.count < n  # type: ignore[attr-defined]
            kinds = {notice.kind for notice in checkpoints.poll()}
            assert failed == checkpoints.retry_due == ("failed" in kinds)
            checkpoints._disk = whole

            checkpoints.recover()
            newest = checkpoints.newest()
            assert newest is not None
            assert value_of(checkpoints.load(newest.path)) in ((1, 2) if failed else (2,))

            checkpoints.save(state(3), 30, synchronous=True)
            assert not checkpoints.retry_due
            assert [c.step for c in checkpoints.list()] == [30]
            assert leftovers(folder) == []
        if done:
            break
    assert n > 20


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_fails_for_good_leaves_the_old_checkpoint_and_fails_the_last_save(
    tmp_path: Path, code: int
) -> None:
    for n in range(1, 30):
        folder = tmp_path / str(n)
        with opened(folder, keep_last=1) as checkpoints:
            checkpoints.save(state(1), 10, synchronous=True)
            whole, checkpoints._disk = checkpoints._disk, fails_at(n, code, for_good=True)
            try:
                checkpoints.save(state(2), 20, synchronous=True)
            except CheckpointError as error:
                assert "step 20" in str(error)  # noqa: PT017 - some operations only warn
                assert "Read-only" in str(error) or "No space left" in str(error)  # noqa: PT017
            checkpoints._disk = whole
            checkpoints.recover()
            newest = checkpoints.newest()
            assert newest is not None
            assert value_of(checkpoints.load(newest.path)) in (1, 2)
            assert leftovers(folder) == []


def test_everything_is_on_the_disk_before_the_rename_that_publishes_it(tmp_path: Path) -> None:
    log: list[tuple[str, str]] = []
    paths: dict[int, str] = {}

    def note(n: int, name: str, args: tuple) -> None:
        what = args[0]
        log.append((name, paths.get(what, str(what)) if isinstance(what, int) else what.name))

    class Noting(FaultyDisk):
        def create(self, path: Path) -> int:
            fd = super().create(path)
            paths[fd] = path.name
            return fd

    with opened(tmp_path / "c", Noting(note)) as checkpoints:
        checkpoints.save(state(1), 10, synchronous=True)

    published = log.index(("rename", ".step_00000010.new"))
    created = [what for name, what in log[:published] if name == "create"]
    synced = [what for name, what in log[:published] if name == "fsync"]
    assert created[-1] == "manifest.json"
    assert synced == created
    assert len(created) == 3
    assert log[published - 1] == ("fsync_folder", ".step_00000010.new")
    assert log[published + 1] == ("fsync_folder", "c")
