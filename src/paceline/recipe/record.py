"""Writes the recipe, and the code it names, into the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.log.kept_code import keep
from paceline.recipe.code import files_of
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class RecordRecipe(Callback):
    """Writes `recipe.yaml`, and a copy of the recipe's `code:` and what it imports beside it.

    They are written when training starts and not before: only then is it certain that this recipe
    may resume this run, and an older run may have been moved aside.

    It also adds the recipe's decisions to the plan.

    Args:
        run_dir: the run folder.
        text: the recipe as YAML.
        code: the recipe's own module or package, or None.
        plan: (decision, setting that changes it) for each decision.
    """

    priority = 0

    def __init__(
        self, run_dir: Path, text: str, code: Path | None, plan: list[tuple[str, str]]
    ) -> None:
        self.run_dir = run_dir
        self.text = text
        self.code = code
        self.plan = plan

    def on_setup(self, trainer: Trainer) -> None:
        """Adds the decisions to the plan, which is printed and saved after this event."""
        for decision, setting in self.plan:
            trainer.plan.add(decision, setting)

    def on_train_start(self, trainer: Trainer) -> None:
        """Writes both, on the main process; nothing for a trainer that has no folder."""
        if not trainer.world.is_main or trainer.run_dir is None:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        code = {} if self.code is None else files_of(self.code, self.run_dir)
        keep(self.run_dir, trainer.global_step, code, self.text)
