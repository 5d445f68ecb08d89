"""The code blocks of Markdown pages, taken out and run as a reader would."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from command import Paceline

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.S | re.M)
GPT = ("trainer.characters=20",)  # of its writing, each of which is a call of the model
_FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: what stands behind the fence.
        text: what stands between the fences.
        line: where it begins on its page.
    """

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that it shows, if its first line is a comment with nothing but its name."""
        match = _FILE.match(self.text)
        return match[1] if match else None


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text()
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 2)
        for match in _BLOCK.finditer(text)
    ]


def run_block(block: Block, page: Path, paceline: Paceline) -> None:
    """Runs a block in the working folder: Python as a program, a file by writing it, and commands
    that begin with `paceline` or `torchrun`."""
    if block.file is not None:
        Path(block.file).parent.mkdir(parents=True, exist_ok=True)
        Path(block.file).write_text(block.text)
    elif block.language == "python":
        # Filled up with empty lines, so that errors name the line of the page.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page), "exec", dont_inherit=True), {"__name__": "a_page"})
    elif block.language == "sh":
        for line in block.text.splitlines():
            command, *words = shlex.split(line, comments=True) or [""]
            if command in ("paceline", "torchrun"):
                # A recipe that ships is shortened.
                recipe = next((w for w in words if w.startswith("recipes/")), "")
                if "train" in words and recipe:
                    words += ["trainer.epochs=1", "trainer.max_steps=2"]
                    words += [*GPT, "lr_scheduler.warmup=1", "model.layers=1"] * ("gpt" in recipe)
                    words += ["model.width=4"] * ("digits" in recipe)
                run = paceline if command == "paceline" else paceline.torchrun
                code, _, err = run(*words)
                assert code == 0, f"{page}: {line}\n{err}"
