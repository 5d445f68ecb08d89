"""The files of wandb and SwanLab: records in the log blocks of LevelDB."""

from __future__ import annotations

from collections.abc import Iterator


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of LevelDB log blocks after 7 bytes of head.

    Args:
        data: the file; it may end within a record.
    """
    block, at, part = 32768, 7, b""
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        chunk = data[at + 7 : at + 7 + length]
        if kind == 0 or len(chunk) < length:
            return
        at += 7 + length
        part += chunk
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""
