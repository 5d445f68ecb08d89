"""The ranks of a save act as one: a failure on any rank is raised on all, so none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from paceline import errors
from paceline.errors import CheckpointError
from paceline.world.world import World

T = TypeVar("T")


class _Failed(Generic[T]):
    """An error on its way to the other ranks, as its class's name and its message."""

    def __init__(self, error: Exception) -> None:
        self.kind = type(error).__name__ if isinstance(error, errors.PacelineError) else ""
        self.message = describe(error)
        self.cause: Exception | None = error

    def __getstate__(self) -> dict[str, Any]:
        # An exception may hold anything, so only its message is sent.
        return self.__dict__ | {"cause": None}

    def error(self, rank: int | None = None) -> CheckpointError:
        kind = getattr(errors, self.kind, CheckpointError)
        kind = kind if issubclass(kind, CheckpointError) else CheckpointError
        made = kind(self.message if rank is None else f"rank {rank}: {self.message}")
        made.__cause__ = self.cause
        return made


def describe(error: BaseException) -> str:
    """An error as one readable line: a full disk is not shown as `OSError(28, ...)`."""
    if isinstance(error, errors.PacelineError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return f"{type(error).__name__}: {error}"


class Ranks:
    """All ranks of a world, with a process group that only checkpoints use.

    A separate group lets a background save run beside training's own collectives. It is created at
    the first use, which must therefore happen on every rank.

    Args:
        world: this process's rank among the others.
    """

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._world = world
        self._made: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def _group(self) -> dist.ProcessGroup | None:
        if self._made is None:
            self._made = self._world.new_group()
        return self._made

    def everywhere(
        self, work: Callable[[], T], check: Callable[[list[T]], None] | None = None
    ) -> list[T]:
        """Runs `work` on every rank; if it fails on one, every rank raises.

        Args:
            work: this rank's part.
            check: called on rank 0 with all results; if it raises, all ranks raise.

        Returns:
            Every rank's result, in order, on rank 0; an empty list elsewhere.

        Raises:
            CheckpointError: the first failure (or its own subclass), naming its rank.
        """
        mine = _attempt(work)
        if self.size == 1:
            results = [_value(mine)]
            if check is not None:
                check(results)
            return results
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(mine, gathered, dst=0, group=self._group)

        def judge() -> None:
            for rank, result in enumerate(gathered or []):
                if isinstance(result, _Failed):
                    raise result.error(rank)
            if check is not None:
                check(gathered or [])

        self.main(judge)
        return gathered or []

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result; if one fails, all raise."""
        box: list[T] = []
        self.everywhere(lambda: box.append(work()))
        return box[0]

    def main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its result, or raises its error, on every rank."""
        if self.size == 1:
            return _value(_attempt(work))
        box: list[Any] = [_attempt(work) if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return _value(box[0])

    def scatter(self, work: Callable[[], list[T]]) -> T:
        """Runs `work` on rank 0; rank i gets the i-th of its results, or all raise its error."""
        if self.size == 1:
            return _value(_attempt(lambda: work()[0]))
        made = _attempt(work) if self.is_main else None
        parts: list[Any] | None = made if isinstance(made, list) else None
        if self.is_main and parts is None:
            parts = [made] * self.size
        box: list[Any] = [None]
        dist.scatter_object_list(box, parts, src=0, group=self._group)
        return _value(box[0])


def _attempt(work: Callable[[], T]) -> T | _Failed:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - it travels to every rank and is raised there
        return _Failed(error)


def _value(result: Any) -> Any:
    if isinstance(result, _Failed):
        raise result.error()
    return result
