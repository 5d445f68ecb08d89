"""What makes a folder a checkpoint: its manifest, and the one rename that publishes it.

A checkpoint is intact when its manifest is whole and every file listed there has the recorded size
and checksum. The manifest is written last. Folders that begin with a dot are being added or
removed:

- `.step_00000120.new`: being written; complete once it holds a manifest.
- `.step_00000120.old`: replaced by a new save of the same step.
- `.step_00000120.gone`: being removed.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline import reading
from paceline.checkpoint.codec import decode, encode
from paceline.checkpoint.engine import Checkpoint
from paceline.checkpoint.files import Disk
from paceline.checkpoint.json_file import read_json
from paceline.checkpoint.ranks import describe
from paceline.checkpoint.safetensors_file import CHECKSUM, FileRecord, checksum_of, read_header
from paceline.errors import CheckpointError

FORMAT = "paceline-checkpoint-1"
MANIFEST = "manifest.json"
STATE = "state.json"
DAMAGED = ".damaged"
ABANDONED = ".abandoned"

_STEP = re.compile(r"step_(\d{8,18})")
_SET_ASIDE = re.compile(r"step_\d{8,18}(\.\d+)?")
_HIDDEN = re.compile(r"\.(step_\d{8,18})\.(new|old|gone)")


class UnknownFormatError(CheckpointError):
    """Another version of Paceline wrote the checkpoint: it is not damaged, and is left alone."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        save_id: increases with every save of a run, whatever happened to earlier ones.
        step: optimizer steps done.
        best: whether it had the best value of the monitored metric when it was saved.
        info: what the trainer adds: metrics, reasons, best value.
        ranks: the number of processes that wrote it.
        torch, paceline: the versions that wrote it.
        checksum: the name of the checksum's algorithm.
        files: every file but the manifest.
    """

    save_id: int
    step: int
    best: bool
    info: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    torch: str = ""
    paceline: str = ""
    checksum: str = CHECKSUM
    files: tuple[FileRecord, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def checkpoint_of(path: Path, manifest: Manifest) -> Checkpoint:
    """The checkpoint in a folder, as its manifest describes it.

    Args:
        path: the checkpoint's folder.
        manifest: the manifest in it.
    """
    return Checkpoint(path, manifest.step, manifest.save_id, manifest.best, manifest.info)


def folder_name(step: int) -> str:
    """The name of the folder of the checkpoint after `step` windows."""
    return f"step_{step:08d}"


def hidden(folder: Path, step_name: str, stage: str) -> Path:
    """The hidden sibling of a checkpoint's folder.

    Args:
        folder: where the checkpoints are.
        step_name: the name of the checkpoint's folder.
        stage: "new", "old" or "gone".
    """
    return folder / f".{step_name}.{stage}"


def manifest_text(manifest: Manifest) -> str:
    """A manifest as JSON; its last key is a checksum of the others."""
    body = asdict(manifest) | {
        "format": FORMAT,
        "info": encode(manifest.info)[1],
        "files": {file.name: [file.bytes, file.checksum] for file in manifest.files},
    }
    body["manifest_checksum"] = own_checksum(body)
    return json.dumps(body, indent=1, ensure_ascii=True) + "\n"


def own_checksum(body: dict[str, Any]) -> str:
    """The checksum of a manifest's other entries, which it carries as its last."""
    return f"{zlib.crc32(json.dumps(body, sort_keys=True, separators=(',', ':')).encode()):08x}"


def versions() -> dict[str, str]:
    """The versions that a manifest records."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("paceline")
    except PackageNotFoundError:
        own = "unknown"
    return {"torch": str(torch.__version__), "paceline": own}


def record_of(name: str, data: bytes) -> FileRecord:
    """The record of a small file written from memory.

    Args:
        name: in the checkpoint's folder.
        data: its content.
    """
    return FileRecord(name, len(data), f"{zlib.crc32(data):08x}")


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the checkpoint in folder `path`.

    Raises:
        CheckpointError: it is missing or broken, or names files outside of its folder.
        UnreadableError: it could not be read.
    """
    try:
        body = read_json(path / MANIFEST)
        if not isinstance(body, dict):
            raise CheckpointError("not a JSON object")
        if body.get("format") != FORMAT:
            kind = str(body.get("format"))[:60]
            known = UnknownFormatError if kind.startswith("paceline-") else CheckpointError
            raise known(f"its format is {kind!r}; this version reads {FORMAT!r}")
        if body.pop("manifest_checksum", None) != own_checksum(body):
            raise CheckpointError("its checksum does not match")
        return _manifest(body)
    except CheckpointError as error:
        raise type(error)(f"{path / MANIFEST}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {describe(error)}") from None


