"""A checkpoint engine of a user's own: everything of a checkpoint in one safetensors file.

Its header holds the rest of the state as JSON. Rank 0 writes, at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paceline.checkpoint import (
    Checkpoint,
    CheckpointEngine,
    CheckpointPolicy,
    Notice,
    decode,
    encode,
    to_keep,
)
from paceline.errors import CheckpointError
from paceline.registry import register
from paceline.world.world import World

SUFFIX = ".safetensors"


@register("checkpoint_engine", "one_file")
class OneFile(CheckpointEngine):
    """The engine."""

    def __init__(self, folder: Path, policy: CheckpointPolicy, world: World) -> None:
        super().__init__(folder, policy, world)
        self._notices: list[Notice] = []
        self._error: CheckpointError | None = None

    def save(
        self,
        tree: dict[str, Any],
        step: int,
        *,
        best: bool = False,
        synchronous: bool = False,
        info: dict[str, Any] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        ranks = self.world.all_gather_object(tree.get("rank", {}))
        tree = {**tree, "rank": {rank: part for own in ranks for rank, part in own.items()}}
        path = self.folder / f"step_{step:08d}{SUFFIX}"
        wrong = self._main(lambda: self._write(path, tree, step, best, info or {}, before))
        self._error = None if wrong is None else CheckpointError(wrong)
        if wrong is None:
            self._notices.append(Notice("saved", f"{path.name}: saved", step, path, best))
        elif synchronous:
            raise CheckpointError(wrong)
        else:
            self._notices.append(Notice("failed", wrong, step))

    def _write(
        self,
        path: Path,
        tree: dict[str, Any],
        step: int,
        best: bool,
        info: dict[str, Any],
        before: Callable[[], None] | None,
    ) -> str | None:
        """Returns what went wrong."""
        try:
            if before is not None:
                before()
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self.scan(self.folder)[0]
            save_id = found[-1].save_id + 1 if found else 1
            tensors, skeleton = encode(tree)
            about = {"step": step, "save_id": save_id, "best": best, "info": encode(info)[1]}
            header = {"about": json.dumps(about), "tree": json.dumps(skeleton)}
            save_file(tensors, self.folder / ".new", header)
            os.replace(self.folder / ".new", path)
        except (OSError, CheckpointError) as error:
            return str(error)
        found = self.scan(self.folder)[0]
        keep = to_keep(self.policy, found, {save_id}, failed_step=self.failed_step)
        for checkpoint in found:
            if checkpoint.save_id not in keep:
                checkpoint.path.unlink()
        return None

    def wait(self) -> CheckpointError | None:
        return self._error

    def poll(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices

    def list(self) -> list[Checkpoint]:
        return self._main(lambda: self.scan(self.folder)[0])

    def newest(self) -> Checkpoint | None:
        return self._main(self._find)

    def _find(self) -> Checkpoint | None:
        found, broken = self.scan(self.folder)
        for path, error in broken:
            path.rename(path.with_name(f".damaged.{path.name}"))
            self._notices.append(Notice("damaged", f"{error}; set aside"))
        return found[-1] if found else None

    def load(self, path: Path) -> dict[str, Any]:
        return self.load_tree(path)

    def abandon_after(self, save_id: int) -> None:
        self._main(lambda: [c.path.unlink() for c in self.list() if c.save_id > save_id])

    @staticmethod
    def scan(folder: Path) -> Any:
        found, broken = [], []
        for path in folder.glob(f"step_*{SUFFIX}"):
            try:
                found.append(OneFile.verify(path))
            except CheckpointError as error:
                broken.append((path, error))
        return sorted(found, key=lambda checkpoint: checkpoint.save_id), broken

    @staticmethod
    def verify(path: Path) -> Checkpoint:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
        except SafetensorError as error:  # an OSError would not say that it is damaged
            raise CheckpointError(f"{path}: {error}") from error
        return Checkpoint(path, **{**about, "info": decode({}, about["info"])})

    @staticmethod
    def load_tree(path: Path, parts: Collection[str] | None = None) -> dict[str, Any]:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads(file.metadata()["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tree = decode(tensors, skeleton)
        return tree if parts is None else {key: tree[key] for key in parts}

    def _main(self, work: Callable[[], Any]) -> Any:
        return self.world.broadcast_object(work() if self.world.is_main else None)
