"""Builds what a checked recipe describes: seed, model, data, optimizer, schedule, Trainer."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import paceline.errors
from paceline.errors import PacelineError, RecipeError
from paceline.recipe.components import Component, signature_of
from paceline.recipe.groups import grouped
from paceline.recipe.horizon import Horizon
from paceline.recipe.identity import identity_of, targets_of
from paceline.recipe.mistakes import Path as Place
from paceline.recipe.mistakes import dotted, with_article
from paceline.recipe.parts import Part, each, own_fields, trainer_class
from paceline.recipe.recipe import Recipe
from paceline.recipe.record import RecordRecipe
from paceline.trainer.settings import Resume
from paceline.trainer.slots import slots_of
from paceline.world.seeding import seed_everything

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


_SAMPLERS = ("sampler", "batch_sampler")


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
            **given: further arguments; those that its callable does not take are dropped.

        Raises:
            RecipeError: its constructor failed, or returned an object of another kind.
        """
        args = [self._value(value) for value in component.args]
        kwargs = {} if component.config is not None else self._arguments(component)
        kwargs |= {} if component.config is None else {"config": component.config}
        kwargs |= {name: v for name, v in given.items() if name in component.parameters}
        if component.kind.is_value and not inspect.isclass(component.target):
            plain = not (args or kwargs)
            return component.target if plain else partial(component.target, *args, **kwargs)
        try:
            made = component.target(*args, **kwargs)
        except PacelineError as error:
            raise type(error)(f"{self._where(component)}: {error}") from error
        except Exception as error:
            said = str(error).partition("\nException raised from")[0]  # torch adds frames in C++
            raise RecipeError(
                f"{self._where(component)}: {component.target.__qualname__} could not be built: "
                f"{type(error).__name__}: {said}{origin(error)}"
            ) from error
        if not component.kind.accepts(type(made)):
            raise RecipeError(
                f"{self._where(component)}: {component.target.__qualname__} returned "
                f"{with_article(type(made).__name__)}, which is not "
                f"{with_article(component.kind.name)}."
            )
        return made

    def _arguments(self, component: Component) -> dict[str, Any]:
        """A component's keyword arguments; a sampler among them gets the `dataset` beside it."""
        plain = {k: v for k, v in component.kwargs.items() if k not in _SAMPLERS}
        made = {name: self._value(value) for name, value in plain.items()}
        for name in [k for k in component.kwargs if k in _SAMPLERS]:
            value = component.kwargs[name]
            is_one = isinstance(value, Component) and "dataset" in made
            made[name] = self._sampler(value, made["dataset"]) if is_one else self._value(value)
        return made

    def _sampler(self, component: Component, dataset: Any) -> Any:
        """A sampler of a data set, unless the recipe says of what it is."""
        kwargs = dict(component.kwargs)
        inner = kwargs.get("sampler")  # that of a BatchSampler
        if isinstance(inner, Component):
            kwargs["sampler"] = self._sampler(inner, dataset)
        given = {} if "data_source" in kwargs or component.args else {"data_source": dataset}
        return self.build(replace(component, kwargs=kwargs), **given)

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

    Every decision that the recipe left open is added to the trainer's plan.

    Args:
        recipe: the checked recipe.
        resume: the Trainer's `resume`.

    Raises:
        RecipeError: a constructor failed; the message gives its place and error.
    """
    recipe = replace(recipe, plan=[*recipe.plan])  # a copy, to add this trainer's decisions
    builder = Builder(recipe.composed.mistakes().locate)
    arguments = _arguments(builder, recipe, resume)
    component = recipe.trainer
    if signature_of(component.target).takes_any:  # a function that passes its **settings on
        component = replace(component, parameters=frozenset(arguments))
    if recipe.config is not None:
        arguments["config"] = recipe.config
        component = replace(component, kwargs=_settings(recipe))
    trainer = builder.build(component, **arguments)
    describe(trainer, recipe)
    return trainer


def describe(trainer: Trainer, recipe: Recipe) -> None:
    """Tells a trainer what its recipe says, which a resumed run must find unchanged.

    Args:
        trainer: built from the recipe.
        recipe: the checked recipe.
    """
    trainer.resolved_recipe, trainer.recipe_seed = recipe.tree, recipe.seed
    trainer.recipe_identity, trainer.recipe_targets = identity_of(recipe), targets_of(recipe)


def trainer_arguments(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the Trainer that a recipe describes, built.

    Args:
        recipe: the checked recipe.
        given: arguments in place of the recipe's. Callbacks take the place of those under
            `callbacks:`, not of what else a recipe adds.

    Raises:
        RecipeError: a constructor failed; the message gives its place and error.
    """
    builder = Builder(recipe.composed.mistakes().locate)
    made = _arguments(builder, recipe, given.get("resume", "auto"), given.get("callbacks"))
    return {**_settings(recipe), **made, **{n: v for n, v in given.items() if n != "callbacks"}}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What stands under `trainer:` for the Trainer itself, not for its class's config."""
    own = own_fields(trainer_class(recipe.trainer.target))
    return {name: value for name, value in recipe.trainer.kwargs.items() if name not in own}


