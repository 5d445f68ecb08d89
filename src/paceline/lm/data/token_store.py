"""Processed samples in flat files, read by mmap: tokenized once, ready at once ever after.

A store is a folder of the cache, named after its key (`store_key.py`):

- `ids.bin`: the token ids of all samples, int32, one after the other.
- `trained.bin`: one bit per token, the lowest first: whether it is trained. A label is the token's
  id or IGNORED, so that a bit is all there is to keep.
- `offsets.bin`: where each sample begins in `ids.bin`, and where the last one ends, int64.
- `manifest.json`: the key, the counts, and each file's size and checksum; written last.

A store is written in the hidden folder `.NAME.new` and published by a rename. Whoever holds the
lock in that folder writes; the kernel releases it when the process dies. `.NAME.gone` is being
removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch.distributed as dist

from paceline.checkpoint.files import Disk
from paceline.checkpoint.json_file import read_json
from paceline.checkpoint.publication import MANIFEST, hidden, own_checksum, publish
from paceline.checkpoint.ranks import describe
from paceline.checkpoint.safetensors_file import FileRecord, checksum_of
from paceline.errors import CheckpointError, ConfigError, DataError, PeerError
from paceline.lm.data.sample import IGNORED, Sample
from paceline.lm.data.store_key import NAME, changes, flat, name_of, nearest, plain
from paceline.log.lock import LOCK_FILE, FolderLock, this_process
from paceline.reading import names, patiently, read_file, status
from paceline.world.world import World

FORMAT = "paceline-tokens-1"
IDS, TRAINED, OFFSETS = "ids.bin", "trained.bin", "offsets.bin"
_FAILURE = "failure.json"  # in the hidden folder: why the last writer failed
_HIDDEN = re.compile(rf"\.({NAME.pattern})\.(new|gone)")
_FORM = "format of the files"  # in a key that is compared with another
_BLOCK = 1 << 18  # tokens that are gathered for a write
_POLL = 0.05  # seconds between two looks of a waiting process
_NO_LIMIT = 10 * 365 * 86_400.0  # seconds


class TokenStore(Sequence[Sample]):
    """Processed samples on disk, by number.

    Opening reads the manifest and maps the files: it takes milliseconds, whatever the size. A
    pickled store holds its path alone, so that a loader's workers open it for themselves.

    Args:
        path: the store's folder.

    Attributes:
        folder: the absolute path.
        key: what decides the samples, as it was given to `store_for`.
        notes: what was noted as they were made, such as the counts of dropped samples.
        tokens: the number of tokens in all samples.
        trained: how many of them are trained.

    Raises:
        DataError: there is no store, its format is another, or a file's size is wrong.
        UnreadableError: it could not be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = Path(path).absolute()
        manifest = _read_manifest(self.folder)
        if manifest["format"] != FORMAT:
            raise DataError(
                f"{self.folder}: its format is {manifest['format']!r:.60}; this version reads "
                f"{FORMAT!r}."
            )
        self.key: dict[str, Any] = manifest["key"]
        self.notes: dict[str, Any] = manifest["notes"]
        self.tokens: int = manifest["tokens"]
        self.trained: int = manifest["trained"]
        self._samples: int = manifest["samples"]
        self._records = [FileRecord(n, *record) for n, record in manifest["files"].items()]
        sizes = {file.name: file.bytes for file in self._records}
        wanted = (4 * self.tokens, (self.tokens + 7) // 8, 8 * (self._samples + 1))
        if tuple(sizes.get(name) for name in (IDS, TRAINED, OFFSETS)) != wanted:
            raise DataError(f"{self.folder / MANIFEST}: its entries contradict each other.")
        for file in self._records:
            there = status(self.folder / file.name)
            if there is None or there.st_size != file.bytes:
                found = "is missing" if there is None else f"has {there.st_size} bytes"
                raise DataError(f"{self.folder / file.name} {found} instead of {file.bytes}.")
        self._ids = self._mapped(IDS, np.int32)
        self._bits = self._mapped(TRAINED, np.uint8)
        self._offsets = self._mapped(OFFSETS, np.int64)

    def _mapped(self, name: str, dtype: type) -> np.ndarray:
        path = self.folder / name
        if not self.tokens and name != OFFSETS:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        # Not the subclass, which makes each slice four times as slow.
        return np.asarray(patiently(lambda: np.memmap(path, dtype, mode="r")))

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        ids = np.array(self._ids[start:end])
        return Sample(ids, np.where(self._trained(start, end), ids, np.int32(IGNORED)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sample, [samples] int64."""
        return np.diff(self._offsets)

    def blocks(self, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All samples in order, many at a time, without an object for each.

        Args:
            tokens: about as many are in a block, more if a sample is longer.

        Returns:
            For each block its ids [tokens] int32, whether each is trained [tokens] bool, and the
            lengths of its samples [samples] int64.
        """
        first = 0
        while first < len(self):
            start = int(self._offsets[first])
            last = int(np.searchsorted(self._offsets, start + tokens, side="right")) - 1
            last = min(max(last, first + 1), len(self))
            end = int(self._offsets[last])
            lengths = self.lengths[first:last]
            yield np.array(self._ids[start:end]), self._trained(start, end).astype(bool), lengths
            first = last

    def _trained(self, start: int, end: int) -> np.ndarray:
        first = start // 8
        bits = np.unpackbits(self._bits[first : (end + 7) // 8], bitorder="little")
        return bits[start - 8 * first : end - 8 * first]

    def verify(self) -> None:
        """Reads everything and compares it with the checksums; opening compares only sizes.

        Raises:
            DataError: a file has changed.
            UnreadableError: a file could not be read.
        """
        for file in self._records:
            path = self.folder / file.name
            if patiently(partial(checksum_of, path)) != file.checksum:
                raise DataError(
                    f"{path} has changed since it was written: remove {self.folder}, and the next "
                    "run processes its data again."
                )

    def run_identity(self) -> dict[str, Any]:
        """The key, by dotted name: what a resumed run must find unchanged. The folder may move."""
        return {"samples": len(self)} | {
            ".".join(path): None if value == {} else value for path, value in flat(self.key).items()
        }

    def __reduce__(self) -> tuple[type[TokenStore], tuple[str]]:
        return TokenStore, (str(self.folder),)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r})"


def store_for(
    folder: Path | str,
    key: Mapping[str, Any],
    make: Callable[[], Iterable[Sample]],
    *,
    world: World | None = None,
    rebuild: Literal["auto", "never"] = "auto",
    notes: Callable[[], Mapping[str, Any]] | None = None,
) -> TokenStore:
    """The samples of a key: from the cache if they are there, or else made and kept.

    One process makes them, however many ask: the others wait without a time limit, and raise what
    made it fail. A line says why samples are made. On a file system without locks, only the ranks
    of one run wait for each other.

    Args:
        folder: of the cache; made if it is missing.
        key: all that decides what the samples are, as nested mappings of plain values: digests of
            the sources' content and of the tokenizer's files, the template, the settings. What
            does not change a sample (workers, paths, logging) is left out. Names in "sources" and
            "settings" are known to the line that says what changed.
        make: makes the samples, in order. They are written as they come.
        world: the ranks of the run, if it is open: every rank calls this, with the same key.
        rebuild: "auto", or "never" to raise an error rather than make samples.
        notes: asked once all samples are made, for what to keep beside them as `TokenStore.notes`:
            plain values, such as the counts of dropped samples.

    Raises:
        ConfigError: the key is not plain, ranks differ in it, or `rebuild` forbids what is needed.
        DataError: a sample is malformed, or the disk does not take them.
        PeerError: another rank or process failed to make them, or was lost.
        UnreadableError: a file of the cache could not be read, which says nothing about it.
    """
    if rebuild not in ("auto", "never"):
        raise ConfigError(f"rebuild={rebuild!r:.40}: choose 'auto' or 'never'.")
    wanted = _Wanted(Path(folder).absolute(), plain(key), make, notes, rebuild == "auto", world)
    if world is None or world.control_group is None:
        return wanted.provide()
    return _on_every_rank(world, wanted)


def write_store(
    folder: Path,
    key: Mapping[str, Any],
    samples: Iterable[Sample],
    notes: Callable[[], Mapping[str, Any]] | None = None,
    disk: Disk | None = None,
) -> None:
    """Writes a store's files and makes them durable, in memory that does not grow with them.

    Args:
        folder: an existing folder without these files.
        key: from `plain`.
        samples: read once, in order.
        notes: asked when all are written.
        disk: the file operations.

    Raises:
        DataError: a sample is malformed, or the disk does not take them.
    """
    disk = disk or Disk()
    with contextlib.ExitStack() as files:
        ids, bits, offsets = (
            files.enter_context(_NewFile(disk, folder / name)) for name in (IDS, TRAINED, OFFSETS)
        )
        offsets.add(np.zeros(1, np.int64))
        rest = np.empty(0, bool)  # fewer than eight tokens, which fill no byte yet
        count = tokens = trained = 0
        for block in _blocks_of(samples):
            block_ids, mask, lengths = _checked(block, count)
            ids.add(block_ids)
            rest = np.concatenate([rest, mask])
            whole = len(rest) // 8 * 8
            bits.add(np.packbits(rest[:whole], bitorder="little"))
            rest = rest[whole:]
            offsets.add(tokens + np.cumsum(lengths, dtype=np.int64))
            count, tokens = count + len(block), tokens + len(block_ids)
            trained += int(mask.sum())
        bits.add(np.packbits(rest, bitorder="little"))
        records = [file.finish() for file in (ids, bits, offsets)]
    body = {
        "format": FORMAT,
        "samples": count,
        "tokens": tokens,
        "trained": trained,
        "key": dict(key),
        "notes": plain(notes() if notes else {}, "notes"),
        "files": {record.name: [record.bytes, record.checksum] for record in records},
    }
    body["manifest_checksum"] = own_checksum(body)
    with _told_as_data_error():
        disk.write_file(folder / MANIFEST, (json.dumps(body, indent=1) + "\n").encode())
        disk.fsync_folder(folder)


class _NewFile:
    """A new file to which arrays are added."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self._bytes = self._checksum = 0
        self._fd = -1

    def __enter__(self) -> _NewFile:
        with _told_as_data_error():
            self._fd = self._disk.create(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.close(self._fd)

    def add(self, array: np.ndarray) -> None:
        """Writes an array's bytes."""
        data = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        # Here, not in a thread: `make` may fork.
        self._checksum = zlib.crc32(data, self._checksum)
        self._bytes += len(data)
        with _told_as_data_error():
            self._disk.write_all(self._fd, data)

    def finish(self) -> FileRecord:
        """Makes the file durable."""
        with _told_as_data_error():
            self._disk.fsync(self._fd)
        return FileRecord(self._path.name, self._bytes, f"{self._checksum:08x}")


@contextlib.contextmanager
def _told_as_data_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"processed samples could not be written: {describe(error)}") from error


def _blocks_of(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples in lists of about as many tokens as are written together."""
    block: list[Sample] = []
    tokens = 0
    for sample in samples:
        block.append(sample)
        tokens += 1 + len(sample.ids)  # an empty sample counts as well
        if tokens >= _BLOCK:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _checked(block: list[Sample], first: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A block's ids [tokens] int32, whether each is trained [tokens], and the samples' lengths.

    Args:
        block: consecutive samples.
        first: the number of the first, for messages.

    Raises:
        DataError: a sample is malformed.
    """
    ids = [np.asarray(sample.ids) for sample in block]
    labels = [np.asarray(sample.labels) for sample in block]
    for i, (one, other) in enumerate(zip(ids, labels, strict=True)):
        if one.ndim != 1 or one.shape != other.shape or (one.size and one.dtype.kind not in "iu"):
            raise DataError(
                f"sample {first + i}: ids are {one.dtype} {one.shape}, labels {other.shape}; both "
                "have to be whole numbers, [length]."
            )
    lengths = [len(one) for one in ids]
    all_ids, all_labels = np.concatenate(ids), np.concatenate(labels)
    mask = all_labels != IGNORED
    wrong = (all_ids < 0) | (all_ids > np.iinfo(np.int32).max) | (mask & (all_labels != all_ids))
    if wrong.any():
        at = int(wrong.argmax())
        number = first + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise DataError(
            f"sample {number} has the token id {all_ids[at]} with the label {all_labels[at]}: a "
            f"label is the id itself or {IGNORED}, and an id is 0 or more."
        )
    return all_ids.astype(np.int32), mask, lengths


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, of any version of the format.

    Raises:
        DataError: there is none, or it is broken.
        UnreadableError: it could not be read.
    """
    path = folder / MANIFEST
    try:
        body = read_json(path)
    except CheckpointError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(body, dict) or not str(body.get("format")).startswith("paceline-tokens-"):
        raise DataError(f"{path} is not the manifest of processed samples.")
    if body.pop("manifest_checksum", None) != own_checksum(body):
        raise DataError(f"{path}: its checksum does not match.")
    return body


# One writer


class _Wanted:
    """What a call of `store_for` asks for."""

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        make: Callable[[], Iterable[Sample]],
        notes: Callable[[], Mapping[str, Any]] | None,
        may_make: bool,
        world: World | None,
    ) -> None:
        self.folder, self.key, self.make, self.notes = folder, key, make, notes
        self.may_make, self.world = may_make, world
        self.name = name_of(key, FORMAT)
        self.path = folder / self.name

    def provide(self) -> TokenStore:
        """The store, whoever makes it; as `store_for` for one process."""
        store, damage = self._look()
        if store is not None:
            return store
        if not self.may_make:
            raise ConfigError(
                f"{self.folder} has no processed samples for these settings ({self._why(damage)}), "
                "and none may be made now: process the data ahead (`paceline data RECIPE`), or "
                "allow it (data.cache=auto, rebuild='auto')."
            )
        with _told_as_data_error():
            Disk().make_folders(self.folder)
        # The system's lock belongs to the whole process: its threads take turns here.
        with _in_this_process:
            return self._await_or_make()

    def _look(self) -> tuple[TokenStore | None, str]:
        """The store, if it is whole; else what is wrong with it, empty if there is none."""
        if self.name not in names(self.folder):
            return None, ""
        try:
            store = TokenStore(self.path)
            if store.key != self.key:
                raise DataError(f"{self.path} holds the samples of another key.")
        except DataError as error:
            return None, str(error)
        return store, ""

    def _await_or_make(self) -> TokenStore:
        new, lock, writer = hidden(self.folder, self.name, "new"), FolderLock(), ""
        while not _taken(lock, new):
            # Meanwhile its writer may have published.
            if (store := self._look()[0]) is not None:
                return store
            owner = _owner(new)
            if owner and not writer:
                self._say(f"waiting for another process ({owner}), which writes {self.path}.")
            writer = owner or writer
            time.sleep(_POLL)
        try:
            store, damage = self._look()
            if store is not None:
                _remove(new)
                return store
            if writer:
                _raise_failure(new, writer)
            return self._make(new, damage)
        finally:
            lock.release()

    def _make(self, new: Path, damage: str) -> TokenStore:
        """Makes and publishes the store; the caller holds the lock."""
        disk = Disk()
        if damage:
            _remove(self.path)
        if not self._is_whole(new):
            _clean(new)
            self._remove_abandoned()
            self._say(f"processing the data of {self.path}: {self._why(damage)}.")
            try:
                write_store(new, self.key, self.make(), self.notes, disk)
            except BaseException as error:
                with contextlib.suppress(OSError):  # the error at hand says more
                    _clean(new)
                    if isinstance(error, Exception):
                        _keep_failure(new, error)
                raise
        with _told_as_data_error():
            publish(self.folder, self.name, disk)
            disk.unlink(self.path / LOCK_FILE)
        return TokenStore(self.path)

    def _is_whole(self, new: Path) -> bool:
        """Whether a killed writer had finished and only not published: its manifest is last."""
        try:
            return TokenStore(new).key == self.key
        except DataError:
            return False

    def _why(self, damage: str) -> str:
        """Why samples have to be made, in one line."""
        if damage:
            return f"what is there is damaged: {damage.rstrip('.')}"
        earlier: list[tuple[float, dict[str, Any]]] = []
        for name in names(self.folder):
            if NAME.fullmatch(name) and (there := status(self.folder / name)) is not None:
                with contextlib.suppress(DataError, KeyError):
                    body = _read_manifest(self.folder / name)
                    earlier.append((there.st_mtime, body["key"] | {_FORM: body["format"]}))
        if not earlier:
            return "there are none yet"
        earlier.sort(key=lambda pair: -pair[0])  # of several as near, the latest
        own = self.key | {_FORM: FORMAT}
        return changes(nearest(own, [found for _, found in earlier]), own)

    def _remove_abandoned(self) -> None:
        """Removes what killed writers of other keys left, unless somebody holds its lock."""
        for match in filter(None, map(_HIDDEN.fullmatch, names(self.folder))):
            path, lock = self.folder / match[0], FolderLock()
            if match[1] == self.name and match[2] == "new":
                continue
            with contextlib.suppress(OSError):  # another process may be removing it as well
                if match[2] == "gone":
                    Disk().remove(path)
                elif _taken(lock, path):
                    _remove(path)
            lock.release()

    def _say(self, text: str) -> None:
        if self.world is not None:
            self.world.say(text)
        else:
            print(f"paceline: {text}", file=sys.stderr, flush=True)


_in_this_process = threading.Lock()


def _taken(lock: FolderLock, folder: Path) -> bool:
    """Tries to become the writer in a hidden folder, which is made if it is missing.

    Args:
        lock: that is not held.
        folder: the hidden folder; its last writer may be renaming it.
    """
    try:
        with _told_as_data_error(), contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        if not lock.try_to_take(folder):
            return False
    except FileNotFoundError:
        return False
    if lock.is_of(folder):
        return True
    lock.release()
    return False


def _remove(path: Path) -> None:
    """Removes a store or a hidden folder so that nobody finds half of it under its name."""
    name = path.name.removeprefix(".").removesuffix(".new")
    gone, disk = hidden(path.parent, name, "gone"), Disk()
    with contextlib.suppress(FileNotFoundError):  # another process may be removing it as well
        disk.remove(gone)
    disk.rename(path, gone)
    with contextlib.suppress(FileNotFoundError):
        disk.remove(gone)


def _clean(new: Path) -> None:
    """Removes all but the lock from a hidden folder."""
    for name in names(new):
        if name != LOCK_FILE:
            Disk().remove(new / name)


def _owner(new: Path) -> str:
    """The process that holds the lock of a hidden folder, or held it last; empty if unknown.

    Never call it while this process holds the lock: the system releases a process's lock when the
    process closes any handle of the file.
    """
    try:
        return read_file(new / LOCK_FILE, 4096).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def _keep_failure(new: Path, error: Exception) -> None:
    """Keeps why this process failed to write, for those who wait for it.

    Args:
        new: the hidden folder.
        error: what was raised.
    """
    text = json.dumps({"writer": this_process(), "message": describe(error)}).encode()
    Disk().write_file(new / _FAILURE, text)


def _raise_failure(new: Path, writer: str) -> None:
    """Raises the failure of the writer that this process has waited for.

    Args:
        new: the hidden folder.
        writer: the process, as its lock named it; one that was killed kept no failure.

    Raises:
        PeerError: it failed.
    """
    with contextlib.suppress(OSError, ValueError):
        failure = json.loads(read_file(new / _FAILURE, 1 << 20))
        if failure["writer"] == writer:
            raise PeerError(f"the process that made the samples ({writer}): {failure['message']}")


def _on_every_rank(world: World, wanted: _Wanted) -> TokenStore:
    """The store on every rank, or an error on every rank: rank 0 first, as the one that makes it.

    A rank whose machine does not see rank 0's folder makes its own. A rank that is killed closes
    its connections, which ends the wait of the others, however long it may be.

    Args:
        world: the ranks.
        wanted: by this rank.
    """
    group = world.new_group(_NO_LIMIT)
    try:
        keys = _gathered(world, group, wanted.key)
        for rank, key in enumerate(keys):
            if difference := changes(keys[0], key):
                raise ConfigError(
                    f"every rank has to ask for the same samples; from rank 0 to rank {rank}: "
                    f"{difference}."
                )
        store: TokenStore | None = None
        for turn in (world.is_main, not world.is_main):
            failure: Exception | None = None
            if turn:
                try:
                    store = wanted.provide()
                except Exception as error:  # noqa: BLE001  raised below, when all know of it
                    failure = error
            said = failure and (isinstance(failure, ConfigError), describe(failure))
            for rank, each in enumerate(_gathered(world, group, said)):
                if each is not None:
                    kind = ConfigError if each[0] else PeerError
                    raise failure or kind(f"rank {rank} failed to make the samples: {each[1]}")
        assert store is not None
        return store
    finally:
        dist.destroy_process_group(group)


def _gathered(world: World, group: Any, value: Any) -> list[Any]:
    """Every rank's value, in rank order, once all are here.

    Args:
        world: the ranks.
        group: without a time limit.
        value: this rank's.

    Raises:
        PeerError: a rank was lost.
    """
    box: list[Any] = [None] * world.size
    try:
        world.wait_for_all(group)
        dist.all_gather_object(box, value, group=group)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[:1]
        raise PeerError(f"another rank was lost as samples were made: {reason}") from error
    return box
