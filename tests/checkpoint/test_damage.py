"""Damaged and hostile checkpoints: one clear error, nothing executed, nothing written outside."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import opened, state, value_of
from paceline.checkpoint import load_tree, read_manifest, verify
from paceline.checkpoint.publication import MANIFEST, STATE, own_checksum
from paceline.checkpoint.safetensors_file import read_header
from paceline.errors import CheckpointError

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = (MANIFEST, STATE, SHARD)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints: value 1 at step 10, value 2 at step 20."""
    folder = tmp_path / "run"
    with opened(folder, keep_last=None) as checkpoints:
        for value in (1, 2):
            checkpoints.save(state(value), 10 * value, synchronous=True, info={"loss": 0.5})
    return folder


def newest_value(folder: Path) -> tuple[int | None, list[str]]:
    with opened(folder) as checkpoints:
        checkpoints.recover()
        newest = checkpoints.newest()
        value = None if newest is None else value_of(checkpoints.load(newest.path))
        return value, [e.message for e in checkpoints.poll() if e.kind == "damaged"]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-2]),
    "emptied": lambda p: p.write_bytes(b""),
    "lengthened": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "missing": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a link": lambda p: (p.rename(p.parent.parent / p.name), p.symlink_to(f"../{p.name}")),
}


SAID = {
    "truncated": "bytes instead of",
    "lengthened": "bytes instead of",
    "a folder": "not a regular file",
    "a link": "not a regular file",
}


# A manifest behind a link says the same as one that is not.
CASES = [(d, name) for d in DAMAGE for name in FILES if (d, name) != ("a link", MANIFEST)]


@pytest.mark.parametrize(("damage", "name"), CASES)
def test_a_damaged_file_sends_its_checkpoint_aside_and_the_older_one_is_used(
    run: Path, name: str, damage: str
) -> None:
    DAMAGE[damage](run / "step_00000020" / name)

    value, messages = newest_value(run)

    assert value == 1
    assert len(messages) == 1
    assert "step_00000020" in messages[0]
    if name != MANIFEST:
        assert SAID.get(damage, name) in messages[0]
    assert (run / ".damaged" / "step_00000020").is_dir()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(run: Path, name: str) -> None:
    folder, path = run / "step_00000020", run / "step_00000020" / name
    manifest, whole = read_manifest(folder), path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(whole)), 150)
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = verify(folder)
        except CheckpointError:
            continue
        # White space between JSON's tokens carries nothing.
        assert name == MANIFEST
        assert found == manifest


def test_a_checkpoint_named_by_hand_is_verified_before_it_is_loaded(run: Path) -> None:
    path = run / "step_00000020" / SHARD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with opened(run) as checkpoints, pytest.raises(CheckpointError, match="has changed"):
        checkpoints.load(path.parent)


def test_when_all_are_damaged_there_is_none_and_each_is_named(run: Path) -> None:
    for folder in ("step_00000010", "step_00000020"):
        (run / folder / SHARD).write_bytes(b"x")
    value, messages = newest_value(run)
    assert value is None
    assert len(messages) == 2


def test_a_second_damaged_one_of_the_same_step_does_not_replace_the_first(run: Path) -> None:
    (run / "step_00000020" / STATE).write_text("{}")
    newest_value(run)
    shutil.copytree(run / ".damaged" / "step_00000020", run / "step_00000020")
    newest_value(run)
    assert sorted(p.name for p in (run / ".damaged").iterdir()) == [
        "step_00000020",
        "step_00000020.2",
    ]


