"""What a Trainer asks of the engine that stores its checkpoints.

`native` ships with Paceline (native_engine.py): safetensors and JSON in one folder a checkpoint.
Another one derives from `CheckpointEngine`, is registered and is chosen by its name:

    @register("checkpoint_engine", "one_file")
    class OneFile(CheckpointEngine): ...

    Trainer(..., checkpoint=CheckpointPolicy(engine="one_file"))
"""

from __future__ import annotations

import builtins
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paceline import registry
from paceline.checkpoint.json_file import read_json
from paceline.checkpoint.policy import NATIVE, CheckpointPolicy
from paceline.errors import CheckpointError, ConfigError
from paceline.reading import names
from paceline.world.world import World

KIND = "checkpoint_engine"
"""The engines' kind in the registry, and the key of run.json that records a run's engine."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, as it describes itself.

    Attributes:
        path: its folder or file.
        step: optimizer steps done.
        save_id: rises with every save of a run, whatever happened to earlier ones.
        best: whether it had the best value of the monitored metric when it was saved.
        info: what the trainer added to `save`.
    """

    path: Path
    step: int
    save_id: int
    best: bool = False
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Notice:
    """What an engine reports to the loop.

    Attributes:
        kind: `saved` or `failed`, once for each save; or `damaged` (set aside), `abandoned` (set
            aside), `recovered` or `warning`.
        message: one line for people.
        step: the checkpoint's step, where it is known.
        path: where a `saved` checkpoint is.
        best: whether a `saved` checkpoint is marked best.
    """

    kind: Literal["saved", "failed", "damaged", "abandoned", "recovered", "warning"]
    message: str
    step: int | None = None
    path: Path | None = None
    best: bool = False


