"""From the user's DataLoader, or any iterable, to what the loop reads.

A plain DataLoader over a map-style dataset keeps its dataset, collate_fn, batch size, workers and
drop_last; its order becomes a function of (seed, pass), so that any position is computed directly.
Every other iterable keeps its own order. A training source of the user's own is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from paceline.data.custom import is_custom, open_custom
from paceline.data.fetch import Fetcher
from paceline.data.indexed import IndexedSource, IndexedValidation, Layout, Reader
from paceline.data.order import Order, Sampled, Sequential, Shuffled
from paceline.data.source import Source, Stopping, Validation, WindowSize, windows_in
from paceline.data.streamed import StreamedSource, StreamedValidation
from paceline.errors import ConfigError, DataError, counted
from paceline.world.seeding import seed_of
from paceline.world.world import World

# What a loader that is read by position does not get to do: one that has its own is iterated.
_MADE_ANEW = ("__iter__", "_get_iterator", "_index_sampler")


def is_indexed(loader: Any) -> TypeGuard[DataLoader]:
    """Whether the loader's order can be computed: a plain DataLoader over a map-style dataset."""
    return (
        isinstance(loader, DataLoader)
        and all(getattr(type(loader), own) is getattr(DataLoader, own) for own in _MADE_ANEW)
        and not isinstance(loader.dataset, IterableDataset)
        and not hasattr(loader, "state_dict")
    )


def open_training(
    loader: Any, size: WindowSize, seed: int, world: World, stopping: Stopping | None = None
) -> Source:
    """Opens the training source for a user's loader.

    Args:
        loader: a DataLoader, a loader with `state_dict`, any iterable of batches, or a source of
            the user's own.
        size: samples in a window and micro-batches in an epoch.
        seed: the run's seed.
        world: the ranks that share the data.
        stopping: the run's agreement on stopping before a window, which a source of the user's own
            takes part in.

    Raises:
        DataError: the loader is empty.
        ConfigError: the sizes do not match.
    """
    if size.epoch_length is not None and size.epoch_length < 1:
        raise ConfigError(f"epoch_length={size.epoch_length}: an epoch needs at least one batch.")
    if is_custom(loader):
        assert stopping is not None
        _check_no_stages("train_dataloader", world)
        return open_custom(loader, size, seed, world, stopping)
    if not is_indexed(loader):
        return _open_streamed(loader, size, seed, world)
    order, batched, plan = _order(loader, seed, world)
    batch_size = 1 if batched else (loader.batch_size or 1)
    accumulation = size.micro_batches(batch_size, world.dp_size)
    layout = Layout(
        order, batch_size, world.dp_rank, world.dp_size, size.epoch_length, batched=batched
    )
    single = loader.batch_size is None and not batched
    fetcher = Fetcher(loader.dataset, loader.collate_fn, seed, "sample", single=single)
    window = batch_size * accumulation * world.dp_size
    unit = ("batch", "es") if batched else ("sample",)
    plan.append(
        (
            f"each optimizer step sees {counted(window, *unit)}: "
            f"{accumulation} x {batch_size} on {counted(world.dp_size, 'rank')}; "
            f"an epoch has {counted(layout.units(0), *unit)}",
            "batch_size, gradient_accumulation_steps, global_batch_size, epoch_length",
        )
    )
    return IndexedSource(
        layout,
        Reader(fetcher, loader, layout),
        accumulation,
        sizes_known=not single,
        identity={
            "order": type(order).__name__.lower(),
            "samples": len(loader.dataset),  # pyright: ignore[reportArgumentType]
            "global_batch_size": window,
            "drop_last": bool(loader.drop_last),
        },
        plan=plan,
        sampled=_sampled_in(order),
    )


def loaders_by_name(loaders: Any) -> dict[str | None, Any]:
    """A `val_dataloader` as loaders by name; the name of a single one is None.

    Args:
        loaders: a loader, a mapping of some, or None for none.
    """
    if isinstance(loaders, Mapping):
        return dict(loaders)
    return {} if loaders is None else {None: loaders}


