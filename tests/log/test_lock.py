"""Two processes never train in one run folder."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.log import lock
from paceline.log.lock import FolderLock

HOLDER = """
import sys
from pathlib import Path
from paceline.log.lock import FolderLock
FolderLock().take(Path(sys.argv[1]), print)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_is_there(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.3)
    told: list[str] = []
    with pytest.raises(ConfigError, match=f"pid {holder.pid} on .* is training in"):
        FolderLock().take(tmp_path, told.append)
    assert len(told) == 1
    assert f"waiting for another process (pid {holder.pid}" in told[0]


def test_a_second_process_goes_on_when_the_first_was_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    killer = threading.Timer(0.3, holder.kill)
    killer.start()
    mine = FolderLock()
    mine.take(tmp_path, lambda _: None)
    killer.join()
    assert holder.wait(10) == -9
    mine.release()
    mine.release()


def test_what_is_given_back_can_be_taken(tmp_path: Path) -> None:
    first = FolderLock()
    first.take(tmp_path, print)
    first.release()
    result = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        input="",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "held\n"
