"""The documentation shows only what runs, names only what exists, links only to what is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import paceline
from blocks import blocks, run_block
from builders import code_forgotten
from command import Paceline
from paceline.cli.app import app
from paceline.testing import Ranks
from paceline.trainer.events import EVENTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
PICTURES = sorted(DOCS.rglob("*.svg"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A working folder beside the recipes, as after a clone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    with code_forgotten():
        yield tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_each_page_of_the_docs_runs(page: str, folder: Path, ranks: Ranks) -> None:
    """All its blocks, one after the other, as a reader would type them."""
    for block in blocks(DOCS / page):
        run_block(block, DOCS / page, Paceline(folder, ranks))


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_of_a_language_that_is_run(page: str) -> None:
    """`text` is for what a program prints."""
    found = {(b.language, b.file is not None) for b in blocks(DOCS / page)}
    assert found <= {("python", True), ("python", False), ("yaml", True), ("sh", False),
                     ("text", False)}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_each_link_and_picture_is_there(page: str) -> None:
    """Anchors are checked by `make docs`, which does not look for pictures."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (DOCS / page).read_text())
    here = (DOCS / page).parent
    assert [x for x in links if "://" not in x and not (here / x).exists()] == []


def test_the_navigation_lists_every_page_once() -> None:
    """`make docs` notices neither a page that it leaves out nor one that is not there."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/]+\.md", str(config["nav"]))
    assert sorted(listed) == PAGES


def test_pages_fetch_nothing_from_elsewhere() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    shown = "".join((DOCS / page).read_text() for page in PAGES)
    styles = "".join(path.read_text() for path in DOCS.rglob("*.css"))
    assert not re.search(r"!\[[^]]*\]\(\w+://|<(?:img|script|link|iframe)\b", shown)
    assert not re.search(r"@import|url\(", styles)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_shown_and_keeps_to_itself(picture: Path) -> None:
    """It names no folder of the machine that made it, and fetches nothing."""
    text = picture.read_text()
    assert len(text) < 60_000
    assert not re.search(r"@import|@font-face|(?:href=|src=|url\()[\"']?\w+://", text)
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text)
    assert any(f"pictures/{picture.name}" in (DOCS / page).read_text() for page in PAGES)


def test_the_event_table_is_that_of_the_code() -> None:
    text = (DOCS / "callbacks.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `on_")]
    assert tuple(re.match(r"\| `(on_\w+)", row)[1] for row in rows) == EVENTS  # pyright: ignore


def test_every_command_is_described() -> None:
    text = (DOCS / "commands.md").read_text()
    described = re.findall(r"^## `paceline (\w+)`", text, flags=re.M)
    existing = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(described) == existing


def test_the_reference_lists_every_public_name() -> None:
    """All that each package has in its `__all__`, by the name under which it is imported."""
    text = (DOCS / "reference.md").read_text()
    listed = re.findall(r"^(?:::: |`)(paceline[\w.]*)\.(\w+)", text, flags=re.M)
    public = [(name, thing) for name in sorted(_with_all()) for thing in _all_of(name)]
    assert sorted(listed) == sorted(public)
    assert all(hasattr(importlib.import_module(name), thing) for name, thing in listed)


def test_what_the_reference_leaves_out_of_the_trainer_exists_and_is_not_in_the_guides() -> None:
    text = (DOCS / "reference.md").read_text()
    ((left_out),) = re.findall(r'"!\^\((.+)\)\$"', text)
    for name in left_out.split("|"):
        assert hasattr(paceline.Trainer, name)
        assert not re.search(rf"\b(?:self|trainer)\.{name}\b", _all_text())


def _with_all() -> set[str]:
    """The modules that say which of their names are public."""
    files = (Path(paceline.__file__).parent).rglob("*.py")
    found = [f for f in files if re.search(r"^__all__\b", f.read_text(), flags=re.M)]
    root = Path(paceline.__file__).parents[1]
    dotted = (".".join(f.relative_to(root).with_suffix("").parts) for f in found)
    return {name.removesuffix(".__init__") for name in dotted}


def _all_of(name: str) -> list[str]:
    return importlib.import_module(name).__all__


def test_what_is_described_as_missing_is_missing() -> None:
    """The day that a command comes, the pages that say it does not exist are to be changed."""
    existing = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    said = re.findall(r"`paceline (\w+)` does not exist yet", _all_text())
    assert set(said).isdisjoint(existing)


def _all_text() -> str:
    return "\n".join((DOCS / page).read_text() for page in PAGES)