def _arguments(
    builder: Builder, recipe: Recipe, resume: Any, callbacks: Sequence[Any] | None = None
) -> dict[str, Any]:
    """What the sections of a recipe describe, built; `callbacks` are in place of its own."""
    arguments: dict[str, Any] = dict(recipe.settings)
    # Before any random number is drawn: the weights are a function of the seed.
    seed_everything(recipe.seed)
    resume = resume if isinstance(resume, Resume) else Resume(str(resume))
    made_later = () if recipe.config is None else type(recipe.config).model_fields
    slots = slots_of(trainer_class(recipe.trainer.target))
    for slot, part in recipe.parts.items():
        if slot in made_later:
            continue
        if slot == "optimizer":
            arguments[slot] = _optimizers(builder, recipe, arguments["model"])
        elif slot == "lr_scheduler":
            length = Horizon(recipe, arguments.get("train_dataloader"), resume)
            arguments[slot] = _schedulers(builder, length, arguments["optimizer"])
        else:
            build = partial(partial, builder.build) if slots[slot].given else builder.build
            arguments[slot] = _alike(part, {name: build(c) for name, c in each(part)})
    exporters = [builder.build(one) for one in recipe.exporters]
    own = arguments.get("callbacks", []) if callbacks is None else callbacks
    arguments["callbacks"] = [*own, *exporters, *_records(recipe)]
    return arguments | {"run_dir": str(recipe.run_dir), "resume": resume}


def _optimizers(builder: Builder, recipe: Recipe, model: Any) -> Any:
    """The optimizers, each with the parameters of the model of its name (a single one, all)."""
    part, made = recipe.parts["optimizer"], {}
    models = model if isinstance(model, Mapping) else {"": model}
    for name, component in each(part):
        mine = {name: models[name]} if name else models
        named = [
            (f"{prefix}.{n}" if len(mine) > 1 else n, parameter)
            for prefix, one in mine.items()
            for n, parameter in one.named_parameters()
        ]
        params = grouped(named, recipe.groups.get(name, []))
        given = mine[name] if name else model
        made[name] = builder.build(component, params=params, model=given)
    return _alike(part, made)


def _schedulers(builder: Builder, length: Horizon, optimizer: Any) -> Any:
    """The schedulers, each with the optimizer of its name and the length of the run."""
    part = length.recipe.parts["lr_scheduler"]
    made = {
        name: _scheduler(builder, length.fill(component), optimizer[name] if name else optimizer)
        for name, component in each(part)
    }
    return _alike(part, made)


def _scheduler(builder: Builder, component: Component, optimizer: Any) -> Any:
    """A scheduler; the schedulers that it contains are built first."""
    kwargs = dict(component.kwargs)
    inner = kwargs.get("schedulers")
    if isinstance(inner, list):
        kwargs["schedulers"] = [_scheduler(builder, one, optimizer) for one in inner]
    return builder.build(replace(component, kwargs=kwargs), optimizer=optimizer)


def _alike(part: Part, made: dict[str, Any]) -> Any:
    """The objects built for a part: one, a list, or several by name as in the recipe."""
    if isinstance(part, Component):
        return made[""]
    return [*made.values()] if isinstance(part, list) else made


def _records(recipe: Recipe) -> list[RecordRecipe]:
    """The callbacks that write the recipe into its run folder, and one with `seeds` into theirs."""
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
