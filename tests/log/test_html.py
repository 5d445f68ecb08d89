"""A page is one file that shows text as it is, and neither loads nor runs anything."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from paceline.log.html import Page

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'\x1b[2J\u202e"
_VOID = {"meta"}


class Read(HTMLParser):
    """The elements of a page, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.texts[where] = self.texts.get(where, "") + data


def test_whatever_the_text_it_is_shown_and_nothing_else(tmp_path: Path) -> None:
    page = Page(EVIL)
    page.heading(EVIL)
    page.paragraph(EVIL)
    page.table([EVIL, "count", "part"], [[EVIL, 1234567, 0.123456], [None, True, 2]])
    page.spans([("\n ask\t", None), (EVIL, "green"), ("end", "grey")])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == page.text()
    read = Read(text)
    assert read.open == []
    visible = EVIL.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    for tag in ("title", "h1", "h2", "p"):
        assert read.texts[tag] == visible
    assert read.texts["th"] == f"{visible}countpart"
    assert read.texts["td"] == f"{visible}1,234,5670.1235True2"
    assert read.texts["pre"] == "\n\n ask\t"  # HTML drops the first line break
    assert read.texts["span"] == f"{visible}end"
    assert not {"script", "img", "link", "iframe"} & {*read.tags}
    assert not {"src", "href", "onerror", "style"} & read.attributes
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
    assert "@import" not in text
