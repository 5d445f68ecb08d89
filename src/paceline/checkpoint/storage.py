"""Tensors to and from safetensors files, planned by torch.distributed.checkpoint.

Torch plans which rank writes which piece (replicated tensors once, shards by their owners) and
which reads what (a state saved by n ranks loads on m). The bytes take a shorter path than in torch:
they are streamed from their own memory, while torch's writer first builds each shard in memory. The
files are the same: `torch.distributed.checkpoint.HuggingFaceStorageReader` reads them.

Writer and planner are called here and not through `dcp.save`: its failures are not `Exception`s,
and the ranks have to agree on more than it checks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from paceline.checkpoint.files import Disk
from paceline.checkpoint.ranks import Ranks, describe
from paceline.checkpoint.safetensors_file import (
    Entry,
    FileRecord,
    Part,
    header_of,
    raw_bytes,
    read_header,
    write_stream,
)
from paceline.errors import CheckpointError, MismatchError


class StreamingWriter(HuggingFaceStorageWriter):
    """Torch's safetensors writer, but streaming.

    Args:
        folder: an existing, empty folder.
        disk: the file operations.

    Attributes:
        record: this rank's file once written, or None if it had nothing to write.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.record: FileRecord | None = None
        self._folder = folder
        self._disk = disk

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = sorted(plan.items, key=_order)
        parts = [_part(item) for item in items]
        results: list[WriteResult] = []
        if items:
            if len({part.name for part in parts}) != len(parts):
                raise CheckpointError("one rank holds several pieces of one tensor")
            header = header_of(parts)
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            path = self._folder / name
            self.record = write_stream(self._disk, path, header, _resolved(items, planner))
            written = read_header(path)
            if {n: (e.dtype, e.shape) for n, e in written.items()} != {
                part.name: (part.dtype, part.shape) for part in parts
            }:
                raise CheckpointError(f"{name}: its header reads back differently")
            for item, part in zip(items, parts, strict=True):
                info = _StorageInfo(name, written[part.name].begin, part.nbytes)
                results.append(WriteResult(item.index, part.nbytes, info))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _part(item: WriteItem) -> Part:
    data = item.tensor_data
    assert data is not None
    chunk, dtype = data.chunk, data.properties.dtype
    return Part(item.index.fqn, dtype, tuple(chunk.sizes), tuple(chunk.offsets))


def _order(item: WriteItem) -> tuple[int, str]:
    """Wide items first, so that every tensor in the file is aligned to its own size."""
    assert item.tensor_data is not None
    return -item.tensor_data.properties.dtype.itemsize, item.index.fqn


def _resolved(items: list[WriteItem], planner: SavePlanner) -> Iterator[torch.Tensor]:
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        yield tensor.detach().cpu().contiguous()


def plan_writes(tensors: dict[str, torch.Tensor], ranks: Ranks) -> SavePlan:
    """Decides which rank writes what; the plan is valid until a name, shape or placement changes.

    Every rank has to call it.

    Args:
        tensors: all of this rank's tensors, by name. One on the meta device stands for a tensor
            that another rank holds.
        ranks: the ranks that write together.

    Returns:
        This rank's part of the plan.

    Raises:
        CheckpointError: on every rank, if one failed.
    """
    here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = HuggingFaceStorageWriter("", save_distributed=True)

    def local_plan() -> SavePlan:
        planner.set_up_planner(here, writer.storage_meta(), ranks.is_main)
        return planner.create_local_plan()

    def global_plan() -> list[SavePlan]:
        if missing := set(tensors) - {item.index.fqn for plan in plans for item in plan.items}:
            raise CheckpointError(f"no rank holds {', '.join(sorted(missing))}")
        return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

    plans = ranks.everywhere(local_plan)
    return ranks.scatter(global_plan)


def planned_names(plan: SavePlan) -> list[str]:
    """The names of the tensors that a rank writes under its part of a plan."""
    return [item.index.fqn for item in plan.items]


