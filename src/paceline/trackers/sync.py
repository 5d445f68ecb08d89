"""Sends what a tracker is missing of a run that is over: later, or on another machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from paceline import registry
from paceline.errors import ConfigError, PacelineError, nearest
from paceline.log.lock import is_free
from paceline.log.run_record import read_run
from paceline.log.sinks import METRICS_FILE, RunInfo
from paceline.reading import read_file
from paceline.trackers.process import Following
from paceline.trackers.tracker import Tracker, todo

_FOREVER = 10.0**9


def sync(folder: Path, to: str, settings: Mapping[str, Any] | None = None) -> int:
    """Sends a run's missing rows to a tracker, and waits until it has them.

    Args:
        folder: the run folder.
        to: the tracker, such as "wandb"; "wandb_2" is a run's second one.
        settings: of the tracker; by default those it had in training.

    Returns:
        Rows that the tracker has now.

    Raises:
        ConfigError: there is no such run or tracker, the run is still training, a setting is wrong,
            or differs from that with which rows were sent before.
        PacelineError: the tracker did not take the rows.
    """
    record = _record(folder)
    following = Following(folder, to)
    cursor = following.cursor
    before = None if cursor is None or cursor.run != record["id"] else cursor
    changed: dict[str, Any] = {}
    if before is not None and before.rows.rows:
        changed = _changed(before.settings, settings or {})
    if changed:
        told = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        raise ConfigError(
            f"{to} has rows of this run already, with other settings than {told}: send them there "
            f"beside as --to {to}_2, or leave these out."
        )
    given = {**({} if before is None else before.settings), **(settings or {})}
    tracker = _tracker(to, given)
    recipe, recipe_file = None, folder / "recipe.yaml"
    if recipe_file.exists():
        recipe = yaml.safe_load(read_file(recipe_file, 1 << 20, links=False))
    known = {} if before is None else before.config
    info = RunInfo(folder, record["id"], identity=known, recipe=recipe, resumed=True)
    following.start(todo(tracker.adapter or tracker.name, tracker.settings, info))
    status = record.get("status", "failed")
    following.end("killed" if status == "running" else status)
    done = following.wait(time.monotonic() + _FOREVER)
    cursor = following.cursor
    if not done or cursor is None:
        why = None if cursor is None else cursor.problem
        raise PacelineError(f"{to}: {why or 'its process failed'}; see {following.log}.")
    return cursor.rows.rows


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that would send the rest of the rows elsewhere than those before."""
    return {key: value for key, value in now.items() if before.get(key) != value}


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = read_run(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no run folder: it has no run.json.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'run.json'} cannot be read: {error}") from error
    if "id" not in record or not (folder / METRICS_FILE).exists():
        raise ConfigError(f"{folder} has no rows to send.")
    if record.get("status") == "running" and not is_free(folder):
        raise ConfigError(f"{folder} is still training: its trackers follow it. Sync it later.")
    return record


def _tracker(name: str, settings: Mapping[str, Any]) -> Tracker:
    base, _, number = name.rpartition("_")
    kind = base if base and number.isdigit() else name
    known = [each for each in registry.names("logger") if _is_tracker(each)]
    if kind not in known:
        raise ConfigError(
            f"there is no tracker {name!r}{nearest(name, known) or '.'} Known: {', '.join(known)}"
        )
    cls = registry.lookup("logger", kind)
    takes = signature(cls).parameters
    for key in settings:
        if key not in takes:
            raise ConfigError(
                f"{kind} has no setting {key!r}{nearest(key, takes) or '.'} "
                f"It has: {', '.join(takes)}"
            )
    return cls(**settings)


def _is_tracker(name: str) -> bool:
    held = registry.lookup("logger", name)
    return isinstance(held, type) and issubclass(held, Tracker)
