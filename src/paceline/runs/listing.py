"""Finds run folders and reads them: `run.json`, rows, and the recipe's text.

A run folder may come from anywhere. It is read as JSON and YAML of bounded size; nothing in it is
imported, no link in it is followed, and a broken file makes a run "damaged", not an error; one
that the disk does not give makes it "unreadable".
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import ConfigError
from paceline.log.lock import is_free
from paceline.log.run_record import RUN_FILE, read_run
from paceline.log.sinks import METRICS_FILE, latest_values
from paceline.reading import is_answer, read_file

Value = str | bool | int | float | None

_OWN_FOLDERS = frozenset(
    {"checkpoints", "exports", "pretrained", "code", "earlier", "media", "trackers"}
)
_COUNTERS = ("step", "epoch", "samples", "items")
_MAX_RECIPE = 1 << 20
_MAX_VALUES = 10_000
_MAX_DEPTH = 60
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunFolder:
    """One run folder and what its files say.

    Attributes:
        folder: the run folder.
        name: its path below the folder that was searched, e.g. `digits/baseline/seed_1`.
        status: "complete", "pruned" (by a study), "stopped", "failed", "running", "killed"
            (recorded as running, but no process trains there), "damaged" or "unreadable" (`problem`
            says why).
        record: the content of `run.json`, empty if it could not be had.
        metrics: of the last validation; the newest logged values of a run that has not ended.
        problem: what is wrong with `run.json`.
    """

    folder: Path
    name: str
    status: str
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Value] = field(default_factory=dict)
    problem: str | None = None

    @cached_property
    def values(self) -> dict[str, Value]:
        """Everything in `run.json`, flat: `status`, `best`, `val/loss`, `git.commit`, ...

        The most important values are `name`, `status`, `step`, `epoch`, `monitor` (the monitored
        metric), `best` (its best value) and `duration` (seconds of training in all starts).
        """
        told = {k: v for k, v in self.record.items() if k not in ("starts", "plan", "metrics")}
        if isinstance(command := told.get("command"), list):
            told["command"] = shlex.join(map(str, command))
        return {
            **flat(told),
            **self.metrics,
            "duration": duration(self.record, self.status),
            "name": self.name,
            "folder": str(self.folder),
            "status": self.status,
        }

    @cached_property
    def recipe(self) -> dict[str, Value]:
        """The recipe by dotted keys, with unresolved interpolations; {} if there is none."""
        try:
            return flat(_read_yaml(self.folder / "recipe.yaml"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}

    def get(self, key: str) -> Value:
        """A value by its name in `values`, or else in `recipe`; None if there is none."""
        if key in self.values:
            return self.values[key]
        return self.recipe.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self.values or key in self.recipe


def find_runs(folder: Path | str) -> list[RunFolder]:
    """Every run in a folder and its subfolders, the latest started first.

    Args:
        folder: a folder of runs, or a run. Links below it are not followed.

    Raises:
        ConfigError: the folder does not exist.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ConfigError(f"there is no folder {str(top)!r} with runs in it.")
    runs = [read(path, _name(path, top)) for path in _run_folders(top)]
    return sorted(runs, key=lambda run: str(run.record.get("started", "")), reverse=True)


def read(folder: Path, name: str | None = None) -> RunFolder:
    """Reads one run folder; never raises, whatever it contains.

    Args:
        folder: the run folder.
        name: its name in lists, by default the last two parts of its path.
    """
    if name is None:
        name = _name(folder, folder)
    try:
        run = _read(folder, name)
        run.values  # noqa: B018  raises here if it cannot be listed
    except (OSError, ValueError) as error:
        of_disk = isinstance(error, OSError)
        told = "unreadable" if of_disk and not is_answer(error) else "damaged"
        return RunFolder(folder, name, told, problem=str(error.strerror if of_disk else error))
    return run


def _read(folder: Path, name: str) -> RunFolder:
    record = read_run(folder)
    status = record.get("status")
    if not isinstance(status, str):
        raise ValueError("it has no status")
    metrics = record.get("metrics")
    metrics = flat(metrics) if isinstance(metrics, dict) else {}
    if status == "running":
        status = _running_or_killed(folder, record)
        with contextlib.suppress(OSError):
            latest = flat(latest_values(folder / METRICS_FILE))
            record |= {key: latest.pop(key) for key in _COUNTERS if key in latest}
            metrics |= latest
    return RunFolder(folder, name, status, record, metrics)


def duration(record: Mapping[str, Any], status: str) -> float | None:
    """Seconds of training in all starts of a run, as far as their ends are known.

    Args:
        record: the content of `run.json`.
        status: the run's status; a running one is counted until now.
    """
    starts = record.get("starts")
    parts = [p for p in starts if isinstance(p, dict)] if isinstance(starts, list) else []
    ended = record.get("ended")
    if status == "running":
        ended = datetime.now(UTC).isoformat()
    spans = [(p.get("started"), p.get("ended")) for p in parts]
    spans.append((record.get("started"), ended))
    known: list[float] = []
    for start, end in spans:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = datetime.fromisoformat(end) - datetime.fromisoformat(start)  # pyright: ignore[reportArgumentType]
            known.append(seconds.total_seconds())
    return sum(known) if known else None


def flat(tree: Any) -> dict[str, Value]:
    """The leaves of a tree of dictionaries and lists by dotted key.

    Raises:
        ValueError: it is larger or deeper than any tree that a run writes.
    """
    found: dict[str, Value] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return found
        path, node = waiting.pop()
        if isinstance(node, dict):
            below = [(str(key), value) for key, value in node.items()]
        elif isinstance(node, list):
            below = [(str(i), value) for i, value in enumerate(node)]
        else:
            found[".".join(path)] = _plain(node)
            continue
        if len(path) >= _MAX_DEPTH:
            break
        waiting += [((*path, key), value) for key, value in reversed(below)]
    raise ValueError("it is larger or deeper than anything that a run writes")


def _plain(value: Any) -> Value:
    """A leaf as a number, text, boolean or None."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return math.inf if value > 0 else -math.inf  # not even Python prints one of any length
    return value if isinstance(value, Value) else str(value)


def _run_folders(top: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(top, followlinks=False):
        is_run = RUN_FILE in files
        if is_run:
            yield Path(path)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (is_run and name in _OWN_FOLDERS)
        )


def _name(path: Path, top: Path) -> str:
    if path == top:
        return "/".join(path.resolve().parts[-2:])
    return path.relative_to(top).as_posix()


def _running_or_killed(folder: Path, record: Mapping[str, Any]) -> str:
    """A run recorded as running counts as killed if it ran here and its folder is not locked."""
    here = record.get("hostname") == socket.gethostname()
    own = here and record.get("pid") == os.getpid()
    return "killed" if here and not own and is_free(folder) else "running"


def _read_yaml(path: Path) -> Any:
    """Reads a YAML file without anchors, which could expand without bound; no run writes them.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read, or is not such a file.
    """
    text = read_file(path, _MAX_RECIPE, links=False)
    depth = 0
    for event in yaml.parse(text, Loader=_YAML):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError("it is not a recipe that a run has written")
    try:
        return yaml.load(text, Loader=_YAML)  # a SafeLoader, in C if available
    except (AttributeError, TypeError, OverflowError) as error:  # PyYAML's own, for odd scalars
        raise ValueError(str(error)) from error
