"""Trackers as a Trainer gets them: sinks that start a follower, and do nothing else."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from paceline.errors import ConfigError, MissingExtraError
from paceline.log.secrets import masked, without_credentials
from paceline.log.sinks import RunInfo, Sink
from paceline.trackers.process import Following

WAIT = 30.0  # seconds at the end of a run, for all of its trackers together

_log = logging.getLogger(__name__)
_open: dict[Path, list[Tracker]] = {}


class Tracker(Sink):
    """The base of the trackers: a process of its own follows the run folder's rows.

    The training process starts it and says how the run ended; rows, the library and the network
    cost it nothing. If it cannot send rows, one warning says so, and `paceline sync` sends them
    later. A resumed run continues the same run of the tracker, and sends no row twice.

    API keys come from the environment, as the library documents.

    Args:
        settings: of the tracker, for its adapter.

    Attributes:
        package: that has to be installed; also the name of the extra.
        adapter: name of the adapter: the tracker's own, or "module:Class".

    Raises:
        ConfigError: a setting looks like a credential.
        MissingExtraError: the package is not installed.
    """

    package: ClassVar[str] = ""
    adapter: ClassVar[str] = ""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
            if value is not None and value != ()
        }
        for key, value in self.settings.items():
            if without_credentials(value, key) != value:
                raise ConfigError(
                    f"{self.name}: {key} has a credential in it; give it by the environment."
                )
        if self.package and importlib.util.find_spec(self.package) is None:
            raise MissingExtraError(
                f"the tracker {self.name} needs the package {self.package}: "
                f'pip install "paceline[{self.package}]".'
            )
        self._following: Following | None = None
        self._folder = Path()
        self._warned = False
        self._ended: float | None = None

    def open(self, run: RunInfo) -> None:
        """See `Sink.open`.

        Raises:
            ConfigError: the run has no folder.
        """
        if run.folder is None:
            raise ConfigError(
                f"loggers: {self.name} follows the rows of a run folder: give run_dir."
            )
        self._folder, self._warned, self._ended = run.folder, False, None
        others = _open.setdefault(run.folder, [])
        count = 1 + sum(other.name == self.name for other in others)
        name = self.name if count == 1 else f"{self.name}_{count}"
        others.append(self)
        self._following = Following(run.folder, name)
        try:
            self._following.start(todo(self.adapter or self.name, self.settings, run))
        except OSError as error:
            self._warn(f"its process cannot be started ({error})")

    def sync(self) -> None:
        """Warns, once, if the tracker has reported a problem since the start."""
        if self._following is not None and not self._warned:
            cursor = self._following.cursor
            if cursor is not None and cursor.problem is not None:
                self._warn(cursor.problem)

    def close(self, status: str) -> None:
        """Has the tracker send what is left, and waits for it, half a minute at most."""
        if self._following is None:
            return
        mine = _open.get(self._folder, [])
        for other in mine:  # all of them at once: they are waited for together
            if other._ended is None and other._following is not None:
                other._ended = time.monotonic() + WAIT
                other._following.end(status)
        if self in mine:
            mine.remove(self)
        if not mine:
            _open.pop(self._folder, None)
        following, self._following = self._following, None
        assert self._ended is not None
        if not following.wait(self._ended) and not self._warned:
            cursor = following.cursor
            problem = cursor.problem if cursor is not None else None
            self._following = following
            late = f"it has not taken all rows within {WAIT:g} s"
            self._warn(problem or ("its process has failed" if following.has_failed else late))
            self._following = None

    def _warn(self, why: str) -> None:
        assert self._following is not None
        self._warned = True
        _log.warning(
            "tracker %s: %s. No row is lost: `paceline sync %s --to %s` sends what is missing; "
            "see %s.",
            self._following.name,
            why.rstrip("."),
            self._folder,
            self._following.name,
            self._following.log,
        )


def todo(adapter: str, settings: dict[str, Any], run: RunInfo) -> dict[str, Any]:
    """What a follower is to do, as plain data.

    Args:
        adapter: name of the adapter.
        settings: of the tracker.
        run: that it follows.
    """
    assert run.folder is not None
    config = dict(run.identity) if run.recipe is None else dict(run.recipe)
    home = run.folder.resolve()
    return {
        "type": adapter,
        "settings": settings,
        "run": run.id,
        "run_name": f"{home.parent.name}/{home.name}" if home.parent.name else home.name,
        "config": masked(config),
    }


class Wandb(Tracker):
    """Weights & Biases. Offline with `WANDB_MODE=offline`; then `wandb sync` uploads.

    Args:
        project, entity, group, tags: as `wandb.init` takes them.
        run_name: shown for the run; the run folder's name if not given.
        mode: "online" or "offline"; by default what `WANDB_MODE` says.
    """

    name = "wandb"
    package = "wandb"

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_name: str | None = None,
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        own = {"project": project, "entity": entity, "group": group, "tags": tuple(tags)}
        super().__init__({**own, "run_name": run_name, "mode": mode})


class MLflow(Tracker):
    """MLflow, by default in the sqlite database `mlflow.db` of the working folder.

    Args:
        project: the experiment's name.
        group: becomes the tag `group`.
        tags: become tags `tag.<name>`.
        run_name: shown for the run; the run folder's name if not given.
        uri: of the tracking server or database; by default what `MLFLOW_TRACKING_URI` says.
    """

    name = "mlflow"
    package = "mlflow"

    def __init__(
        self,
        *,
        project: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_name: str | None = None,
        uri: str | None = None,
    ) -> None:
        own = {"project": project, "group": group, "tags": tuple(tags)}
        super().__init__({**own, "run_name": run_name, "uri": uri})


class SwanLab(Tracker):
    """SwanLab. Offline with `SWANLAB_MODE=offline`.

    Args:
        project, group, tags: as `swanlab.init` takes them.
        entity: the workspace.
        run_name: shown for the run; the run folder's name if not given.
        mode: "online", "local" or "offline"; by default what `SWANLAB_MODE` says.
    """

    name = "swanlab"
    package = "swanlab"

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_name: str | None = None,
        mode: Literal["online", "local", "offline"] | None = None,
    ) -> None:
        own = {"project": project, "entity": entity, "group": group, "tags": tuple(tags)}
        super().__init__({**own, "run_name": run_name, "mode": mode})


class Trackio(Tracker):
    """trackio, in the folder `TRACKIO_DIR` or on a Space.

    Args:
        project, group: as `trackio.init` takes them.
        tags: become the configuration's `tags`.
        run_name: the run's id is added to it; the run folder's name if not given.
        space_id: of a Space that shows the run.
    """

    name = "trackio"
    package = "trackio"

    def __init__(
        self,
        *,
        project: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        run_name: str | None = None,
        space_id: str | None = None,
    ) -> None:
        own = {"project": project, "group": group, "tags": tuple(tags)}
        super().__init__({**own, "run_name": run_name, "space_id": space_id})
