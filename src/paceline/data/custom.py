"""A training source of the user's own, kept in step over the ranks.

Each rank collects for as long as it needs. Every draw ends in one exchange, of how many
micro-batches each rank has. So a rank that has its window waits where it can still stop, and not in
the step's first collective, from which there is no way back. `trainer/stop.py` proves that all
ranks then stop before the same window.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

from paceline.data.alike import borrowed, check_alike, fingerprint
from paceline.data.source import (
    Draw,
    Source,
    SourceFactory,
    StopCollecting,
    Stopping,
    WindowSize,
)
from paceline.errors import ConfigError, DataError
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World

_MEMBERS = (
    *Source.__annotations__,
    *(name for name, value in vars(Source).items() if callable(value) and name[0] != "_"),
)
_NOTHING = object()


def missing_members(thing: Any) -> list[str]:
    """What an object lacks to be a `Source`, in the protocol's order."""
    return [name for name in _MEMBERS if not hasattr(thing, name)]


def makes_sources(loader: Any) -> TypeGuard[SourceFactory]:
    """Whether a `train_dataloader` makes a source for each run."""
    return callable(getattr(loader, "open_source", None))


def is_custom(loader: Any) -> TypeGuard[Source | SourceFactory]:
    """Whether a `train_dataloader` is a source of one's own, or makes one."""
    return makes_sources(loader) or not missing_members(loader)


def why_no_source(loader: Any) -> str | None:
    """What an object lacks that was meant to be a source, and cannot be iterated instead."""
    missing = missing_members(loader)
    if hasattr(loader, "__iter__") or not missing or len(missing) == len(_MEMBERS):
        return None
    return f"lacks {', '.join(missing)} to be a source (paceline.Source)"


def open_custom(
    loader: Source | SourceFactory, size: WindowSize, seed: int, world: World, stopping: Stopping
) -> CustomSource:
    """The source of a run whose `train_dataloader` is one or makes one.

    Args:
        loader: the user's.
        size: the Trainer's settings on windows.
        seed: the run's seed.
        world: the ranks.
        stopping: the run's agreement.

    Raises:
        ConfigError: what `open_source` gives is no source.
    """
    source: Any = loader
    if makes_sources(loader):
        source = loader.open_source(size, seed, world, stopping.asked)
        if missing := missing_members(source):
            raise ConfigError(
                f"train_dataloader: open_source() of {type(loader).__name__} gave a "
                f"{type(source).__name__}, which lacks {', '.join(missing)} to be a source "
                "(paceline.Source)."
            )
    return CustomSource(source, seed, world, stopping)


class _Drawn(NamedTuple):
    """What a rank tells the others of its draw."""

    ended: bool = True  # its epoch has no more windows
    gave_up: bool = False
    sizes: tuple[int, ...] = ()
    samples: int = -1
    lacks: bool = False  # it has had no batch that could stand in
    read: bytes = b""