def test_a_checkpoint_of_another_version_is_left_alone_and_named(run: Path) -> None:
    path = run / "step_00000020" / MANIFEST
    path.write_text(json.dumps({"format": "paceline-checkpoint-9", "save_id": 9}))
    with opened(run) as checkpoints, pytest.raises(CheckpointError, match="checkpoint-9"):
        checkpoints.newest()
    assert path.is_file()


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes a manifest and makes its checksum right again, as an attacker would."""
    body = json.loads((folder / MANIFEST).read_text()) | changes
    body.pop("manifest_checksum")
    body["manifest_checksum"] = own_checksum(body)
    (folder / MANIFEST).write_text(json.dumps(body))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and makes the manifest agree with it."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    rewrite(folder, files=files | {name: [len(data), f"{zlib.crc32(data):08x}"]})


HOSTILE_MANIFESTS: dict[str, dict[str, Any]] = {
    "a path upwards": {"files": {STATE: [1, "0"], "../../outside.safetensors": [1, "0"]}},
    "an absolute path": {"files": {STATE: [1, "0"], "/etc/passwd": [1, "0"]}},
    "the parent": {"files": {STATE: [1, "0"], "..": [1, "0"]}},
    "a huge size": {"files": {STATE: [10**40, "0"]}},
    "a negative size": {"files": {STATE: [-1, "0"]}},
    "a size in words": {"files": {STATE: ["many", "0"]}},
    "no record": {"files": {STATE: 7}},
    "no state": {"files": {}},
    "files as a list": {"files": [STATE]},
    "a step in words": {"step": "ten"},
    "a step below zero": {"step": -1},
    "a save_id of true": {"save_id": True},
    "an unknown checksum": {"checksum": "none"},
    "info with a tensor": {"info": {"$tensor": "x"}},
    "info as a list": {"info": []},
    "another format": {"format": "zip"},
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_one_clear_error(run: Path, kind: str) -> None:
    folder = run / "step_00000020"
    rewrite(folder, **HOSTILE_MANIFESTS[kind])
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert "step_00000020" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert newest_value(run)[0] == 1


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/b", "manifest.json"])
def test_a_manifest_names_no_file_outside_of_its_folder(run: Path, name: str) -> None:
    folder = run / "step_00000020"
    rewrite(folder, files={STATE: [1, "0"], name: [1, "0"]})
    with pytest.raises(CheckpointError, match="not in its folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text", ["[]", "null", "7", '{"a":', "[" * 100_000, "\xff", '{"save_id": 1' + "0" * 9999 + "}"]
)
def test_a_manifest_that_is_no_manifest_is_one_clear_error(run: Path, text: str) -> None:
    (run / "step_00000020" / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="step_00000020"):
        read_manifest(run / "step_00000020")


def shard(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> Any:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def placed(offsets: Any) -> Any:
    return {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"x": {"saved_offsets": offsets}})}}


HOSTILE_SHARDS: dict[str, bytes] = {
    "nothing": b"",
    "a header of 2**63 bytes": shard({}, length=2**63),
    "a header longer than the file": shard({}, length=3),
    "a header that is no JSON": shard(b"{{{{"),
    "a header that is a list": shard([]),
    "a header deeper than any stack": shard(b"[" * 100_000),
    "an entry that is no entry": shard({"x": 7}),
    "an unknown dtype": shard(one(dtype="Q8"), b"abcd"),
    "a dtype that is a list": shard(one(dtype=["F32"]), b"abcd"),
    "a shape larger than its bytes": shard(one(shape=[10**12]), b"abcd"),
    "a shape below zero": shard(one(shape=[-1, -1]), b"abcd"),
    "offsets outside of the file": shard(one(offsets=[10, 14]), b"abcd"),
    "offsets backwards": shard(one(offsets=[4, 0]), b"abcd"),
    "bytes that belong to no tensor": shard(one(), b"abcdefgh"),
    "two tensors in one place": shard(one() | {"y": one()["x"]}, b"abcd"),
    "a place far away": shard(one(**placed([10**15])), b"abcd"),
    "a place with nothing before it": shard(one(**placed([3])), b"abcd"),
    "a place of another dimension": shard(one(**placed([0, 0])), b"abcd"),
    "a place below zero": shard(one(**placed([-1])), b"abcd"),
    "no place": shard({"__metadata__": {"DCP_SHARDING_INFO": "{}"}} | one(), b"abcd"),
    "metadata that is text": shard({"__metadata__": "DCP_SHARDING_INFO"} | one(), b"abcd"),
}


NOT_SEEN_IN_ITS_HEADER = ("a place far away", "a place with nothing before it")


@pytest.mark.parametrize("kind", HOSTILE_SHARDS)
def test_a_hostile_shard_is_one_clear_error(run: Path, kind: str) -> None:
    folder = run / "step_00000020"
    replace_file(folder, SHARD, HOSTILE_SHARDS[kind])
    replace_file(folder, STATE, b'{"tree": {}, "rank": null}')
    if kind not in NOT_SEEN_IN_ITS_HEADER:
        with pytest.raises(CheckpointError, match=SHARD):
            read_header(folder / SHARD)
    with opened(run) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b'{"tree": {}}',
        b'{"tree": [], "rank": null}',
        b'{"tree": {"a": {"$pickle": "gASV"}}, "rank": null}',
        b'{"tree": {"a": {"$tensor": "../../x"}}, "rank": null}',
        b'{"tree": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b', "rank": null}',
    ],
    ids=lambda text: str(text[:40]),
)
def test_a_hostile_state_is_one_clear_error(run: Path, text: bytes) -> None:
    folder = run / "step_00000020"
    replace_file(folder, STATE, text)
    with pytest.raises(CheckpointError, match="state"):
        load_tree(folder)


def test_a_file_that_the_manifest_does_not_name_is_not_read(run: Path) -> None:
    folder = run / "step_00000020"
    shutil.copy(folder / SHARD, folder / "shard-00009-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="shard-00009"):
        verify(folder)


def test_hints_and_foreign_files_are_never_trusted(run: Path, tmp_path: Path) -> None:
    (run / "latest").write_text("../../etc/passwd\n")
    (run / "best").symlink_to(tmp_path / "nowhere")
    (run / "step_x").mkdir()
    (run / "notes.txt").write_text("mine")
    assert newest_value(run) == (2, [])
    with opened(run, keep_last=None) as checkpoints:
        checkpoints.save(state(3), 30, best=True, synchronous=True)
    assert (run / "best").read_text() == (run / "latest").read_text() == "step_00000030\n"
    assert not (tmp_path / "nowhere").exists()
    assert (run / "notes.txt").read_text() == "mine"
