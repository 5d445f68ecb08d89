"""What the data of a recipe hold: the report, and some samples as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from paceline.errors import ConfigError
from paceline.lm.data.factory import LMDataFactory
from paceline.lm.data.report import Report
from paceline.lm.data.sample import Sample
from paceline.lm.data.show import escaped, pieces, show
from paceline.log.html import Page
from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe


@dataclass(frozen=True)
class Overview:
    """The data of a recipe.

    Attributes:
        report: counts, lengths and overlaps.
        samples: some training samples.
        tokenizer: that has made them.
    """

    report: Report
    samples: Sequence[Sample]
    tokenizer: Any

    def show(self, console: Console) -> None:
        """Prints the samples.

        Args:
            console: without colours, trained text is between brackets.
        """
        for number, sample in enumerate(self.samples, 1):
            console.print(f"\nsample {number}:", end=" ")
            show(sample, self.tokenizer, console)

    def page(self, title: str) -> Page:
        """The same as a page.

        Args:
            title: of the page.
        """
        page = Page(title)
        for heading, columns, rows in self.report.tables():
            page.heading(heading)
            page.table(columns, rows)
        for number, sample in enumerate(self.samples, 1):
            page.heading(f"sample {number}: {len(sample.ids)} tokens")
            parts = [
                (escaped(piece.text), "green" if piece.trained else None)
                for piece in pieces(sample, self.tokenizer)
            ]
            page.spans(parts)  # pyright: ignore[reportArgumentType]
        return page


def overview(recipe: Recipe, samples: int = 0) -> Overview:
    """Tokenizes what is not in the cache, and looks at all of it; no model is built.

    Args:
        recipe: whose trainer makes its data by an `LMDataFactory`.
        samples: how many training samples to take along.

    Raises:
        ConfigError: the recipe has no such data.
        RecipeError: the data cannot be used so; all mistakes are listed.
    """
    trainer: Any = build_trainer(recipe, resume="fresh")
    factory = None
    if getattr(getattr(trainer, "config", None), "data", None) is not None:
        factory = trainer.factory("data")
        if isinstance(factory, LMDataFactory):
            trainer.check("tokenizer", "model", "data")
    if not isinstance(factory, LMDataFactory):
        raise ConfigError(
            f"{recipe.composed.path}: its data are no dialogues or texts that are tokenized: "
            "`paceline preview` shows them."
        )
    report = factory.report()
    train = factory.mixed(factory.prepare()[0])
    return Overview(report, [train[i] for i in range(min(samples, len(train)))], trainer.tokenizer)
