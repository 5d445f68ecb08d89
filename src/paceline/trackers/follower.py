"""Follows a run folder's rows for one tracker: `python -m paceline.trackers.follower FOLDER NAME`.

Its standard input is a pipe from whoever started it: a line of JSON that says what to do, later one
with the run's status. The end of the pipe without a status means that the trainer was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from paceline.errors import MetricError
from paceline.log.lock import LOCK_FILE, FolderLock
from paceline.log.secrets import mask_text
from paceline.log.sinks import MEDIA_FILE, METRICS_FILE
from paceline.trackers.adapter import Adapter, FollowedRun
from paceline.trackers.cursor import FOLDER, Cursor, Place, new_rows, place_after, read_cursor

TAKEOVER = "takeover"
_PAUSE = 0.3  # seconds between two looks at the files
_LONGEST = 60.0  # between two tries while the library fails
_TRIES = 3  # once the run is over
_PATIENCE = 20.0  # that another follower has to leave; then it hangs


class Commands:
    """The lines that come through a pipe.

    Args:
        handle: to read from.
    """

    def __init__(self, handle: int) -> None:
        self._handle, self._held = handle, b""
        self.ended = False

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next line; None if none comes in time, or no more will come.

        Args:
            timeout: seconds to wait.
        """
        while b"\n" not in self._held and not self.ended:
            ready, _, _ = select.select([self._handle], [], [], timeout)
            if not ready:
                return None
            more = os.read(self._handle, 1 << 16)
            self._held, self.ended = self._held + more, not more
        line, found, rest = self._held.partition(b"\n")
        if not found:
            if timeout:
                time.sleep(timeout)
            return None
        self._held = rest
        return json.loads(line)


