"""A study's folder: ordinary runs, and files that tell of them without a database."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.log.files import replacing
from paceline.log.floats import as_text
from paceline.log.lock import FolderLock, is_free
from paceline.log.sinks import read_rows
from paceline.reading import read_file

STUDY_FILE = "study.json"
TRIALS_FILE = "trials.jsonl"
BEST_FILE = "best.yaml"
DATABASE = "study.db"
TRIALS = "trials"
FORMAT = 1
_MOST_BYTES = 16 << 20


class StudyFolder:
    """The folder of a study.

    `study.json` says what is searched, by what trials are judged and how many there shall be;
    `trials.jsonl` has a line whenever a trial begins or ends, the last of a number counts;
    `best.yaml` is the best trial's recipe; each trial's run is in `trials/trial_0007`.

    Args:
        path: of the folder; it need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def database(self) -> Path:
        """Where Optuna keeps the trials, unless the recipe names another storage."""
        return self.path / DATABASE

    def trial(self, number: int) -> Path:
        """The folder of a trial's run, or of its runs with several seeds.

        Args:
            number: of the trial.
        """
        return self.path / TRIALS / f"trial_{number:04d}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other process begins or ends a trial, on any machine that shares the folder.

        Raises:
            ConfigError: another process has held the lock for a minute.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock()
        lock.take(self.path, lambda text: None)
        try:
            yield
        finally:
            lock.release()

    def is_left(self, number: int) -> bool | None:
        """Whether it is certain that no process trains a trial; None if its folder is not here.

        To be called within `locked`, where no trial is about to begin, and by no process that
        trains it.

        Args:
            number: of the trial.
        """
        folder = self.trial(number)
        if not folder.is_dir():
            return None
        return all(is_free(each) for each in (folder, *folder.glob("seed_*")))

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds a line to `trials.jsonl`, within `locked`.

        A line that a crash has torn is cut first. Lines are not synced to the disk: the database
        has the same trials.

        Args:
            line: from `paceline.tune.history.line_of`.
        """
        data = (json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
        handle = os.open(self.path / TRIALS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            end = os.fstat(handle).st_size
            while end and os.pread(handle, 1, end - 1) != b"\n":
                before = os.pread(handle, min(end, 1 << 16), max(0, end - (1 << 16)))
                end -= len(before) - (before.rfind(b"\n") + 1)
            os.ftruncate(handle, end)
            os.pwrite(handle, data, end)
        finally:
            os.close(handle)

    def lines(self) -> dict[int, dict[str, Any]]:
        """The last line of each trial, by its number in rising order; a torn one is left out.

        Raises:
            MetricError: a whole line is no JSON object.
        """
        path = self.path / TRIALS_FILE
        if not path.exists():
            return {}
        found = {int(line["number"]): line for line in read_rows(path)}
        return dict(sorted(found.items()))

    def write_study(self, content: Mapping[str, Any]) -> None:
        """Writes `study.json`.

        Args:
            content: plain values, without secrets.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / STUDY_FILE) as file:
            whole = {"format": FORMAT, **_plain(content)}
            file.write(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_study(self) -> dict[str, Any] | None:
        """The content of `study.json`; None if there is no study here.

        Raises:
            ConfigError: it is damaged, or of a later version.
        """
        path = self.path / STUDY_FILE
        try:
            content = json.loads(read_file(path, _MOST_BYTES))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConfigError(f"{path} is not of this version of Paceline.")
        return content


def _plain(value: Any) -> Any:
    """With texts for the numbers that JSON does not have."""
    if isinstance(value, float):
        return as_text(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
