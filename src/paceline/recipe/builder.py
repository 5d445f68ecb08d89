"""Builds what a checked recipe describes: seed, model, data, optimizer, schedule, Trainer."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import paceline.errors
from paceline.data.loader import WindowSize, count_windows
from paceline.errors import PacelineError, RecipeError
from paceline.recipe.components import Component
from paceline.recipe.mistakes import Path as Place
from paceline.recipe.mistakes import dotted
from paceline.recipe.recipe import HORIZON, Recipe
from paceline.recipe.record import RecordRecipe
from paceline.trainer.resume import kept_global_batch_size
from paceline.trainer.settings import Resume
from paceline.world.parallel import Parallel
from paceline.world.seeding import seed_everything
from paceline.world.world import World

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


@dataclass(frozen=True)
class Builder:
    """Builds Components and names the one that fails.

    Args:
        locate: turns a component's place into the file and line that describe it.
    """

    locate: Callable[[Place], str]

    def build(self, component: Component, **given: Any) -> Any:
        """The object that a component describes.

        Args:
            component: what to build.
            **given: arguments for it, of which it gets those that it has.

        Raises:
            RecipeError: its constructor failed, or made something of another kind.
        """
        args = [self._value(value) for value in component.args]
        kwargs = {name: self._value(value) for name, value in component.kwargs.items()}
        kwargs |= {name: v for name, v in given.items() if name in component.parameters}
        if component.kind.is_value and not inspect.isclass(component.target):
            plain = not (args or kwargs)
            return component.target if plain else partial(component.target, *args, **kwargs)
        try:
            made = component.target(*args, **kwargs)
        except PacelineError as error:
            raise type(error)(f"{self._where(component)}: {error}") from error
        except Exception as error:
            raise RecipeError(
                f"{self._where(component)}: {component.target.__qualname__} could not be made: "
                f"{type(error).__name__}: {error}{origin(error)}"
            ) from error
        if not component.kind.accepts(made):
            raise RecipeError(
                f"{self._where(component)}: {component.target.__qualname__} made a "
                f"{type(made).__name__}, which is not a {component.kind.name}."
            )
        return made

    def _value(self, value: Any) -> Any:
        if isinstance(value, Component):
            return self.build(value)
        if isinstance(value, Mapping):
            return {key: self._value(v) for key, v in value.items()}
        if isinstance(value, list):
            return [self._value(v) for v in value]
        return value

    def _where(self, component: Component) -> str:
        return f"{self.locate(component.path)}: {dotted(component.path)}"


def build_trainer(recipe: Recipe, *, resume: Any = "auto") -> Trainer:
    """Builds the Trainer that a recipe describes; call its `train(seed=recipe.seed)`.

    Everything that the recipe decided by itself is added to the trainer's plan.

    Args:
        recipe: the checked recipe.
        resume: the Trainer's `resume`.

    Raises:
        RecipeError: a constructor failed; the message gives its place and error.
    """
    builder = Builder(recipe.composed.mistakes().locate)
    parts = recipe.parts
    arguments: dict[str, Any] = dict(recipe.settings)
    # Before anything draws a random number: the weights are a function of the seed.
    seed_everything(recipe.seed)
    for slot in ("model", "train_dataloader", "val_dataloader", "loss_fn"):
        if (component := parts.get(slot)) is not None:
            arguments[slot] = builder.build(component)
    if (component := parts.get("optimizer")) is not None:
        model = arguments["model"]
        arguments["optimizer"] = builder.build(component, params=model.parameters(), model=model)
    resume = resume if isinstance(resume, Resume) else Resume(str(resume))
    if (component := parts.get("lr_scheduler")) is not None:
        counted = _horizon(recipe, component, arguments.get("train_dataloader"), resume)
        arguments["lr_scheduler"] = builder.build(
            component, optimizer=arguments["optimizer"], **counted
        )
    for slot, components in recipe.lists.items():
        arguments[slot] = [builder.build(component) for component in components]
    arguments["callbacks"] = [*arguments.get("callbacks", []), *_records(recipe)]
    return builder.build(recipe.trainer, **arguments, run_dir=str(recipe.run_dir), resume=resume)


def _horizon(recipe: Recipe, component: Component, loader: Any, resume: Resume) -> dict[str, int]:
    """The length of the run, under the name by which the scheduler asks for it."""
    interval = recipe.setting("lr_scheduler_interval")
    name = next((name for name in HORIZON if name in component.parameters), None)
    # OneCycleLR may be told its length as epochs times steps_per_epoch instead.
    told = {name, "steps_per_epoch"} & set(component.kwargs)
    if name is None or told or interval == "metric":
        return {}
    steps = recipe.setting("epochs") if interval == "epoch" else _windows(recipe, loader, resume)
    if steps is None:
        raise RecipeError(
            f"lr_scheduler: the run's length is not known beforehand; set lr_scheduler.{name}, "
            "trainer.max_steps or trainer.epoch_length."
        )
    unit = "epochs" if interval == "epoch" else "optimizer steps"
    recipe.plan.append((f"the schedule's {name} is {steps} {unit}", f"lr_scheduler.{name}"))
    return {name: steps}


def _windows(recipe: Recipe, loader: Any, resume: Resume) -> int | None:
    """Optimizer steps in the whole run."""
    if loader is None:
        return recipe.setting("max_steps")
    accumulation = recipe.setting("gradient_accumulation_steps")
    size = WindowSize(
        gradient_accumulation_steps=accumulation,
        global_batch_size=recipe.setting("global_batch_size")
        or kept_global_batch_size(recipe.run_dir, resume, loader, accumulation),
        epoch_length=recipe.setting("epoch_length"),
    )
    world = World(recipe.settings.get("parallel") or Parallel())
    epochs, max_steps = recipe.setting("epochs"), recipe.setting("max_steps")
    return count_windows(loader, size, epochs, max_steps, world.dp_size)


def _records(recipe: Recipe) -> list[RecordRecipe]:
    """What writes the recipe into its run folder, and that of several seeds into theirs."""
    wholes = [] if recipe.whole is None else [recipe.whole]
    return [RecordRecipe(one.run_dir, one.text, one.code, one.plan) for one in (*wholes, recipe)]


def origin(error: BaseException) -> str:
    """` (file:line)`, the innermost line outside torch and Paceline an error came from, or ``."""
    ours = (Path(torch.__file__).parent, Path(paceline.errors.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
