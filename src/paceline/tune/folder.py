"""The folder of a study: its paths, its lock, and the trials as lines of text.

    <study>/recipe.yaml      what `paceline tune <study>` continues
    <study>/study.json       what the study was begun with, and what was changed since
    <study>/study.db         Optuna's storage, unless `tune.storage` names another one
    <study>/trials.jsonl     a line for each change of a trial's state; the last one counts
    <study>/best.yaml        the recipe of the best trial
    <study>/trials/trial_0007/   a run like any other, or seed_<n> below it for several seeds
    <study>/claims/0007/     its lock is held by the process that has the trial

One process at a time changes what is there, under the lock of the folder itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.log.files import replacing
from paceline.log.floats import as_text, revived
from paceline.log.lock import FolderLock, is_free
from paceline.log.secrets import masked

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STUDY_FILE = "study.json"
TRIALS_FILE = "trials.jsonl"
BEST_FILE = "best.yaml"
FORMAT = 1
HOME, REVIVES, SEEDS, CAUSE = "home", "revives", "seeds", "cause"
"""Attributes of Optuna's trials: the study's folder that has the trial; the trial it continues; the
value of each seed; why it has failed."""


class StudyFolder:
    """The files of one study.

    Args:
        path: the study's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # Paths

    def trial(self, number: int) -> Path:
        """The run folder of a trial, or of its seeds.

        Args:
            number: of the trial.
        """
        return self.path / "trials" / f"trial_{number:04d}"

    def claim(self, number: int) -> Path:
        """The folder whose lock says that a process has a trial.

        Args:
            number: of the trial.
        """
        return self.path / "claims" / f"{number:04d}"

    @property
    def exists(self) -> bool:
        """Whether there is a study."""
        return (self.path / STUDY_FILE).is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other process changes the study. It is released if this process dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(ImportError, OSError):  # a file system without locks
                import fcntl

                fcntl.lockf(handle, fcntl.LOCK_EX)  # waits
            yield
        finally:
            os.close(handle)

    # study.json

    def read(self) -> dict[str, Any]:
        """The content of `study.json`; empty if there is none.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            found = json.loads((self.path / STUDY_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"{self.path / STUDY_FILE} is damaged: {error}") from error
        return dict(found)

    def write(self, content: Mapping[str, Any]) -> None:
        """Replaces `study.json`.

        Args:
            content: plain data.
        """
        text = json.dumps({"format": FORMAT, **masked(dict(content))}, indent=2, allow_nan=False)
        with replacing(self.path / STUDY_FILE) as file:
            file.write(text + "\n")

    def change(self, **fields: Any) -> None:
        """Changes fields of `study.json`; under the lock.

        Args:
            **fields: plain data.
        """
        found = self.read()
        if any(found.get(name) != value for name, value in fields.items()):
            self.write({**found, **fields})

    # trials.jsonl

    def lines(self) -> dict[int, dict[str, Any]]:
        """The newest line of each trial, by its number; a torn last line is left out."""
        found: dict[int, dict[str, Any]] = {}
        try:
            content = (self.path / TRIALS_FILE).read_bytes()
        except FileNotFoundError:
            return found
        for line in content.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                found[int(record["number"])] = record
        return {number: found[number] for number in sorted(found)}

    def append(self, *records: Mapping[str, Any]) -> None:
        """Adds lines; under the lock. A torn last line, which a kill has left, is cut first.

        Args:
            *records: plain data of trials.
        """
        if not records:
            return
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        handle = os.open(self.path / TRIALS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                content = os.pread(file.fileno(), end, 0)
                end = content.rfind(b"\n") + 1
                os.ftruncate(file.fileno(), end)
            os.pwrite(file.fileno(), text.encode(), end)

    # Claims

    def take(self, number: int, session: str) -> FolderLock | None:
        """Takes a trial for this process, if no other process has it.

        Args:
            number: of the trial.
            session: names the command that this process belongs to; counted by `starts`.
        """
        folder, lock = self.claim(number), FolderLock()
        folder.mkdir(parents=True, exist_ok=True)
        if not lock.try_to_take(folder):
            return None
        with open(folder / "starts", "a", encoding="utf-8") as file:
            file.write(f"{session} {os.getpid()}\n")
        return lock

    def is_dead(self, number: int) -> bool:
        """Whether no process has a trial that was begun here. Not while this process has one.

        Args:
            number: of the trial.
        """
        folder = self.claim(number)
        return not folder.is_dir() or is_free(folder)

    def starts(self, number: int, session: str = "") -> list[int]:
        """The processes that have begun a trial, in order.

        Args:
            number: of the trial.
            session: those of one command only.
        """
        try:
            text = (self.claim(number) / "starts").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        pairs = [line.split() for line in text.splitlines() if len(line.split()) == 2]
        return [int(pid) for name, pid in pairs if session in ("", name)]


def line_of(trial: FrozenTrial, folder: StudyFolder) -> dict[str, Any]:
    """A trial as a line of `trials.jsonl`: all that rebuilds it in an empty storage.

    Args:
        trial: as the storage has it.
        folder: of the study.
    """
    from optuna.distributions import distribution_to_json

    where = folder.trial(trial.user_attrs.get(REVIVES, trial.number))
    values = None if trial.values is None else [as_text(value) for value in trial.values]
    reports = sorted(trial.intermediate_values.items())
    return {
        "number": trial.number,
        "state": trial.state.name,
        "params": trial.params,
        "distributions": {
            name: json.loads(distribution_to_json(one)) for name, one in trial.distributions.items()
        },
        "reports": [[step, as_text(value)] for step, value in reports],
        "values": values,
        "seeds": trial.user_attrs.get(SEEDS),
        "revives": trial.user_attrs.get(REVIVES),
        "started": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
        "folder": str(where.relative_to(folder.path)) if where.is_dir() else None,
        "cause": trial.user_attrs.get(CAUSE),
        "restarts": max(0, len(folder.starts(trial.number)) - 1),
        "attributes": {k: v for k, v in trial.user_attrs.items() if k not in (SEEDS, CAUSE)},
    }


def _time(moment: Any) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def rebuild(study: optuna.Study, folder: StudyFolder) -> int:
    """Fills an empty storage with the trials of `trials.jsonl`.

    A trial that was under way, or of which there is no line, is under way again under its number:
    the next start goes on with it.

    Args:
        study: of Optuna, without trials.
        folder: of the study.

    Returns:
        The number of trials.
    """
    from datetime import datetime

    from optuna.distributions import json_to_distribution
    from optuna.trial import TrialState, create_trial

    lines = folder.lines()
    for number in range(max(lines, default=-1) + 1):
        line = lines.get(number, {})
        state = TrialState[line.get("state", "RUNNING")]
        attributes = {**line.get("attributes", {})}
        for name in (SEEDS, CAUSE):
            if line.get(name) is not None:
                attributes[name] = line[name]
        if not line:
            attributes[HOME] = folder.read().get(HOME)
        values = line.get("values")
        trial = create_trial(
            state=state,
            params=line.get("params", {}),
            distributions={
                name: json_to_distribution(json.dumps(one))
                for name, one in line.get("distributions", {}).items()
            },
            values=None if values is None else [revived(value) for value in values],
            intermediate_values={step: revived(v) for step, v in line.get("reports", [])},
            user_attrs=attributes,
        )
        if line.get("started"):
            trial.datetime_start = datetime.fromisoformat(line["started"])
        if line.get("ended"):
            trial.datetime_complete = datetime.fromisoformat(line["ended"])
        study._storage.create_new_trial(study._study_id, template_trial=trial)
    return max(lines, default=-1) + 1