def open_validation(
    loader: Iterable[Any], seed: int, world: World, name: str | None = None
) -> Validation:
    """The validation source for a user's loader.

    Args:
        loader: as that of `open_training`.
        seed: the run's seed.
        world: the ranks that share the data.
        name: of one of several loaders. Its random streams depend on it and on no other loader.

    Raises:
        DataError: the loader is empty.
        ConfigError: there are too few samples for the ranks.
    """
    seed = seed_of(name, seed)
    setting = "val_dataloader" if name is None else f"val_dataloader[{name!r}]"
    label = "validation" if name is None else f"validation {name}"
    if not is_indexed(loader):
        _check_no_stages(setting, world)
        return StreamedValidation(loader, seed, world, setting, label)
    order, batched, plan = _order(loader, seed, world)
    batch_size = 1 if batched else (loader.batch_size or 1)
    layout = Layout(order, batch_size, world.dp_rank, world.dp_size, batched=batched)
    if world.parallel.calls_together and layout.units(0) < world.dp_size:
        kind = "expert" if world.shards == 1 else "dp_shard"
        raise ConfigError(
            f"{setting}: with parallel.{kind} each of the {world.dp_size} ranks needs at least "
            f"one sample, and there {'is' if layout.units(0) == 1 else 'are'} {layout.units(0)}."
        )
    single = loader.batch_size is None and not batched
    fetcher = Fetcher(loader.dataset, loader.collate_fn, seed, "val-sample", single=single)
    return IndexedValidation(
        layout,
        Reader(fetcher, loader, layout),
        sizes_known=not single,
        plan=[(f"{label}: {said}", name) for said, name in plan if name == "drop_last"],
    )


def check_keeps_order(loader: Any) -> None:
    """Refuses a loader whose batches are not all of its samples in the order of its dataset.

    Raises:
        ConfigError: it shuffles, or leaves samples out.
    """
    if not is_indexed(loader):
        return
    sampler: Any = loader.sampler
    if _shuffles(sampler):
        raise ConfigError(
            "the loader shuffles, so that nobody could tell whose outputs these are: give one with "
            "shuffle=False."
        )
    if loader.drop_last and (left := len(sampler) % (loader.batch_size or 1)):
        raise ConfigError(
            f"the loader leaves out its last {counted(left, 'sample')}: give one with "
            "drop_last=False."
        )


def count_windows(
    loader: Any,
    size: WindowSize,
    epochs: int | None,
    max_steps: int | None,
    dp_size: int,
    seed: int,
) -> int | None:
    """Optimizer steps in a whole run, or None if unknown until the data ends.

    Args:
        loader: the training loader.
        size: samples in a window and micro-batches in an epoch.
        epochs, max_steps: the end of the run, whichever comes first.
        dp_size: data-parallel ranks.
        seed: the run's seed, by which a sampler's passes may be longer or shorter.
    """
    if is_custom(loader):  # one that is yet to be made may know it all the same
        return windows_in(loader, epochs, max_steps)
    world = World()
    world.dp_rank, world.dp_size = 0, dp_size
    return windows_in(open_training(loader, size, seed, world), epochs, max_steps)


def _check_no_stages(which: str, world: World) -> None:
    if world.parallel.pipeline > 1:
        raise ConfigError(
            f"{which}: parallel.pipeline does not support loaders that keep their own order yet; "
            "give a DataLoader over a map-style dataset."
        )


def _open_streamed(loader: Any, size: WindowSize, seed: int, world: World) -> StreamedSource:
    if not hasattr(loader, "__iter__"):
        raise DataError(
            f"train_dataloader is a {type(loader).__name__}, which cannot be iterated: give a "
            "DataLoader or an iterable of batches."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            "train_dataloader is an iterator, which can be read only once: give an object whose "
            "__iter__ starts again, such as a DataLoader."
        )
    _check_no_stages("train_dataloader", world)
    accumulation = size.gradient_accumulation_steps
    if size.global_batch_size is not None:
        if getattr(loader, "batch_size", None) is None:
            raise ConfigError(
                "global_batch_size needs a loader with a batch_size; this one has none. "
                "Set gradient_accumulation_steps instead."
            )
        accumulation = size.micro_batches(loader.batch_size, world.dp_size)
    stateful = hasattr(loader, "state_dict")
    plan = [
        (
            "the training loader keeps its own order and "
            + ("is asked for its state" if stateful else "is read again from the start on resume"),
            "a map-style dataset in a DataLoader resumes by position",
        )
    ]
    if stateful and getattr(loader, "num_workers", 0):
        plan.append(
            (
                "random numbers drawn in the training loader's workers are not restored on resume; "
                "a generator in the dataset's own state_dict is",
                "num_workers=0, or a map-style dataset",
            )
        )
    if world.dp_size > 1:
        plan.append(("each rank iterates its own loader, which must know its share", "the loader"))
    return StreamedSource(loader, accumulation, size.epoch_length, seed, world, plan)


