"""Pages for contributors name only what exists; the picture of the layers is the contract's.

`python tests/docs/test_architecture.py` draws the picture anew.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline

ROOT = Path(__file__).parents[2]
SOURCE = Path(paceline.__file__).parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = (ARCHITECTURE, ROOT / "CONTRIBUTING.md")
PICTURE = re.compile(
    r"(<!-- layers: .*?-->\n```text\n)(.*?)(```\n<!-- end of layers -->)", re.DOTALL
)
WIDTH = 79  # characters of the picture, at least
SUFFIXES = (".py", ".md", ".toml", ".yaml", ".json", ".jsonl", ".txt")
IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*(\(.*\))?")


def layers() -> list[list[str]]:
    """The rooms of each layer in import-linter's contract, from top to bottom.

    Those that may import nothing of ours are the lowest layer.
    """
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found, lowest = [], []
    for contract in contracts["contracts"]:
        if contract["type"] == "layers":
            found += [re.findall(r"paceline\.(\w+)", layer) for layer in contract["layers"]]
        else:
            lowest += [name.removeprefix("paceline.") for name in contract["source_modules"]]
    above = {room for layer in found for room in layer}
    lowest = [room for room in lowest if room not in above]
    return [*found, lowest] if lowest else found


def drawn(rows: list[list[str]]) -> str:
    """A picture of the layers: one row each, whose rooms share its width."""
    width = max(WIDTH, *(sum(len(room) + 3 for room in row) + 1 for row in rows))
    cuts = [[round(i * (width - 1) / len(row)) for i in range(len(row) + 1)] for row in rows]
    lines = []
    for row, at, above in zip(rows, cuts, [[], *cuts], strict=False):
        lines.append(_rule({*at, *above}, width))
        cells = (
            room.center(stop - start - 1)
            for room, start, stop in zip(row, at, at[1:], strict=False)
        )
        lines.append(f"|{'|'.join(cells)}|")
    return "\n".join([*lines, _rule({*cuts[-1]}, width)]) + "\n"


def _rule(cuts: set[int], width: int) -> str:
    return "".join("+" if i in cuts else "-" for i in range(width))


def blocks(page: Path) -> Iterator[str]:
    """Its list items, table rows and paragraphs, without fenced code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.DOTALL)
    yield from re.split(r"\n(?=\s*(?:[-*|]|\d+\.)\s)|\n\s*\n", text)


def path_of(name: str) -> Path | None:
    """The file or folder of this name, in the repository or below the package."""
    return next((root / name for root in (ROOT, SOURCE) if (root / name).exists()), None)


def unknown(block: str, source: str) -> Iterator[str]:
    """What a block names in backticks that does not exist.

    An identifier has to occur in one of the files that the block names, or else anywhere in ours.
    """
    spans = re.findall(r"`([^`\n]+)`", block)
    files = [path_of(name) for name in spans if name.endswith(".py")]
    texts = "\n".join(path.read_text() for path in files if path is not None) or source
    for name in spans:
        if name.startswith("make "):
            if f"\n{name.removeprefix('make ')}:" not in (ROOT / "Makefile").read_text():
                yield name
        elif " " not in name and ("/" in name or name.endswith(SUFFIXES)):
            if path_of(name) is None and name not in source:
                yield name
        elif IDENTIFIER.fullmatch(name) and path_of(name) is None:
            words = name.partition("(")[0].split(".")
            if not all(re.search(rf"\b{word}\b", texts) for word in words):
                yield name


def test_the_picture_of_the_layers_is_that_of_the_contract() -> None:
    found = PICTURE.search(ARCHITECTURE.read_text())
    assert found is not None
    assert found[2] == drawn(layers())


def test_every_room_is_described() -> None:
    described = re.findall(r"^\| `(\w+)` \|", ARCHITECTURE.read_text(), flags=re.M)
    assert sorted(described) == sorted(room for layer in layers() for room in layer)


def test_every_room_is_in_a_layer() -> None:
    """Or nothing would say what it may import."""
    private = {"__init__", "__main__"}
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - private - {"__pycache__"} <= {r for layer in layers() for r in layer}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_exists(page: Path) -> None:
    source = "\n".join(path.read_text() for path in sorted(SOURCE.rglob("*.py")))
    assert [name for block in blocks(page) for name in unknown(block, source)] == []


@pytest.mark.parametrize(
    "block",
    ["`trainer/nowhere.py`", "`trainer/window.py`: `judge`", "`no_such_word`", "`make tea`"],
)
def test_what_does_not_exist_is_noticed(block: str) -> None:
    assert list(unknown(block, "def judge(): ..."))


if __name__ == "__main__":
    page = ARCHITECTURE.read_text()
    ARCHITECTURE.write_text(PICTURE.sub(lambda m: m[1] + drawn(layers()) + m[3], page))
