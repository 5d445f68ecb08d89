"""The length of a run, for schedulers: in optimizer steps, or in epochs if they step each epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from paceline.data.loader import count_windows
from paceline.data.source import WindowSize
from paceline.errors import RecipeError
from paceline.recipe.components import HORIZON, Component
from paceline.recipe.mistakes import dotted
from paceline.recipe.recipe import Recipe
from paceline.trainer.resume import kept_global_batch_size
from paceline.trainer.settings import Resume
from paceline.world.environment import replica_group
from paceline.world.layout import Parallel
from paceline.world.world import World


@dataclass(frozen=True)
class Horizon:
    """Fills in the length of the run in schedulers' arguments.

    Args:
        recipe: the checked recipe; its plan gets a line for each number that is filled in.
        loader: the training loader, None if the recipe has none.
        resume: the Trainer's `resume`: a resumed run keeps its samples per step.
    """

    recipe: Recipe
    loader: Any
    resume: Resume

    def fill(self, component: Component, steps: int | None = None) -> Component:
        """A scheduler with its length filled in, and that of the schedulers that it contains.

        The schedulers in a `SequentialLR` get the length between its milestones; those in any other
        get the whole length. Milestones may be given as fractions of the run (0.5, but not 1).

        Args:
            component: the scheduler.
            steps: its length, in calls of `step`; None for the whole run.

        Raises:
            RecipeError: the length is not known in advance, and the recipe does not give it.
        """
        if self.recipe.setting("lr_scheduler_interval") == "metric":
            return component
        kwargs = dict(component.kwargs)
        milestones = kwargs.get("milestones", ())
        if any(isinstance(at, float) for at in milestones):
            total = self._known(component, "milestones") if steps is None else steps
            shares = (round(at * total) if isinstance(at, float) else at for at in milestones)
            kwargs["milestones"] = list(shares)
        inner = kwargs.get("schedulers")
        if isinstance(inner, list) and all(isinstance(one, Component) for one in inner):
            stretches: list[int | None] = [steps] * len(inner)
            if "milestones" in kwargs:
                total = self._known(component, "milestones") if steps is None else steps
                stretches = self._stretches(component, kwargs["milestones"], total, len(inner))
            kwargs["schedulers"] = [
                self.fill(one, length) for one, length in zip(inner, stretches, strict=True)
            ]
        name = next((name for name in HORIZON if name in component.parameters), None)
        # OneCycleLR also accepts its length as epochs times steps_per_epoch.
        if name is not None and not {name, "steps_per_epoch"} & set(kwargs):
            kwargs[name] = self._known(component, name) if steps is None else steps
            setting = f"{dotted(component.path)}.{name}"
            text = f"the schedule's {name} is {kwargs[name]} {self._unit}"
            self.recipe.plan.append((text, setting))
        return replace(component, kwargs=kwargs)

    def _stretches(
        self, component: Component, milestones: list[int], total: int, count: int
    ) -> list[int | None]:
        """The steps of each of `count` consecutive schedulers."""
        lengths = [after - before for before, after in pairwise((0, *milestones, total))]
        if len(lengths) != count or min(lengths) < 1:
            raise RecipeError(
                f"{dotted(component.path)}: milestones {milestones} do not split {total} "
                f"{self._unit} into {count} parts: {count} schedulers need {count - 1} increasing "
                "milestones within the run."
            )
        return list(lengths)

    @property
    def _unit(self) -> str:
        by_epoch = self.recipe.setting("lr_scheduler_interval") == "epoch"
        return "epochs" if by_epoch else "optimizer steps"

    def _known(self, component: Component, name: str) -> int:
        by_epoch = self._unit == "epochs"
        steps = self.recipe.setting("epochs") if by_epoch else self._windows()
        if steps is None:
            more = "trainer.epochs" if by_epoch else "trainer.max_steps or trainer.epoch_length"
            raise RecipeError(
                f"{dotted(component.path)}: the run's length is not known in advance; set "
                f"{dotted(component.path)}.{name}, {more}."
            )
        return steps

    def _windows(self) -> int | None:
        """Optimizer steps in the whole run."""
        setting = self.recipe.setting
        if self.loader is None:
            return setting("max_steps")
        accumulation = setting("gradient_accumulation_steps")
        size = WindowSize(
            gradient_accumulation_steps=accumulation,
            global_batch_size=setting("global_batch_size")
            or kept_global_batch_size(self.recipe.run_dir, self.resume, self.loader, accumulation),
            epoch_length=setting("epoch_length"),
        )
        shares = World(self.recipe.settings.get("parallel") or Parallel()).dp_size
        if (place := replica_group()) is not None:
            shares *= place.groups
        ends = setting("epochs"), setting("max_steps")
        return count_windows(self.loader, size, *ends, shares, self.recipe.seed)