def _order(
    loader: DataLoader, seed: int, world: World
) -> tuple[Order, bool, list[tuple[str, str]]]:
    """The loader's order, whether its units are batches, and lines for the plan."""
    n = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    own_batches = loader.batch_size is None and loader.batch_sampler is not None
    if own_batches or (
        loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler
    ):
        name = type(loader.batch_sampler).__name__
        return (
            _shared(Sampled(loader.batch_sampler, seed, n), name, world),
            True,
            [(f"batches come from {name}, drawn once a pass under (seed, pass)", "batch_sampler")],
        )
    sampler: Any = loader.sampler
    plan: list[tuple[str, str]] = []
    if n == 0:
        raise DataError("the data are empty: the loader's dataset has no sample.")
    shuffle = _shuffles(sampler)
    if shuffle is None:
        name = type(sampler).__name__
        order = _shared(Sampled(sampler, seed, n), name, world)
        kept = "and its state_dict" if order.follows else "without a state_dict to restore"
        plan.append(
            (f"order: {name}'s own, drawn once a pass under (seed, pass), {kept}", "sampler")
        )
        return _trimmed(order, loader, plan), False, plan
    text = "a new permutation each pass, from (seed, pass)" if shuffle else "as stored"
    plan.append((f"order: {text} (the loader says shuffle={shuffle})", "shuffle"))
    order = Shuffled(n, seed) if shuffle else Sequential(n)
    return _trimmed(order, loader, plan), False, plan


def _shuffles(sampler: Any) -> bool | None:
    """Whether one of torch's own samplers shuffles, or None for any other sampler."""
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return True
    if type(sampler) is DistributedSampler:
        return sampler.shuffle
    return None


class _Trimmed:
    """An order without the last, incomplete batch of each pass, for drop_last."""

    def __init__(self, order: Order, batch_size: int) -> None:
        self._order = order
        self._batch_size = batch_size

    def length(self, pass_: int) -> int:
        length = self._order.length(pass_)
        return length - length % self._batch_size

    def slice(self, pass_: int, start: int, stop: int) -> Any:
        return self._order.slice(pass_, start, stop)


def _sampled_in(order: Order) -> Sampled | None:
    inner = order._order if isinstance(order, _Trimmed) else order
    return inner if isinstance(inner, Sampled) else None


def _trimmed(order: Order, loader: DataLoader, plan: list[tuple[str, str]]) -> Order:
    if not (loader.drop_last and loader.batch_size):
        return order
    trimmed, units = _Trimmed(order, loader.batch_size), order.length(0)
    if trimmed.length(0) == 0:
        raise DataError(
            f"drop_last drops everything: the data have {units} samples and batch_size is "
            f"{loader.batch_size}."
        )
    if (used := trimmed.length(0)) < units:
        plan.append((f"drop_last leaves out {units - used} of {units} samples a pass", "drop_last"))
    return trimmed


def _shared(order: Sampled, name: str, world: World) -> Sampled:
    """Checks that a sampler gives every rank the same units, of which each then takes its share.

    Raises:
        DataError: it does not, e.g. because it splits the data by rank itself.
    """
    if world.mesh is not None and len(set(world.all_gather_object(order.fingerprint()))) > 1:
        raise DataError(
            f"{name} does not give every rank the same order, of which each rank would take its "
            "share. Give a sampler that does not split the data by rank and that draws from "
            "torch's, numpy's or random's global generator."
        )
    return order