class CustomSource:
    """Training windows of a source of the user's own (`Source`).

    Args:
        source: this rank's.
        seed: the run's seed; what a draw takes from the global generators is seeded from it.
        world: the ranks, whose windows are made equally long.
        stopping: the run's agreement on stopping before a window.
    """

    def __init__(self, source: Source, seed: int, world: World, stopping: Stopping) -> None:
        self._source = source
        self._seed = seed
        self._world = world
        self._stopping = stopping
        # Ranks that work on the same samples; a world on paper has fewer processes than ranks.
        self._alike = max(1, world.size // world.dp_size)
        self._epoch = 0
        self._collects = callable(getattr(source, "collect", None))
        self._collected = False  # ... for the epoch at hand
        self.is_empty = False  # whether nothing was collected for it
        self._last: Any = _NOTHING  # stands in where another rank has more batches
        self._before: dict[str, Any] | None = None  # the state from before a draw that is given up
        self.micro_batches = source.micro_batches
        self.windows_per_epoch = source.windows_per_epoch
        self.per_rank = source.per_rank
        self.identity = source.identity
        name = type(source).__name__
        self.plan = [
            (f"the training source {name} makes its own windows", "train_dataloader"),
            *source.plan,
        ]

    def start_epoch(self, epoch: int) -> None:
        self._epoch, self._collected, self.is_empty = epoch, False, False
        self._seed_all(0, epoch)
        self._source.start_epoch(epoch)

    def draw(self) -> Draw | None:
        self._before = self._source.state_dict()
        decided = self._collects and not self._collected
        if decided:
            self._collect()
        # After `collect` a draw exchanges something: all ranks come to it.
        draw, gave_up = None, not self._collects and self._stopping.asked()
        if not gave_up:
            self._seed_all(1, self._stopping.global_step)
            try:
                draw = self._source.draw()
            except StopCollecting:
                gave_up = True
        ahead: list[Any] = []  # batches that are read before the window is
        if draw is not None and self._alike > 1:
            ahead = list(map(draw.batch, range(len(draw.sizes))))
        drawn = self._exchange(draw, gave_up, fingerprint(ahead))
        if not decided and self._stopping.decided():
            raise StopCollecting
        if decided and draw is None and all(one.ended for one in drawn):
            self._before, self.is_empty = None, True
            return None
        self._check(drawn)
        self._before = None
        return self._leveled(draw, drawn, ahead)

    def _collect(self) -> None:
        """Has the source collect what its epoch is made of: each rank takes its own time.

        Raises:
            StopCollecting: on every rank, since the run stops before the window.
            DataError: on every rank, a source has given up without a reason.
        """
        gave_up = self._stopping.asked()
        if not gave_up:
            self._seed_all(2, self._stopping.global_step)
            try:
                self._source.collect()  # pyright: ignore[reportAttributeAccessIssue]
            except StopCollecting:
                gave_up = True
        self._world.wait_for_all()  # which may take minutes
        drawn = [_Drawn(gave_up=each) for each in self._world.all_gather_object(gave_up)]
        if self._stopping.decided():
            raise StopCollecting
        self._refuse_to_give_up(drawn, "collect")
        self._collected = True

    def _exchange(self, draw: Draw | None, gave_up: bool, read: bytes) -> list[_Drawn]:
        """What each rank has drawn; every rank comes here, whatever has become of its draw."""
        mine = _Drawn(gave_up=gave_up, lacks=self._last is _NOTHING)
        if draw is not None:
            sizes = tuple(draw.sizes)
            lacks = mine.lacks and not sizes
            mine = _Drawn(False, gave_up, sizes, draw.samples, lacks, read)
        if self._world.size == 1:
            return [mine]
        self._world.wait_for_all()  # which may take minutes
        return [_Drawn(*each) for each in self._world.all_gather_object(tuple(mine))]

    def _check(self, drawn: list[_Drawn]) -> None:
        """Refuses, on every rank, draws that make no window.

        Raises:
            DataError: saying what is wrong with them.
        """
        name, windows = type(self._source).__name__, [one for one in drawn if not one.ended]
        self._refuse_to_give_up(drawn, "draw")
        if not any(one.sizes for one in drawn):
            what = "a window without a micro-batch" if windows else "no window"
            raise DataError(
                f"{name}.draw() gave {what} in epoch {self._epoch}, on every rank, where "
                "at_end() had not said that it ends. Each epoch needs at least one window."
            )
        if len({one.samples for one in windows}) > 1:
            raise DataError(
                f"{name}.draw() gave {[one.samples for one in windows]} as `samples`, by rank: "
                "these are the samples of all ranks, or -1 on all."
            )
        sizes = [size for one in drawn[:: self._alike] for size in one.sizes]
        if self._world.size < self._world.dp_size:
            return
        if windows[0].samples >= 0 and (min(sizes) < 0 or sum(sizes) != windows[0].samples):
            raise DataError(
                f"{name}.draw() gave samples={windows[0].samples}, and the sizes of all ranks' "
                f"micro-batches are {sizes}: `samples` is their sum, or -1 to have them counted."
            )
        check_alike([(one.sizes, one.read) for one in drawn], self._world)

    def _refuse_to_give_up(self, drawn: list[_Drawn], what: str) -> None:
        if any(one.gave_up for one in drawn):
            raise DataError(
                f"{type(self._source).__name__}.{what}() raised StopCollecting, but the run does "
                "not stop: raise it once stopping() is true; request_stop() of the Trainer asks "
                "for a stop."
            )

    def _leveled(self, draw: Draw | None, drawn: list[_Drawn], ahead: list[Any]) -> Draw:
        """This rank's part of the window, with stand-ins for what other ranks have more."""
        counts = [len(one.sizes) for one in drawn]
        sizes = [] if draw is None else draw.sizes
        if any(one.lacks for one in drawn):
            if draw is not None and sizes and not ahead:
                ahead = [draw.batch(0)]
            lent = borrowed(self._world, counts, ahead)
            self._last = lent if self._last is _NOTHING else self._last

        def batch(j: int) -> Any:
            if j < len(ahead):
                self._last = ahead[j]
            elif draw is not None and j < len(sizes):
                self._last = draw.batch(j)
            return self._last

        return Draw(
            [*sizes, *[0] * (max(counts) - len(sizes))],
            max(one.samples for one in drawn),
            batch,
            (lambda j: []) if draw is None else draw.ids,
        )

    def at_end(self, *, keep: bool) -> bool:
        ended = self._source.at_end(keep=True)
        return all(self._world.all_gather_object(ended)) if self._world.size > 1 else ended

    def batches_done(self) -> int:
        return self._source.batches_done()

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict() if self._before is None else self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = None
        self._source.load_state_dict(state)

    def close(self) -> None:
        self._source.close()

    def _seed_all(self, what: int, index: int) -> None:
        seed_everything(stream(self._seed, "source", self._world.dp_rank, what, index))
