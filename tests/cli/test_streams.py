"""What a command prints goes on in silence where nobody is left to read it."""

from __future__ import annotations

import os

from paceline.cli.streams import Lasting


def test_a_reader_that_has_gone_ends_nothing() -> None:
    """Given `| head` that has read its lines, when more is printed, then nothing is raised."""
    reads, writes = os.pipe()
    with open(writes, "w") as stream:
        lasting = Lasting(stream)
        lasting.write("first\n")
        lasting.flush()
        assert os.read(reads, 16) == b"first\n"
        os.close(reads)
        for _ in range(2):
            assert lasting.write("more\n") == 5
            lasting.flush()