class CheckpointEngine(ABC):
    """Stores and finds the checkpoints of one run.

    Every method is called on every rank, in the same order, except the readers `scan`, `verify` and
    `load_tree`: these need no engine and no other rank. Only the calling thread's collectives and
    those of a process group of the engine's own (`world.new_group()`) may be used; in a background
    thread only the latter.

    Args:
        folder: where the checkpoints belong, `checkpoints` in the run's folder. The engine makes it
            at the first save: one that is missing or empty holds no checkpoint of any engine.
        policy: what to keep, and whether to write in the background.
        world: the ranks that save together.

    Attributes:
        failed_step: the run's last step that was not finite, for `to_keep`; None without one. The
            Trainer sets it on rank 0 before each save.
    """

    failed_step: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named(KIND, cls)

    def __init__(self, folder: Path, policy: CheckpointPolicy, world: World) -> None:
        self.folder = folder
        self.policy = policy
        self.world = world

    # Saving

    @abstractmethod
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
        """Saves the state, after finishing the save in flight if there is one.

        With an asynchronous policy this returns once the state is copied, otherwise once it is on
        the disk. A failed write leaves the previous checkpoints alone and is reported by `poll` and
        `wait`.

        Args:
            tree: the state (`checkpoint/state.py` lists it), the same on every rank except
                `tree["rank"]`, where each rank gives `{"<its rank>": {...}}` and the checkpoint
                gets all of them. Tensors are live: training changes them in place. They may be
                DTensors, of which each rank has its shard.
            step: optimizer steps done; a checkpoint of the same step is replaced.
            best: whether it has the best value of the monitored metric so far.
            synchronous: return only when it is on the disk, or raise. For a run's last save.
            info: plain values that `Checkpoint.info` gives back.
            before: called on rank 0 before the checkpoint is published, in the background if the
                save is; if it raises, the save fails. For files that the checkpoint refers to.

        Raises:
            StateError: something in the tree cannot be stored, or the ranks' trees differ.
            CheckpointError: it could not be written; raised only if `synchronous`.
        """

    @abstractmethod
    def wait(self) -> CheckpointError | None:
        """Finishes the save in flight; returns why the latest save failed, or None."""

    @abstractmethod
    def poll(self) -> builtins.list[Notice]:
        """What has happened since the last call. Never waits.

        Each rank reports that a save has ended (`saved`, `failed`) once it knows; what else is
        reported matters on rank 0 only.
        """

    def close(self) -> None:
        """Finishes the save in flight and frees what the engine holds. Safe to call twice."""
        self.wait()

    # Finding and loading

    def recover(self) -> None:  # noqa: B027  not every engine leaves something
        """Finishes or removes what a killed process left. Called once, before anything else."""

    @abstractmethod
    def list(self) -> builtins.list[Checkpoint]:
        """The published checkpoints by `save_id`, oldest first; their tensors are not read."""

    @abstractmethod
    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint by `save_id`; damaged ones are set aside and reported.

        What cannot be read is not damaged: an engine that meets an OSError tries again, and
        raises (`paceline.reading.patiently` does both).

        Raises:
            UnreadableError: something could not be read.
            CheckpointError: one is not to be judged by this version, or cannot be set aside.
        """

    @abstractmethod
    def load(self, path: Path) -> dict[str, Any]:
        """Reads a checkpoint that is intact, or refuses it.

        Args:
            path: as `Checkpoint.path`.

        Returns:
            The tree in host memory, with every rank's part under `tree["rank"]`.

        Raises:
            CheckpointError: it is damaged, or not a checkpoint.
        """

    @abstractmethod
    def abandon_after(self, save_id: int) -> None:
        """Sets checkpoints with a larger `save_id` aside: the run resumes from an earlier one."""

    # Space

    def check_space(self, tree: dict[str, Any]) -> None:  # noqa: B027  not every engine can tell
        """Checks, before the first step, that there is space for one checkpoint.

        Args:
            tree: see `save`.

        Raises:
            CheckpointError: there is not enough space.
        """

    # Reading a folder

    @staticmethod
    @abstractmethod
    def scan(
        folder: Path,
    ) -> tuple[builtins.list[Checkpoint], builtins.list[tuple[Path, CheckpointError]]]:
        """The checkpoints in a folder by `save_id`, oldest first, and what is damaged there.

        Args:
            folder: as the constructor's; it need not exist.
        """

    @staticmethod
    @abstractmethod
    def verify(path: Path) -> Checkpoint:
        """Reads all of a checkpoint.

        Args:
            path: as `Checkpoint.path`.

        Raises:
            CheckpointError: it is damaged, or not a checkpoint.
        """

    @staticmethod
    @abstractmethod
    def load_tree(path: Path, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Reads a checkpoint that is known to be intact, in this process alone.

        Args:
            path: as `Checkpoint.path`.
            parts: the keys of the tree to read, e.g. ("models",); None for all.

        Raises:
            CheckpointError: it cannot be read.
        """


def engine_class(name: str) -> type[CheckpointEngine]:
    """The engine registered as `name`.

    Raises:
        ConfigError: no such engine (the nearest name is given), or a class that is none.
    """
    found = registry.lookup(KIND, name)
    if not (inspect.isclass(found) and issubclass(found, CheckpointEngine)):
        raise ConfigError(f"the checkpoint engine {name!r} is {found!r}: no CheckpointEngine.")
    if lacking := sorted(found.__abstractmethods__):
        raise ConfigError(
            f"the checkpoint engine {name!r} lacks {', '.join(lacking)} of a CheckpointEngine."
        )
    return found


def recorded_engine(run_dir: Path) -> str | None:
    """The name of the engine that wrote the checkpoints in a run's folder; None without any.

    Where run.json does not say, it is the native one.

    Raises:
        UnreadableError: the folder or run.json could not be read.
    """
    if not names(run_dir / "checkpoints"):
        return None
    try:
        record = read_json(run_dir / "run.json")
    except CheckpointError:
        record = None
    name = record.get(KIND) if isinstance(record, dict) else None
    return name if isinstance(name, str) else NATIVE


def engine_of(run_dir: Path) -> type[CheckpointEngine] | None:
    """The engine that wrote the checkpoints in a run's folder; None without any.

    Raises:
        ConfigError: nothing in this process has registered it.
    """
    name = recorded_engine(run_dir)
    if name is None:
        return None
    try:
        return engine_class(name)
    except ConfigError as error:
        raise ConfigError(
            f"{run_dir}: its checkpoints were written by another engine: {error}"
        ) from error