def write_planned(
    plan: SavePlan, tensors: dict[str, torch.Tensor], folder: Path, ranks: Ranks, disk: Disk
) -> list[FileRecord]:
    """Writes all ranks' tensors into `folder`, one file per rank. Every rank has to call it.

    Args:
        plan: from `plan_writes`.
        tensors: this rank's tensors, by name, at least those in the plan.
        folder: an existing, empty folder, the same for all ranks.
        ranks: the ranks that write together.
        disk: the file operations.

    Returns:
        All files, on rank 0; an empty list on other ranks.

    Raises:
        CheckpointError: on every rank, if one failed.
    """

    def write() -> FileRecord | None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        writer = StreamingWriter(folder, disk)
        planner.set_up_planner(tensors, writer.storage_meta(), ranks.is_main)
        writer.write_data(planner.finish_plan(plan), planner)
        return writer.record

    records = ranks.everywhere(write)
    return [record for record in records if record is not None]


class StreamingReader(HuggingFaceStorageReader):
    """Torch's safetensors reader, but it reads whole tensors directly into their memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        partial = []
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            path = self.storage_data[item.storage_index].relative_path
            by_file.setdefault(path, []).append(item)
        for path, items in by_file.items():
            entries = read_header(Path(path))
            with open(path, "rb", buffering=0) as file:
                partial += [i for i in items if not _read_whole(file, entries, i, planner)]
        if partial:
            return super().read_data(LoadPlan(partial), planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _read_whole(file: Any, entries: dict[str, Entry], item: ReadItem, planner: LoadPlanner) -> bool:
    """Reads a stored piece into contiguous host memory; returns False if that is not possible."""
    entry = entries[item.storage_index.fqn]
    target = planner.resolve_tensor(item).detach()
    simple = target.is_contiguous() and target.device.type == "cpu" and target.dtype == entry.dtype
    if not simple or tuple(item.lengths) != entry.shape:
        return False
    view = raw_bytes(target)
    file.seek(entry.begin)
    while view:
        read = file.readinto(view)
        if not read:
            raise CheckpointError(f"{file.name}: ends too early")
        view = view[read:]
    planner.commit_tensor(item, target)
    return True


def read_tensors(
    folder: Path,
    into: dict[str, torch.Tensor] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads the tensors of a checkpoint, without communication.

    Args:
        folder: a verified checkpoint.
        into: tensors to fill instead of new ones, by name; a DTensor gets its own shard. Tensors
            that the checkpoint lacks are not changed.
        only: the names to read; None for all.

    Returns:
        The tensors by name; new ones are in host memory.

    Raises:
        MismatchError: a tensor of `into` has another dtype or shape.
        CheckpointError: the files cannot be read.
    """
    try:
        return _read_tensors(folder, into or {}, only)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder}: {describe(error)}") from error
    except (AssertionError, MemoryError) as error:
        raise CheckpointError(f"{folder}: {describe(error)}") from error


def _read_tensors(
    folder: Path, into: dict[str, torch.Tensor], only: Collection[str] | None
) -> dict[str, torch.Tensor]:
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)  # rejects headers that would make torch's reader allocate absurd memory
    reader = StreamingReader(folder)
    metadata = reader.read_metadata()
    stored = _stored(metadata)
    targets: dict[str, Any] = {}
    mismatches = []
    for name, known in stored.items():
        if only is not None and name not in only:
            continue
        target = into.get(name)
        if target is None:
            targets[name] = torch.empty(known.size, dtype=known.properties.dtype)
        elif (target.dtype, target.shape) != (known.properties.dtype, known.size):
            mismatches.append(
                f"{name}: {_form(known.properties.dtype, known.size)} in the checkpoint, "
                f"{_form(target.dtype, target.shape)} here"
            )
        else:
            targets[name] = target
    if mismatches:
        raise MismatchError("the checkpoint does not fit:\n  " + "\n  ".join(mismatches))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(targets, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner)
    return targets


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _stored(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The stored tensors by name, after checking that their pieces are complete."""
    stored: dict[str, TensorStorageMetadata] = {}
    for name, known in metadata.state_dict_metadata.items():
        assert isinstance(known, TensorStorageMetadata)
        pieces = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in known.chunks}
        if sum(pieces.values()) != math.prod(known.size):
            raise CheckpointError(f"tensor {name!r:.80}: pieces of it are missing")
        stored[name] = known
    return stored
