"""One HTML file that needs nothing else: text, tables and coloured text, in light and dark.

Everything is escaped. The file loads nothing and runs nothing, and its policy forbids both to
whatever may have come into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from paceline.log.files import replacing

Colour = Literal["green", "red", "grey"]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --line: #d0d7de;
  --head: #f3f5f7; --green: #0a5c2b; --green-back: #d6f5e0; --red: #97111f; --red-back: #ffe1e3;
  --grey: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --back: #12161b; --line: #3a434d;
  --head: #1c232b; --green: #8fe8b0; --green-back: #123a23; --red: #ffb0b6; --red-back: #4a161c;
  --grey: #9aa5b1; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.75rem; text-align: left; }
th { background: var(--head); }
td.number { text-align: right; }
pre { border: 1px solid var(--line); padding: 0.75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.875rem/1.6 ui-monospace, monospace; }
.green { color: var(--green); background: var(--green-back); }
.red { color: var(--red); background: var(--red-back); }
.grey { color: var(--grey); }
"""


class Page:
    """A page that is built from top to bottom.

    Args:
        title: of the page, also its first heading.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{_shown(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{_shown(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Adds a paragraph."""
        self._parts.append(f"<p>{_shown(text)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Adds a table.

        Args:
            columns: their headings.
            rows: a value for each column; numbers are aligned to the right, None is an empty cell.
        """
        head = "".join(f'<th scope="col">{_shown(name)}</th>' for name in columns)
        lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
        self._parts.append(
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
            + "\n".join(lines)
            + "\n</tbody>\n</table></div>"
        )

    def spans(self, pieces: Iterable[tuple[str, Colour | None]]) -> None:
        """Adds a block of text as it is written, line breaks and spaces included.

        Args:
            pieces: text, each with its colour or None.
        """
        inside = "".join(
            _shown(text) if colour is None else f'<span class="{colour}">{_shown(text)}</span>'
            for text, colour in pieces
        )
        self._parts.append(f'<pre dir="ltr">\n{inside}</pre>')  # HTML drops a first line break

    def text(self) -> str:
        """The file's content."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_shown(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Writes the file, in place of one that is there.

        Raises:
            OSError: nothing was replaced.
        """
        with replacing(path) as file:
            file.write(self.text())


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f'<td class="number">{shown}</td>'
    return f"<td>{'' if value is None else _shown(str(value))}</td>"


def _shown(text: str) -> str:
    """Text for HTML; characters that are not printable, and could reorder it, are escaped too."""
    seen = (
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
    return escape("".join(seen))
