"""`paceline train` as a class to override, for programs that train recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe, load_recipe
from paceline.recipe.resolvers import register_resolvers
from paceline.recipe.seeds import Seeds, train_recipe, train_seeds
from paceline.trainer.result import Result
from paceline.trainer.settings import Resume
from paceline.world.world import World

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class Launcher:
    """Reads, checks, builds and trains a recipe; every part may be overridden.

    `Launcher("recipe.yaml", sys.argv[1:]).run()` does what `paceline train` does in one process or
    under torchrun.

    Args:
        recipe: the YAML file.
        overrides: `key=value` changes, in Hydra's grammar.
        trust: further packages whose classes and functions the recipe may name.
        resume: the Trainer's `resume`.
        dump_config: a file to write the composed recipe to, instead of training.
    """

    def __init__(
        self,
        recipe: Path | str,
        overrides: Sequence[str] = (),
        *,
        trust: Collection[str] = (),
        resume: str | Resume = "auto",
        dump_config: Path | str | None = None,
    ) -> None:
        self.recipe = recipe
        self.overrides = overrides
        self.trust = trust
        self.resume = resume if isinstance(resume, Resume) else Resume(resume)
        self.dump_config = dump_config

    def resolvers(self) -> Mapping[str, Callable[..., Any]]:
        """Further resolvers that `${name:...}` in the recipe may call."""
        return {}

    def load(self) -> Recipe:
        """The recipe, checked.

        Raises:
            RecipeError: all its mistakes.
        """
        register_resolvers(self.resolvers())
        return load_recipe(self.recipe, self.overrides, trust=self.trust)

    def build(self, recipe: Recipe, resume: Resume) -> Trainer:
        """Builds the Trainer of one run; with several seeds, called once for each.

        Args:
            recipe: the checked recipe, with one seed.
            resume: how to resume.

        Raises:
            RecipeError: a constructor failed.
        """
        return build_trainer(recipe, resume=resume)

    def run(self) -> Result | Seeds | None:
        """Trains to the end.

        Returns:
            The result of the run, or of the runs of all seeds; None if the recipe was only dumped.

        Raises:
            RecipeError: the recipe has mistakes; nothing was built.
            SystemExit: with code 75, if a run was stopped; the same call resumes it.
        """
        recipe = self.load()
        if self.dump_config is not None:
            if World().is_main:
                # Environment look-ups stay unresolved, so that no secret is written.
                Path(self.dump_config).write_text(recipe.composed.text(), encoding="utf-8")
            return None
        train = train_seeds if recipe.seeds else train_recipe
        return train(recipe, self.resume, self.build)