class Follower:
    """Sends what is new in a run folder to a library, until the run is over.

    Args:
        folder: the run folder.
        name: of the tracker's files in `trackers/`.
        todo: what the pipe's first line says: type, settings, run (its id), config, run_name.
        make: creates the adapter.
    """

    def __init__(self, folder: Path, name: str, todo: dict[str, Any], make: Any) -> None:
        self.home = folder / FOLDER / name
        self._folder, self._make, self._type = folder, make, todo["type"]
        self._run = FollowedRun(folder, todo["run"], todo["run_name"], todo["config"], self.home)
        self._path = folder / FOLDER / f"{name}.json"
        self._cursor = Cursor(todo["type"], todo["settings"], todo["config"], todo["run"])
        self._adapter: Adapter | None = None
        self._place = {METRICS_FILE: Place(), MEDIA_FILE: Place()}  # handed over
        self._held = 0
        self._lock = FolderLock()

    def take_over(self) -> None:
        """Waits for the follower of an earlier start to leave, and ends one that hangs."""
        deadline = time.monotonic() + _PATIENCE
        request = self.home / TAKEOVER
        while not self._lock.try_to_take(self.home):
            request.touch()
            if time.monotonic() > deadline:
                _end_owner(self.home)
                deadline = time.monotonic() + _PATIENCE
            time.sleep(0.1)
        request.unlink(missing_ok=True)
        before = read_cursor(self._path)
        if before is not None and before.run == self._cursor.run:
            self._cursor.rows, self._cursor.media = before.rows, before.media
            self._cursor.complete = before.complete
        self._place = {METRICS_FILE: self._cursor.rows, MEDIA_FILE: self._cursor.media}
        self._cursor.pid = os.getpid()
        self._write()

    def follow(self, commands: Commands) -> bool:
        """Sends rows until the run is over.

        Args:
            commands: the pipe.

        Returns:
            Whether all is sent.
        """
        status: str | None = None
        failures, pause = 0, 0.0
        while True:
            if status is None:
                told = commands.next(pause)
                if told is not None:
                    status = told["status"]
                elif commands.ended:
                    status = "killed"
            elif failures:
                time.sleep(pause)
            try:
                self._send()
                if status is not None:
                    self._finish(status)
                    return True
                failures, pause = 0, _PAUSE
                if (self.home / TAKEOVER).exists():
                    self._leave(None)
                    return True
            except Exception as error:  # noqa: BLE001  whatever the library raises
                failures += 1
                pause = min(_LONGEST, 0.5 * 2**failures)
                self._fail(error)
                if status is not None and failures >= _TRIES:
                    return False
                if (self.home / TAKEOVER).exists():
                    return False

    def _send(self) -> None:
        for file in (METRICS_FILE, MEDIA_FILE):
            while True:
                try:
                    rows, after = new_rows(self._folder / file, self._place[file])
                except MetricError as error:
                    self._find_again(file, error)
                    continue
                if not rows:
                    break
                if self._adapter is None:
                    self._open()
                    continue
                self._hand_over(file, rows, after)

    def _hand_over(self, file: str, rows: list[tuple[int, dict[str, Any]]], after: Place) -> None:
        assert self._adapter is not None
        if file == METRICS_FILE:
            self._adapter.send([each for each in rows if each[0] >= self._held])
            self._place[file] = after
            self._cursor.handed = after.rows
            if self._adapter.safe_at_once:
                self._cursor.rows = after
        else:
            for number, row in rows:
                self._adapter.send_media(number, row)
            self._place[file] = self._cursor.media = after
        self._cursor.problem, self._cursor.complete = None, False
        self._write()

    def _open(self) -> None:
        """Begins with the library, and asks it which rows it has."""
        adapter = self._make(self._type)(self._cursor.settings, self._run)
        adapter.open()
        self._adapter = adapter
        held, rows = adapter.held(), self._cursor.rows.rows
        self._place = {METRICS_FILE: self._cursor.rows, MEDIA_FILE: self._cursor.media}
        self._held = rows if held is None else held
        if self._held != rows:
            # Fewer: a kill took what it had in memory. More: one came before the cursor's write.
            self._place[METRICS_FILE] = place_after(self._folder / METRICS_FILE, self._held)

    def _find_again(self, file: str, error: MetricError) -> None:
        """Goes on after as many rows as were sent, where these have changed since."""
        _say(f"{error} The rows before it are not sent again.")
        before = self._place[file]
        self._place[file] = place_after(self._folder / file, before.rows)
        if file == METRICS_FILE:
            self._held = max(self._held, before.rows)
        if self._place[file] == before:
            raise error

    def _finish(self, status: str) -> None:
        if self._adapter is not None and status == "complete":
            exports = self._folder / "exports"
            for path in sorted(exports.iterdir()) if exports.is_dir() else ():
                self._adapter.send_artifact(path)
        self._leave(status)

    def _leave(self, status: str | None) -> None:
        if self._adapter is not None:
            self._adapter.close(status)
            self._adapter = None
        self._cursor.rows = self._place[METRICS_FILE]
        self._cursor.complete, self._cursor.problem = status is not None, None
        self._write()

    def _fail(self, error: Exception) -> None:
        text = mask_text(f"{type(error).__name__}: {error}")
        if text != self._cursor.problem:
            _say(text)
        self._cursor.problem = text
        with contextlib.suppress(Exception):
            if self._adapter is not None:
                self._adapter.close(None)
        self._adapter = None
        self._place[METRICS_FILE] = self._cursor.rows
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        self._cursor.write(self._path)


def _end_owner(home: Path) -> None:
    """Kills the follower that holds a lock and does not leave: its library hangs."""
    with contextlib.suppress(OSError, ValueError):
        _, pid, _, host = (home / LOCK_FILE).read_text().split()
        if host == socket.gethostname() and int(pid) != os.getpid():
            _say(f"the follower before this one (pid {pid}) hangs, and is ended.")
            os.kill(int(pid), signal.SIGKILL)


def _say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Follows a run, as the command line and the pipe say."""
    from paceline.trackers.libraries import adapter_class

    folder, name = Path(sys.argv[1]), sys.argv[2]
    # Libraries may read the standard input, or print to the standard output, which is the log.
    commands = Commands(os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    todo = commands.next(60.0)
    if todo is None:
        return
    follower = Follower(folder, name, todo, adapter_class)
    follower.take_over()
    done = follower.follow(commands)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if done else 1)  # threads of a library that hangs do not keep the process


if __name__ == "__main__":
    main()
