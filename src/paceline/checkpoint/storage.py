"""Tensors to and from safetensors files, planned by torch.distributed.checkpoint.

Torch plans which rank writes which piece (replicated tensors once, shards by their owners) and
which reads what (a state saved by n ranks loads on m). The bytes take a shorter path than in torch:
they are streamed from their own memory, while torch's writer first builds each shard in memory. The
files are the same: `torch.distributed.checkpoint.HuggingFaceStorageReader` reads them.

Writer and planners are called here and not through `dcp.save`: its failures are not `Exception`s,
and the ranks have to agree on more than it checks. Torch's reader maps files into memory, where a
disk that fails ends the process by SIGBUS; here it is an error like others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
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
from paceline.reading import File, names, open_file, patiently


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
        CheckpointError: the files are not those of a checkpoint.
        UnreadableError: the files could not be read.
    """
    try:
        return patiently(partial(_read_tensors, folder, into or {}, only))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, MemoryError) as error:
        raise CheckpointError(f"{folder}: {describe(error)}") from error


def _read_tensors(
    folder: Path, into: dict[str, torch.Tensor], only: Collection[str] | None
) -> dict[str, torch.Tensor]:
    pieces, stored = _stored(folder)
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
    planner.set_up_planner(targets, Metadata(dict(stored)), True)
    by_file: dict[Path, list[tuple[Entry, ReadItem]]] = {}
    for item in planner.finish_plan(planner.create_local_plan()).items:
        path, entry = pieces[item.storage_index]
        by_file.setdefault(path, []).append((entry, item))
    for path, items in by_file.items():
        with open_file(path) as file:
            for entry, item in items:
                _read_item(file, entry, item, planner)
    return targets


def _read_item(file: File, entry: Entry, item: ReadItem, planner: LoadPlanner) -> None:
    """Reads a stored piece, or a part of it, into the tensor where it belongs."""
    target = planner.resolve_tensor(item).detach()
    simple = target.is_contiguous() and target.device.type == "cpu" and target.dtype == entry.dtype
    if simple and tuple(item.lengths) == entry.shape:
        _read_into(file, entry.begin, target)
    else:
        # Of a piece that is shared out anew, the rows that are needed: they lie together.
        first, rows = (item.storage_offsets[0], item.lengths[0]) if entry.shape else (0, 1)
        part = torch.empty((rows, *entry.shape[1:]), dtype=entry.dtype)
        row = part[:1].nbytes if rows else 0
        _read_into(file, entry.begin + first * row, part)
        if entry.shape:
            ranges = zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
            part = part[(slice(None), *(slice(at, at + length) for at, length in ranges))]
        target.copy_(part.reshape(target.shape))
    planner.commit_tensor(item, target)


def _read_into(file: File, at: int, target: torch.Tensor) -> None:
    view = raw_bytes(target)
    file.seek(at)
    if file.readinto(view) != len(view):
        raise CheckpointError(f"{file.name}: ends too early")


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _stored(
    folder: Path,
) -> tuple[dict[MetadataIndex, tuple[Path, Entry]], dict[str, TensorStorageMetadata]]:
    """Where each stored piece is, and the tensors by name, whose pieces have to be complete."""
    pieces: dict[MetadataIndex, tuple[Path, Entry]] = {}
    stored: dict[str, TensorStorageMetadata] = {}
    for path in [folder / name for name in names(folder) if name.endswith(".safetensors")]:
        for name, entry in read_header(path).items():
            pieces[MetadataIndex(name, entry.offsets)] = path, entry
            properties = TensorProperties(dtype=entry.dtype)
            known = stored.setdefault(
                name, TensorStorageMetadata(properties, torch.Size(entry.shape), [])
            )
            chunk = ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.shape))
            known.chunks.append(chunk)
            ends = map(add, entry.offsets, entry.shape)
            known.size = torch.Size(map(max, known.size, ends))
    for name, known in stored.items():
        covered = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in known.chunks}
        if sum(covered.values()) != math.prod(known.size):
            raise CheckpointError(f"tensor {name!r:.80}: pieces of it are missing")
    return pieces, stored
