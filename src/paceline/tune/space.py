"""What a study searches: parameters by dotted key, written as the recipe writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.errors import nearest
from paceline.recipe.mistakes import Mistakes, Path, suggestion

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Scalar = bool | int | float | str | None
_KINDS = ("float", "int", "choices")
_ARGUMENTS = {
    "float": ("log", "step", "when"),
    "int": ("log", "step", "when"),
    "choices": ("when",),
}
_NAMES = ("_target_", "type")  # what tells components apart
_LONGEST = 60  # characters of a choice's name


@dataclass(frozen=True)
class Parameter:
    """One searched key.

    Attributes:
        key: the dotted key of the recipe.
        kind: "float", "int" or "choices".
        low, high: of numbers, both included.
        log: whether numbers are drawn on a logarithmic scale.
        step: the distance between two numbers; None for any.
        choices: the values to choose from, by name; the name of a plain value is the value.
        when: the parameter is searched only where these keys have these values.
    """

    key: str
    kind: str
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[tuple[Scalar, Any], ...] = ()
    when: tuple[tuple[str, Any], ...] = ()

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's distribution of it."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "float":
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)
        if self.kind == "int":
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return CategoricalDistribution([name for name, _ in self.choices])

    def suggest(self, trial: optuna.Trial) -> Any:
        """The value that a trial's sampler chooses, as Optuna stores it.

        Args:
            trial: of Optuna.
        """
        if self.kind == "float":
            return trial.suggest_float(self.key, self.low, self.high, log=self.log, step=self.step)
        if self.kind == "int":
            step = 1 if self.step is None else int(self.step)
            low, high = int(self.low), int(self.high)
            return trial.suggest_int(self.key, low, high, log=self.log, step=step)
        return trial.suggest_categorical(self.key, [name for name, _ in self.choices])

    def value_of(self, stored: Any) -> Any:
        """What the recipe gets for a stored value: the choice of that name, or the value.

        Args:
            stored: as Optuna has it.
        """
        if self.kind != "choices":
            return stored
        return next(value for name, value in self.choices if _same(name, stored))

    def stored_of(self, value: Any) -> Any:
        """What Optuna stores for a value of the recipe, or for a choice's name.

        Args:
            value: of the recipe.

        Raises:
            ValueError: the parameter has no such value.
        """
        if self.kind == "choices":
            for name, choice in self.choices:
                if _same(choice, value) or _same(name, value):
                    return name
            raise ValueError(f"{value!r} is none of the choices")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
            raise ValueError(f"{value!r} is not between {self.low:g} and {self.high:g}")
        if self.kind == "int" and not float(value).is_integer():
            raise ValueError(f"{value!r} is no whole number")
        if self.step is not None and not _is_multiple(value - self.low, self.step):
            raise ValueError(
                f"{value!r} is not reached from {self.low:g} in steps of {self.step:g}"
            )
        return int(value) if self.kind == "int" else float(value)

    def samples(self) -> list[Any]:
        """Stored values that stand for all of them: every choice, or the lowest and the highest."""
        if self.kind == "choices":
            return [name for name, _ in self.choices]
        cast = int if self.kind == "int" else float
        return [cast(value) for value in dict.fromkeys((self.low, self.high))]


@dataclass(frozen=True)
class Space:
    """The searched parameters, in the order written.

    Attributes:
        parameters: each of them.
    """

    parameters: tuple[Parameter, ...] = ()

    def __contains__(self, key: str) -> bool:
        return any(parameter.key == key for parameter in self.parameters)

    def __getitem__(self, key: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.key == key)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each parameter, by key."""
        return {parameter.key: parameter.distribution for parameter in self.parameters}

    def is_searched(self, parameter: Parameter, stored: Mapping[str, Any]) -> bool:
        """Whether a parameter is searched beside the values that are there.

        Args:
            parameter: of this space.
            stored: the values of parameters before it, as Optuna has them.
        """
        changes = self.overrides(stored)
        return all(_same(_looked_up(changes, key), wanted) for key, wanted in parameter.when)

    def suggest(
        self, trial: optuna.Trial, before: Callable[[Parameter], object] | None = None
    ) -> dict[str, Any]:
        """Has a trial's sampler choose a value for each parameter.

        Args:
            trial: of Optuna.
            before: called before each.

        Returns:
            The values as Optuna stores them.
        """
        stored: dict[str, Any] = {}
        for parameter in self.parameters:
            if self.is_searched(parameter, stored):
                if before is not None:
                    before(parameter)
                stored[parameter.key] = parameter.suggest(trial)
        return stored

    def overrides(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The changes to the recipe, by dotted key, that stored values stand for.

        Args:
            stored: as Optuna has them.
        """
        return {p.key: p.value_of(stored[p.key]) for p in self.parameters if p.key in stored}

    def stored(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The values as Optuna stores them, from changes to the recipe.

        Args:
            overrides: by dotted key.

        Raises:
            KeyError: a key is not searched.
            ValueError: the space has no such value.
        """
        for key in overrides:
            if key not in self:
                raise KeyError(key)
        return {p.key: p.stored_of(overrides[p.key]) for p in self.parameters if p.key in overrides}

    def as_json(self) -> dict[str, Any]:
        """The space as plain data, for `study.json`: what another start has to find unchanged."""
        from optuna.distributions import distribution_to_json

        return {
            p.key: {
                "distribution": json.loads(distribution_to_json(p.distribution)),
                "values": [value for _, value in p.choices] or None,
                "when": dict(p.when),
            }
            for p in self.parameters
        }


@dataclass
class _Reader:
    """Reads the parameters, and collects what is wrong."""

    place: Path
    mistakes: Mistakes
    found: list[Parameter] = field(default_factory=list)

    def read(self, key: str, node: Any, path: Path) -> None:
        if isinstance(node, list):
            node = {"choices": node}
        if not isinstance(node, Mapping):
            self.mistakes.add(
                path,
                "expected `{float: [low, high]}`, `{int: [low, high]}` or a list of choices, got "
                f"{node!r}",
            )
            return
        kinds = [kind for kind in _KINDS if kind in node]
        if not kinds and self._is_section(node):
            for name, inner in node.items():
                self.read(f"{key}.{name}", inner, (*path, str(name)))
            return
        if len(kinds) != 1:
            known = ", ".join(_KINDS)
            said = f"got {', '.join(map(str, node))}" if node else "got nothing"
            near = "".join(nearest(str(name), _KINDS) for name in node)
            self.mistakes.add(path, f"expected one of {known}; {said}{near}")
            return
        kind = kinds[0]
        for name in node:
            if name != kind and name not in _ARGUMENTS[kind]:
                known = (kind, *_ARGUMENTS[kind])
                text = f"there is no such key{suggestion(str(name), known)}"
                self.mistakes.add((*path, str(name)), text)
        before = self.mistakes.count
        when = self._when(node.get("when"), path)
        if kind == "choices":
            parameter = self._choices(key, node[kind], path, when)
        else:
            parameter = self._numbers(key, kind, node, path, when)
        if self.mistakes.count == before and parameter is not None:
            self.found.append(parameter)

    def _is_section(self, node: Mapping[str, Any]) -> bool:
        """Whether a mapping holds parameters of the keys below, and is no misspelt parameter."""
        if not node or any(nearest(str(name), _KINDS) for name in node):
            return False
        return all(isinstance(inner, Mapping | list) for inner in node.values())

    def _when(self, node: Any, path: Path) -> tuple[tuple[str, Any], ...]:
        if node is None:
            return ()
        if not isinstance(node, Mapping):
            self.mistakes.add((*path, "when"), f"expected `{{KEY: VALUE}}`, got {node!r}")
            return ()
        for key, wanted in node.items():
            self._condition(str(key), wanted, (*path, "when", str(key)))
        return tuple((str(key), wanted) for key, wanted in node.items())

    def _condition(self, key: str, wanted: Any, path: Path) -> None:
        by_key = {parameter.key: parameter for parameter in self.found}
        owner = next((k for k in by_key if key == k or key.startswith(f"{k}.")), None)
        if owner is None:
            text = f"{key} is not searched, or only further down{suggestion(key, by_key)}"
            self.mistakes.add(path, text)
            return
        parameter = by_key[owner]
        if parameter.kind != "choices":
            try:
                parameter.stored_of(wanted)
            except ValueError as error:
                self.mistakes.add(path, f"{error}.")
            return
        there = [_looked_up({owner: value}, key) for _, value in parameter.choices]
        if not any(_same(value, wanted) for value in there):
            names = [str(value) for value in there if value is not None]
            text = f"no choice of {owner} has {wanted!r} there{suggestion(str(wanted), names)}"
            self.mistakes.add(path, text)

    def _choices(self, key: str, values: Any, path: Path, when: Any) -> Parameter | None:
        if not isinstance(values, list) or not values:
            text = f"there are no choices: expected a list of values, got {values!r}"
            self.mistakes.add(path, text)
            return None
        names = choice_names(values)
        for i, value in enumerate(values):
            twin = next((j for j in range(i) if values[j] == value), i)  # as Optuna compares
            if twin < i:
                told = f"{names[i]!r} is there twice."
                if type(values[twin]) is not type(value):  # 1, 1.0 and true are one
                    told = f"{names[i]!r} equals {names[twin]!r} before it."
                self.mistakes.add(path, f"duplicate choice: {told}")
        return Parameter(key, "choices", choices=tuple(zip(names, values, strict=True)), when=when)

    def _numbers(
        self, key: str, kind: str, node: Mapping[str, Any], path: Path, when: Any
    ) -> Parameter | None:
        limits, add = node[kind], self.mistakes.add
        allowed = int if kind == "int" else int | float
        fits = isinstance(limits, list) and len(limits) == 2
        if not fits or not all(isinstance(v, allowed) and not isinstance(v, bool) for v in limits):
            what = "whole numbers" if kind == "int" else "numbers"
            add((*path, kind), f"expected two {what}, [low, high], got {limits!r}")
            return None
        low, high = limits
        log, step = node.get("log", False), node.get("step")
        if not (math.isfinite(low) and math.isfinite(high)):
            add((*path, kind), f"expected finite numbers, got {limits!r}")
            return None
        if low > high:
            add((*path, kind), f"low is above high: {limits!r}; write [{high}, {low}].")
        if not isinstance(log, bool):
            add((*path, "log"), f"expected true or false, got {log!r}")
            return None
        if log and low <= 0:
            add((*path, kind), f"a logarithmic scale begins above 0, and low is {low}.")
        if step is not None:
            if not isinstance(step, allowed) or isinstance(step, bool) or not step > 0:
                add((*path, "step"), f"expected a number above 0, got {step!r}")
            elif log:
                add((*path, "step"), "a logarithmic scale has no steps: leave out one of them.")
            elif low <= high and not _is_multiple(high - low, step):
                last = low + math.floor((high - low) / step + 1e-9) * step
                text = f"steps of {step} from {low} miss high, {high}: the last is {last:g}."
                add((*path, "step"), text)
        return Parameter(key, kind, low, high, log, step, when=when)


def read_space(node: Mapping[str, Any], place: Path, mistakes: Mistakes) -> Space:
    """Reads `space:`.

    Args:
        node: its plain values.
        place: where it is in the recipe.
        mistakes: collects what is wrong.

    Returns:
        The parameters without mistakes.
    """
    reader = _Reader(place, mistakes)
    for key, inner in node.items():
        reader.read(str(key), inner, (*place, str(key)))
    keys = [parameter.key for parameter in reader.found]
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            mistakes.add((*place, key), "the key is searched twice.")
    return Space(tuple(reader.found))


def choice_names(values: Sequence[Any]) -> list[Scalar]:
    """A short text for each choice that is no plain value, which tells it from the others.

    Args:
        values: the choices. A plain value is its own name.
    """
    short = [_short(value) for value in values]
    plain = [value for value in values if not isinstance(value, Mapping | list)]
    names: list[Scalar] = []
    for value, name in zip(values, short, strict=True):
        if not isinstance(value, Mapping | list):
            names.append(value)
        elif short.count(name) == 1 and name not in plain:
            names.append(name)
        else:
            names.append(_text(value))
    # Cut texts may still be equal: a number tells them apart.
    for i, name in enumerate(names):
        twice = any(_same(name, other) for other in names[:i])
        if twice and isinstance(values[i], Mapping | list):
            names[i] = f"{name} #{i}"
    return names


def _short(value: Any) -> str:
    """A component's class or `type:`; of another value, its text."""
    if isinstance(value, Mapping):
        for key in _NAMES:
            if isinstance(value.get(key), str):
                return value[key].rpartition(".")[2]
    return _text(value)


def _text(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _same(left: Any, right: Any) -> bool:
    """Whether two plain values are equal; true is no 1."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _looked_up(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key among changes by dotted key; None if nothing sets it."""
    for owner, value in values.items():
        if key == owner:
            return value
        if key.startswith(f"{owner}."):
            for part in key[len(owner) + 1 :].split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            return value
    return None


def _is_multiple(distance: float, step: float) -> bool:
    ratio = distance / step
    return abs(ratio - round(ratio)) <= 1e-9 * max(1.0, abs(ratio))
