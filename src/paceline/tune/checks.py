"""Everything that is wrong with a study, found before its first trial."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.errors import RecipeError
from paceline.recipe.components import Component
from paceline.recipe.compose import Composed
from paceline.recipe.mistakes import Mistakes, Path, suggestion
from paceline.recipe.parts import each, trainer_class
from paceline.recipe.recipe import Recipe, check
from paceline.trainer.checks import never_measured
from paceline.trainer.events import overrides
from paceline.trainer.trainer import Trainer
from paceline.tune.pruners import wrong_pruner
from paceline.tune.samplers import wrong_sampler
from paceline.tune.settings import SECTION, TuneSettings, read_settings
from paceline.tune.space import Parameter, Space, read_space
from paceline.tune.storages import check_storage

# The study's own, or the same for all trials.
_NOT_SEARCHED = ("tune", "run", "code", "seeds", "defaults")


@dataclass(frozen=True)
class Checked:
    """A study without mistakes.

    Attributes:
        composed: its recipe, as composed.
        recipe: that of a first trial, for its names and folders.
        settings: of the study.
        space: what is searched.
        trust: packages that the recipe may name besides.
    """

    composed: Composed
    recipe: Recipe
    settings: TuneSettings
    space: Space
    trust: tuple[str, ...] = ()


def check_study(composed: Composed, trust: Collection[str] = ()) -> Checked:
    """Checks a recipe with a section `tune:`, and what becomes of it with values of the space.

    Nothing is built. The recipe is checked with every choice, and with the lowest and the highest
    value of each number.

    Args:
        composed: the composed recipe.
        trust: further packages whose classes and functions it may name.

    Raises:
        RecipeError: there are mistakes; each is listed with its place and the nearest name.
    """
    mistakes = composed.mistakes()
    values = composed.resolve(mistakes)
    section = values.get(SECTION)
    if not isinstance(section, Mapping) or not section:
        mistakes.add((SECTION,), "this recipe has no section `tune:`, which says what to search.")
        mistakes.raise_any(composed.path)
    assert isinstance(section, Mapping)
    settings = read_settings(section, mistakes)
    space = read_space(settings.space, (SECTION, "space"), mistakes)
    if not settings.space and not mistakes.concern((SECTION, "space")):
        mistakes.add((SECTION, "space"), "nothing is searched: give the dotted keys to search.")
    for parameter in space.parameters:
        first = parameter.key.split(".")[0]
        if first in _NOT_SEARCHED:
            text = f"`{first}` is the study's own and cannot be searched."
            mistakes.add((SECTION, "space", parameter.key), text)
    if values.get("seeds") is not None:
        mistakes.add(("seeds",), "in a study it is `tune.seeds`: move it there.")
    _check_choices(settings, space, mistakes)
    recipe = _check_values(composed, trust, space, mistakes)
    if recipe is not None and not mistakes.concern((SECTION, "metric")):
        _check_metrics(recipe, settings, mistakes)
    mistakes.raise_any(composed.path)
    assert recipe is not None
    return Checked(composed, recipe, settings, space, tuple(trust))


def check_section(recipe: Recipe) -> None:
    """Checks the section `tune:` of a recipe that is trained without it, if there is one.

    Only what is written there: `paceline tune --dry-run` checks the recipe with the values too.

    Args:
        recipe: without other mistakes.

    Raises:
        RecipeError: the section has mistakes.
    """
    if recipe.composed.config.get(SECTION) is None:
        return
    mistakes = recipe.composed.mistakes()
    section = recipe.composed.resolve(mistakes)[SECTION]
    settings = read_settings(section, mistakes)
    read_space(settings.space, (SECTION, "space"), mistakes)
    mistakes.raise_any(recipe.composed.path)


def check_settings_alone(settings: TuneSettings, space: Space | None, mistakes: Mistakes) -> None:
    """Checks what needs no recipe: sampler, pruner, storage and the values to try first.

    Args:
        settings: of the study.
        space: what is searched; None for a function that suggests its own.
        mistakes: collects what is wrong.
    """
    _check_choices(settings, space, mistakes, ())


def _check_choices(
    settings: TuneSettings, space: Space | None, mistakes: Mistakes, at: Path = (SECTION,)
) -> None:
    distributions = None if space is None else space.distributions
    sampler = wrong_sampler(settings.sampler, distributions, objectives=len(settings.metrics))
    pruner = wrong_pruner(settings.pruner, settings.reports)
    for name, found in (("sampler", sampler), ("pruner", pruner)):
        for key, text in found:
            mistakes.add((*at, name, key) if key else (*at, name), text)
    with mistakes.collecting(*at, "storage"):
        check_storage(settings.storage)
    for i, given in enumerate(settings.first if space is not None else ()):
        assert space is not None
        where = (*at, "first", str(i))
        stored: dict[str, Any] = {}
        for key, value in given.items():
            if key not in space:
                known = [parameter.key for parameter in space.parameters]
                mistakes.add((*where, key), f"{key} is not searched{suggestion(key, known)}")
                continue
            try:
                stored[key] = space[key].stored_of(value)
            except ValueError as error:
                mistakes.add((*where, key), f"{error}.")


def _check_values(
    composed: Composed, trust: Collection[str], space: Space, mistakes: Mistakes
) -> Recipe | None:
    """Checks the recipe with values of the space; returns one of the recipes without mistakes."""
    found: Recipe | None = None
    locate = composed.mistakes().locate
    for stored in covering(space):
        own = Mistakes(locate)
        changes = space.overrides(stored)
        try:
            recipe = check(composed.changed(changes, SECTION), trust, own)
            found = found or recipe
        except RecipeError:
            for mistake in own.found:
                owner = _owner(mistake.path, changes)
                if owner is None:
                    mistakes.add(mistake.path, mistake.text, mistake.place)
                    continue
                below = ".".join(mistake.path)
                at = "" if below == owner else f"{below}: "
                place = (SECTION, "space", owner)
                mistakes.add(place, f"with {stored[owner]!r}: {at}{mistake.text}", locate(place))
    return found


def _owner(path: Path, changes: Mapping[str, Any]) -> str | None:
    """The searched key that a mistake is about: at it, below it, or where its section begins."""
    dotted = ".".join(path)
    for key in changes:
        if dotted == key or dotted.startswith(f"{key}.") or (path and key.startswith(f"{dotted}.")):
            return key
    return None


def covering(space: Space) -> Iterator[dict[str, Any]]:
    """Sets of values in which each value of `Parameter.samples` is there at least once.

    Args:
        space: what is searched.

    Returns:
        The sets, as Optuna stores them; at least one.
    """
    left = {p.key: p.samples() for p in space.parameters}
    first = True
    while first or any(left.values()):
        target = next((p for p in space.parameters if left[p.key]), None)
        wanted = {} if target is None else _conditions(space, target)
        stored: dict[str, Any] = {}
        for parameter in space.parameters:
            if not space.is_searched(parameter, stored):
                continue
            key = parameter.key
            if key in wanted:
                value = wanted[key]
            else:
                value = left[key][0] if left[key] else parameter.samples()[0]
            stored[key] = value
            if value in left[key]:
                left[key].remove(value)
        if target is not None and target.key not in stored:
            left[target.key] = []  # its conditions exclude each other: it is never searched
        first = False
        yield stored


def _conditions(space: Space, parameter: Parameter) -> dict[str, Any]:
    """Values of other parameters with which one is searched, as Optuna stores them."""
    wanted: dict[str, Any] = {}
    for key, value in parameter.when:
        owner = next(p for p in space.parameters if key == p.key or key.startswith(f"{p.key}."))
        wanted |= _conditions(space, owner)
        for name in owner.samples() if owner.kind == "choices" else [owner.stored_of(value)]:
            if space.is_searched(Parameter("", "int", when=((key, value),)), {owner.key: name}):
                wanted[owner.key] = name
                break
    return wanted


class _Unbuilt:
    """What `never_measured` asks of a trainer, of one that is not built."""

    def __init__(self, recipe: Recipe) -> None:
        self._blank: Any = object.__new__(trainer_class(recipe.trainer.target))
        part = recipe.parts.get("val_dataloader")
        self.val_dataloader = part
        self.callbacks = [_blank(one) for _, one in each(recipe.parts.get("callbacks"))]

    def is_overridden(self, name: str) -> bool:
        """Whether the trainer's class overrides a method."""
        return overrides(self._blank, name, Trainer)


def _blank(component: Component) -> Any:
    """An object of a callback's class, to ask which methods it has; else something unknown."""
    target = component.target
    return object.__new__(target) if inspect.isclass(target) else None


def _check_metrics(recipe: Recipe, settings: TuneSettings, mistakes: Mistakes) -> None:
    if recipe.config is not None:
        return  # a trainer with factories may make its own data and metrics
    unbuilt: Any = _Unbuilt(recipe)
    if recipe.parts.get("val_dataloader") is None and not unbuilt.is_overridden("evaluate"):
        text = "nothing is ever validated: the recipe has no `val_dataloader:`."
        mistakes.add((SECTION, "metric"), text)
        return
    if None in unbuilt.callbacks:
        return
    for metric in settings.metrics:
        for why in never_measured(unbuilt, metric):
            mistakes.add((SECTION, "metric"), why)
