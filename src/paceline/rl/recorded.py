"""rollouts.jsonl: every episode that a run was trained on, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paceline.errors import DataError
from paceline.log.sinks import RowFile, RunInfo, Sink, read_rows
from paceline.rl.graph import Graph, Node

ROLLOUTS_FILE = "rollouts.jsonl"


class RecordRollouts(Sink):
    """Writes `rollouts.jsonl` in the run folder; a resume cuts what it makes again, as of rows."""

    def __init__(self) -> None:
        self._file: RowFile | None = None

    def open(self, run: RunInfo) -> None:
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            self._file = RowFile(run.folder / ROLLOUTS_FILE, fresh=not run.resumed)

    def add(self, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Writes episodes.

        Args:
            episodes: from `record_of`.
        """
        if self._file is not None:
            for episode in episodes:
                self._file.append(episode)

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._file is None else dict(self._file.position())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._file is not None:
            wrong = self._file.check(dict(state))
            if wrong is not None:
                raise DataError(f"{ROLLOUTS_FILE}: {wrong}")
            self._file.cut(dict(state))

    def close(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def record_of(graph: Graph, *, experience: int, episode: int, seed: int) -> dict[str, Any]:
    """An episode as a line of JSON holds it.

    Args:
        graph: the episode.
        experience: in which it was played.
        episode: its number there, over all ranks.
        seed: from which it is played again.

    Returns:
        With "turns": each has the index of the turn before it as "parent", None for a first one.
    """
    turns: list[dict[str, Any]] = []

    def add(nodes: Sequence[Node], parent: int | None) -> None:
        for node in nodes:
            turns.append(_turn(node, parent))
            add(node.children, len(turns) - 1)

    add(graph.children, None)
    return {
        "experience": experience,
        "episode": episode,
        "seed": seed,
        "context": _plain(graph.context),
        "skipped": dict(graph.skipped),
        "turns": turns,
    }


def read_rollouts(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The episodes of a run, in the order in which they were played.

    Args:
        run_dir: the run's folder.

    Raises:
        DataError: the run has recorded none.
    """
    path = Path(run_dir) / ROLLOUTS_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist: the run has recorded no rollouts.")
    return read_rows(path)


def _turn(node: Node, parent: int | None) -> dict[str, Any]:
    held: dict[str, Any] = {
        "parent": parent,
        "probe": _plain(node.probe),
        "response": _plain(node.response),
        "reward": float(node.reward),
        "version": node.version,
    }
    if node.rewards:
        held["rewards"] = {name: float(value) for name, value in node.rewards.items()}
    if node.probe_ids is not None:
        held["probe_ids"] = np.asarray(node.probe_ids).tolist()
    if node.logprobs is not None:
        held["logprobs"] = [round(float(value), 6) for value in node.logprobs]
    return held


def _plain(value: Any) -> Any:
    """A state as JSON holds it: texts, numbers and containers of them; others as they are shown."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return repr(value)
