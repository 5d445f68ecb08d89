"""Samples as people read them: which text is trained, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from paceline.lm.data.sample import IGNORED, Sample
from paceline.runs.text import printable

BEGIN, END = "\u27e6", "\u27e7"  # around trained text where there are no colours
_NEWLINE = "\u21b5"  # before each line break of the data, which may be trained as well
_OWN = {ord(c): c.encode("unicode_escape").decode() for c in (BEGIN, END, _NEWLINE)}
_TRAINED = "bold green"
_BYTES = 4  # of the longest character in UTF-8


class Piece(NamedTuple):
    """Text of a sample, as the tokenizer decodes it.

    Attributes:
        text: of one or more tokens, unescaped.
        trained: whether they are trained; of a character whose tokens differ, whether any is.
    """

    text: str
    trained: bool


def pieces(sample: Sample, tokenizer: Any) -> list[Piece]:
    """A sample's text, cut where training begins or ends.

    Tokens are decoded next to each other, since many tokenizers decode one alone to other text: a
    part of a character to a replacement character, a word without its space.

    Args:
        sample: one sample.
        tokenizer: of transformers, or an object with its `decode`.
    """
    joined: list[Piece] = []
    for piece in _decoded(sample, tokenizer):
        if joined and joined[-1].trained == piece.trained:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.trained)
        elif piece.text:
            joined.append(piece)
    return joined


def _decoded(sample: Sample, tokenizer: Any) -> Iterator[Piece]:
    """The text of each token, or of the few tokens that are parts of one character."""
    ids = sample.ids.tolist()
    trained = (sample.labels != IGNORED).tolist()
    before = start = 0  # `before` is where the context of the text from `start` on begins
    for end in range(1, len(ids) + 1):
        context, text = (_decode(tokenizer, ids[before:to]) for to in (start, end))
        more = text[len(context) :]
        unfinished = text.endswith("\ufffd") and end < len(ids) and end - start < _BYTES
        # A change that is no addition, such as a character that a further token has completed.
        if not unfinished and text.startswith(context):
            yield Piece(more, any(trained[start:end]))
            before, start = start, end
        elif not unfinished:
            yield Piece(_decode(tokenizer, ids[start:end]), any(trained[start:end]))
            before, start = start, end


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def escaped(text: str) -> str:
    r"""Text of the data with what a terminal could interpret escaped (`\x1b`), but for line breaks.

    Before each line break comes a sign, since one may be trained.
    """
    lines = text.translate(_OWN).split("\n")
    return f"{_NEWLINE}\n".join(printable(line) for line in lines)


def show(sample: Sample, tokenizer: Any, console: Console) -> None:
    """Prints a sample's text, trained tokens in colour, or between brackets without colours.

    Args:
        sample: one sample.
        tokenizer: of transformers, or an object with its `decode`.
        console: with NO_COLOR, or not a terminal, it has no colours.
    """
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    count = int(np.count_nonzero(sample.labels != IGNORED))
    console.print(f"{len(sample.ids)} tokens, {count} trained", style="dim", highlight=False)
    text = Text()
    for piece in pieces(sample, tokenizer):
        shown = escaped(piece.text)
        if piece.trained and not coloured:
            shown = f"{BEGIN}{shown}{END}"
        text.append(shown, style=_TRAINED if piece.trained and coloured else None)
    console.print(text, soft_wrap=True, highlight=False)