def _manifest(body: dict[str, Any]) -> Manifest:
    for key in ("save_id", "step", "ranks"):
        if type(body[key]) is not int or not 0 <= body[key] < 10**18:
            raise CheckpointError(f"broken {key}: {body[key]!r:.40}")
    files = tuple(FileRecord(name, *record) for name, record in body["files"].items())
    for file in files:
        if file.name in ("", ".", "..", MANIFEST) or not re.fullmatch(r"[\w.-]+", file.name):
            raise CheckpointError(f"names the file {file.name!r:.80}, which is not in its folder")
        if type(file.bytes) is not int or not 0 <= file.bytes < 2**62:
            raise CheckpointError(f"gives {file.name} the size {file.bytes!r:.40}")
    if type(body["best"]) is not bool or STATE not in body["files"]:
        raise CheckpointError("entries are missing")
    info = decode({}, body["info"])
    if not isinstance(info, dict):
        raise CheckpointError("its info is not a JSON object")
    return Manifest(
        save_id=body["save_id"],
        step=body["step"],
        best=body["best"],
        info=info,
        ranks=body["ranks"],
        torch=str(body["torch"]),
        paceline=str(body["paceline"]),
        checksum=str(body["checksum"]),
        files=files,
    )


def verify(path: Path) -> Manifest:
    """Reads all of a checkpoint and compares every size and checksum with its manifest.

    Raises:
        CheckpointError: something does not match; the message says what, in one line.
        UnreadableError: something could not be read, which says nothing about it.
    """
    manifest = read_manifest(path)
    if manifest.checksum != CHECKSUM:
        raise CheckpointError(f"{path}: unknown checksum {manifest.checksum!r:.40}")
    try:
        for file in manifest.files:
            reading.patiently(partial(_verify_file, path / file.name, file))
        strays = {n for n in reading.names(path) if n.endswith(".safetensors")}
        strays -= {file.name for file in manifest.files}
        if strays:
            raise CheckpointError(f"{sorted(strays)[0]} is not in the manifest")
    except OSError as error:
        raise CheckpointError(f"{path}: {describe(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return manifest


def _verify_file(path: Path, record: FileRecord) -> None:
    status = reading.reader.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{record.name} is not a regular file")
    if status.st_size != record.bytes:
        raise CheckpointError(f"{record.name} has {status.st_size} bytes instead of {record.bytes}")
    if checksum_of(path) != record.checksum:
        raise CheckpointError(f"{record.name} has changed since it was written")
    if path.suffix == ".safetensors":
        read_header(path)


def scan(folder: Path) -> tuple[list[Checkpoint], list[tuple[Path, CheckpointError]]]:
    """The checkpoints in a folder, oldest first, and the folders whose manifest is broken.

    Raises:
        UnreadableError: something could not be read, so that nobody knows which is the newest.
    """
    found, broken = [], []
    for path in _paths(folder):
        if not _STEP.fullmatch(path.name):
            continue
        try:
            found.append(checkpoint_of(path, read_manifest(path)))
        except CheckpointError as error:
            broken.append((path, error))
    return sorted(found, key=lambda checkpoint: checkpoint.save_id), broken


def _paths(folder: Path) -> list[Path]:
    return [folder / name for name in reading.names(folder)]


def highest_save_id(folder: Path) -> int:
    """The largest `save_id` under a folder, among published, hidden and set-aside ones; or 0."""
    highest = 0
    for place in (folder, folder / DAMAGED, folder / ABANDONED):
        for path in _paths(place):
            try:
                highest = max(highest, read_manifest(path).save_id)
            except CheckpointError:
                continue
    return highest


def publish(folder: Path, step_name: str, disk: Disk) -> None:
    """Publishes the complete hidden folder of a step, replacing one of the same step.

    At every instant the old or the new one is complete on the disk, under a name from which
    `recover` can restore it.

    Args:
        folder: where the checkpoints are.
        step_name: the name of the checkpoint's folder.
        disk: the file operations.
    """
    new, old, final = (
        hidden(folder, step_name, "new"),
        hidden(folder, step_name, "old"),
        folder / step_name,
    )
    replaces = os.path.lexists(final)
    if replaces:
        disk.remove(old)
        disk.rename(final, old)
    try:
        disk.rename(new, final)
    except OSError:
        if replaces:
            disk.rename(old, final)
        raise
    disk.fsync_folder(folder)
    if replaces:
        disk.remove(old)


def make_durable(folder: Path, disk: Disk) -> None:
    """Has every file of a folder on the disk, before a rename publishes it.

    Args:
        folder: written by others.
        disk: the file operations.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                disk.fsync(fd)
            finally:
                disk.close(fd)
    disk.fsync_folder(folder)


def discard(path: Path, disk: Disk) -> None:
    """Removes a checkpoint; if interrupted, leaves nothing that looks like one.

    Args:
        path: the checkpoint's folder.
        disk: the file operations.
    """
    gone = hidden(path.parent, path.name, "gone")
    disk.remove(gone)
    disk.rename(path, gone)
    disk.fsync_folder(path.parent)  # else a power cut could bring half of it back under its name
    disk.remove(gone)


def set_aside(path: Path, place: str, disk: Disk) -> Path:
    """Moves a checkpoint to a folder beside it.

    Args:
        path: the checkpoint's folder.
        place: `DAMAGED` or `ABANDONED`.
        disk: the file operations.

    Returns:
        Its new path.
    """
    shelf = path.parent / place
    disk.make_folders(shelf)
    name = path.name.removeprefix(".").removesuffix(".new").removesuffix(".old")
    target, n = shelf / name, 1
    while os.path.lexists(target):
        n += 1
        target = shelf / f"{name}.{n}"
    disk.rename(path, target)
    disk.fsync_folder(path.parent)
    return target


def prune_set_aside(folder: Path, keep: int | None, disk: Disk) -> None:
    """Removes checkpoints that were set aside, except the last `keep` of each kind.

    Call it only after a publication: until then they may be the only checkpoints.

    Args:
        folder: where the checkpoints are.
        keep: how many to keep; None for all.
        disk: the file operations.
    """
    for shelf in (folder / DAMAGED, folder / ABANDONED):
        if keep is None or shelf.is_symlink():
            continue
        moved = [path for path in _paths(shelf) if _SET_ASIDE.fullmatch(path.name)]
        moved.sort(key=lambda path: (path.lstat().st_ctime_ns, path.name))
        for path in moved[:-keep]:
            disk.remove(path)


def recover(folder: Path, disk: Disk) -> list[str]:
    """Finishes or undoes what a killed process left in hidden folders.

    Args:
        folder: where the checkpoints are.
        disk: the file operations.

    Returns:
        One line for each thing done.

    Raises:
        UnreadableError: something could not be read, so that nobody knows whether it is whole.
        UnknownFormatError: another version of Paceline wrote something.
    """
    done: list[str] = []
    names = [m for m in map(_HIDDEN.fullmatch, reading.names(folder)) if m]
    for stage in ("gone", "new", "old"):  # new before old: it may be what replaces the old one
        for match in names:
            if match[2] == stage:
                done += _recover_one(folder, match[1], stage, disk)
    return done


def _recover_one(folder: Path, step_name: str, stage: str, disk: Disk) -> list[str]:
    path, final = hidden(folder, step_name, stage), folder / step_name
    if not os.path.lexists(path):
        return []
    whole = stage != "gone" and _is_intact(path)
    if stage == "new" and whole:
        publish(folder, step_name, disk)
        return [f"{step_name}: complete but not yet published when the process died; published"]
    if stage == "old" and whole and not _is_intact(final):
        if os.path.lexists(final):
            set_aside(final, DAMAGED, disk)
        disk.rename(path, final)
        disk.fsync_folder(folder)
        return [f"{step_name}: being replaced when the process died; restored"]
    disk.remove(path)
    return [f"{step_name}: removed what an interrupted save left"] if stage == "new" else []


def _is_intact(path: Path) -> bool:
    try:
        verify(path)
    except UnknownFormatError:
        raise
    except CheckpointError:
        return False
    return True
