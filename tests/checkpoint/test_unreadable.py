"""A file that could not be read is not a damaged one: nothing is moved, removed or shortened."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from faults import (
    DOES_NOT_ANSWER,
    FaultyReader,
    leftovers,
    opened,
    path_of,
    state,
    unreadable_from,
    value_of,
)
from paceline import reading
from paceline.checkpoint.publication import MANIFEST
from paceline.errors import CheckpointError

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", made.append)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Value 1 at step 10, value 2 at step 20, and value 3 at step 30, killed before its rename."""
    folder = tmp_path / "run"
    with opened(folder, keep_last=None) as checkpoints:
        for value in (1, 2, 3):
            checkpoints.save(state(value), 10 * value, synchronous=True)
    unpublish(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, whether step 30 is published or not, but for the hints."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {
        str(p.relative_to(folder)).replace(".new", "").strip("."): p.read_bytes() for p in files
    }


def unpublish(folder: Path) -> None:
    """What a kill just before the rename leaves."""
    if (folder / "step_00000030").exists():
        (folder / "step_00000030").rename(folder / ".step_00000030.new")


def newest_value(folder: Path) -> int | None:
    with opened(folder, keep_last=None) as checkpoints:
        checkpoints.recover()
        newest = checkpoints.newest()
        return None if newest is None else value_of(checkpoints.load(newest.path))


@pytest.mark.parametrize("code", DOES_NOT_ANSWER, ids=lambda code: errno.errorcode[code])
def test_one_operation_that_is_not_answered_is_repeated(
    folder: Path, code: int, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    """At each operation of a start: the newest is found all the same, and nothing set aside."""
    for n in itertools.count(1, 5):
        unpublish(folder)
        pauses.clear()
        reader = unreadable_from(folder, n, code, for_good=False)
        monkeypatch.setattr(reading, "reader", reader)
        assert newest_value(folder) == 3
        assert leftovers(folder) == []
        if reader.count < n:
            break
        assert pauses == [reading.PAUSES[0]]
    assert n > 30


def test_a_disk_that_does_not_answer_stops_the_start_and_nothing_is_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    """From each operation of a start on, its files keep their bytes and their places."""
    before = content(folder)
    for n in itertools.count(1):
        unpublish(folder)
        code = DOES_NOT_ANSWER[n % len(DOES_NOT_ANSWER)]
        reader = unreadable_from(folder, n, code)
        monkeypatch.setattr(reading, "reader", reader)
        try:
            assert newest_value(folder) == 3
            break
        except CheckpointError as error:
            told = str(error)
        assert "could not be read in 4 attempts" in told
        assert os.strerror(code) in told
        assert "Nothing was moved" in told
        assert pauses[-3:] == list(reading.PAUSES)
        assert content(folder) == before
    assert n > 30


def test_reads_of_a_few_bytes_are_put_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = FaultyReader(folder, lambda *_: None, short=True)
    monkeypatch.setattr(reading, "reader", reader)
    assert newest_value(folder) == 3


@pytest.mark.parametrize("name", [MANIFEST, "state.json", SHARD])
def test_a_read_that_ends_too_early_is_no_damage(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a file whose size is right but whose end does not come, it is repeated, then told."""
    before = content(folder)

    class Ends(FaultyReader):
        def read(self, fd: int, buffer: memoryview, at: int) -> int:
            if at > 40 and path_of(fd).endswith(name):
                return 0
            return super().read(fd, buffer[:50], at)

    monkeypatch.setattr(reading, "reader", Ends(folder, lambda *_: None))
    with pytest.raises(CheckpointError, match="ended before the end of the file"):
        newest_value(folder)
    assert content(folder) == before


def test_a_checkpoint_is_not_published_below_one_whose_manifest_could_not_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given two checkpoints, a save that cannot see the newer one fails; the next is above it."""

    def fault(n: int, name: str, args: tuple[Any, ...]) -> None:
        if name == "open" and args[0].endswith(f"step_00000020/{MANIFEST}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), args[0])

    with opened(folder, keep_last=None) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(reading, "reader", FaultyReader(folder, fault))
            with pytest.raises(CheckpointError, match="could not be read"):
                checkpoints.save(state(9), 40, synchronous=True)
        checkpoints.save(state(4), 40, synchronous=True)
        assert [c.step for c in checkpoints.list()] == [10, 20, 40]
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 4


def test_a_save_of_another_version_that_only_lacked_its_rename_is_left_alone(folder: Path) -> None:
    path = folder / ".step_00000030.new" / MANIFEST
    path.write_text(path.read_text().replace("paceline-checkpoint-1", "paceline-checkpoint-9"))
    before = content(folder)
    with pytest.raises(CheckpointError, match="checkpoint-9"):
        newest_value(folder)
    assert content(folder) == before
