"""What is shown of a sample is what is trained, and cannot reach the terminal's controls."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from paceline.lm.data.sample import IGNORED, Sample
from paceline.lm.data.show import Piece, pieces, show


class Bytes:
    """A tokenizer whose tokens are single bytes: most characters of the world are several."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer whose tokens are words; it drops the space before the first that it decodes."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def sample(ids: Any, trained: Any) -> Sample:
    ids = np.array(list(ids), np.int32)
    return Sample(ids, np.where(np.array(list(trained), bool), ids, IGNORED).astype(np.int32))


def shown(one: Sample, **console: Any) -> str:
    file = io.StringIO()
    show(one, Bytes(), Console(file=file, width=40, **console))
    return file.getvalue()


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), data=st.data())
def test_pieces_are_the_text_and_whole_characters(text: str, data: st.DataObject) -> None:
    encoded = [character.encode() for character in text if character != "\ufffd"]
    count = sum(map(len, encoded))
    trained = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    found = pieces(sample(b"".join(encoded), trained), Bytes())
    expected, at = [], 0
    for character in encoded:
        expected.append((character.decode(), any(trained[at : at + len(character)])))
        at += len(character)
    assert [(c, piece.trained) for piece in found for c in piece.text] == expected
    assert all(one.trained != other.trained for one, other in pairwise(found))


def test_words_keep_their_spaces() -> None:
    found = pieces(sample([0, 1, 2, 1], [0, 0, 1, 1]), Words("Say", " yes", " and"))
    assert found == [Piece("Say yes", False), Piece(" and yes", True)]


def test_bytes_that_are_no_character_hide_nothing_that_follows() -> None:
    found = pieces(sample(b"\xff" * 9 + b"answer\xe2", [0] * 9 + [1] * 7), Bytes())
    assert found[-1].text.endswith("answer\ufffd")
    assert sum(piece.text.count("\ufffd") for piece in found) == 10


def test_trained_text_is_coloured_or_else_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    one = sample(b"ask: answer\nend", [0] * 5 + [1] * 7 + [0] * 3)
    plain = "15 tokens, 7 trained\nask: \u27e6answer\u21b5\n\u27e7end\n"
    assert shown(one) == plain
    coloured = shown(one, force_terminal=True, color_system="standard")
    assert "\x1b[1;32manswer\u21b5\x1b[0m" in coloured
    assert "\u27e6" not in coloured
    assert shown(one, force_terminal=True, color_system="standard", no_color=True).count("\u27e6")
    assert shown(one, force_terminal=True, color_system=None) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert "answer\u21b5\n\u27e7" in shown(one, force_terminal=True, color_system="standard")


def test_the_data_cannot_write_to_the_terminal() -> None:
    text = "\x1b[2J\x07\r\x9b31m\u202e\u2028[bold]\u27e7\t:smile:" + "long " * 20
    encoded = text.encode()
    for console in ({}, {"force_terminal": True, "color_system": "standard"}):
        out = shown(sample(encoded, [0] * len(encoded)), **console)
        body = out.partition("\n")[2]
        assert r"\x1b[2J\x07\r\x9b31m\u202e\u2028[bold]\u27e7\t:smile:" in body.replace(
            "\x1b[0m", ""
        )
        assert body.rstrip("\n").count("\n") == 0
