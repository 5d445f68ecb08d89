"""Checks every component of a recipe against its callable's signature; builds nothing.

The result is a tree of `Component`s: a callable, its arguments, and where it stands.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Optional

import pydantic
import torch

from paceline import registry
from paceline.errors import ConfigError, nearest
from paceline.recipe.mistakes import Mistakes, Path, suggestion
from paceline.recipe.targets import KINDS, Kind, Roots, check_kind, find_target

# Arguments that are components of a kind of their own, wherever they occur.
_SLOTS = {
    "dataset": "dataset",
    "sampler": "sampler",
    "batch_sampler": "sampler",
    "collate_fn": "collate_fn",
    "worker_init_fn": "collate_fn",
    "schedulers": "lr_scheduler",
}
# Arguments of such components that mean "optimizer steps in the whole run": they can be counted.
HORIZON = ("num_training_steps", "total_steps", "T_max")
_NESTED = {"lr_scheduler": {"given": ("optimizer",), "filled": HORIZON}}
_TAKES_FUNCTIONS = ("LambdaLR", "MultiplicativeLR")
_FORBIDDEN = "Hydra only composes recipes, so its options for instantiation do not exist here"


@dataclass(frozen=True)
class Component:
    """One object to build.

    Attributes:
        path: where it stands in the recipe.
        kind: what its slot takes.
        target: the class or function.
        args: positional arguments (`_args_`); may hold Components, as may `kwargs`.
        kwargs: keyword arguments.
        parameters: the names of keyword arguments that the target takes.
    """

    path: Path
    kind: Kind
    target: Callable[..., Any]
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()


def is_component(node: Any) -> bool:
    """Whether a node of a recipe says that it is one object to build."""
    return isinstance(node, Mapping) and ("_target_" in node or "type" in node)


@dataclass(frozen=True)
class Checker:
    """Turns nodes of a recipe into Components, noting every mistake on the way.

    Args:
        roots: the packages that targets may come from.
        mistakes: takes what is wrong.
        unread: the recipe's own module could not be imported. That has been told; that its
            classes are unknown is no mistake of its own.
    """

    roots: Roots
    mistakes: Mistakes
    unread: bool = False

    def component(
        self,
        node: Any,
        kind: Kind,
        path: Path,
        *,
        given: Collection[str] = (),
        filled: Collection[str] = (),
    ) -> Component | None:
        """Checks one component and everything in it.

        Args:
            node: the recipe's mapping.
            kind: what the slot takes.
            path: where the node stands.
            given: arguments that the builder gives and the recipe may not.
            filled: arguments that the builder gives where the recipe does not.

        Returns:
            The component, or None if it has mistakes.
        """
        if not is_component(node):
            known = registry.names(kind.name)
            named = f" or `type:` ({', '.join(known)})" if known else ""
            self.mistakes.add(path, f"expected a mapping with `_target_:`{named}, got {node!r}")
            return None
        target = self._target(node, kind, path)
        arguments = {k: v for k, v in node.items() if k not in ("_target_", "type", "_args_")}
        if target is None:
            for name, value in arguments.items():  # the components in it may be wrong by themselves
                self._argument(name, value, None, (*path, name))
            return None
        return self.call(
            target, arguments, path, kind, given=given, filled=filled, args=node.get("_args_", [])
        )

    def call(
        self,
        target: Callable[..., Any],
        arguments: Mapping[str, Any],
        path: Path,
        kind: Kind,
        *,
        given: Collection[str] = (),
        filled: Collection[str] = (),
        args: Any = (),
    ) -> Component | None:
        """Checks a call of `target`; see `component`.

        Args:
            target: the class or function.
            arguments: keyword arguments from the recipe.
            path: the place of the call in the recipe.
            kind: what the slot takes.
            given: arguments that the builder gives and the recipe may not.
            filled: arguments that the builder gives if the recipe does not.
            args: positional arguments (`_args_`), a list.

        Returns:
            The component, or None if it has mistakes.
        """
        before = self.mistakes.count
        if not isinstance(args, list | tuple):
            self.mistakes.add((*path, "_args_"), f"expected a list, got {args!r}")
            args = []
        signature = signature_of(target)
        self._names(signature, arguments, path, given, len(args))
        self._missing(signature, {*arguments, *given, *filled}, path, kind, len(args))
        kwargs = {}
        for name, value in arguments.items():
            kwargs[name] = self._argument(name, value, signature.hints.get(name), (*path, name))
        positional = [
            self._argument("", value, None, (*path, "_args_", str(i)))
            for i, value in enumerate(args)
        ]
        if self.mistakes.count > before:
            return None
        known = frozenset(signature.named)
        return Component(path, kind, target, positional, kwargs, known)

    def _target(self, node: Mapping[str, Any], kind: Kind, path: Path) -> Any:
        key = "_target_" if "_target_" in node else "type"
        where, text = (*path, key), node[key]
        if not isinstance(text, str):
            self.mistakes.add(where, f"expected a name, got {text!r}")
            return None
        if kind.name == "lr_scheduler" and text.split(".")[-1] in _TAKES_FUNCTIONS:
            self.mistakes.add(
                where,
                f"{text!r} takes Python functions, which a recipe cannot hold: use "
                "`type: warmup_cosine`, torch's SequentialLR of simple schedulers, or a scheduler "
                "class of your own in `code:`.",
            )
            return None
        try:
            if key == "_target_":
                return find_target(text, kind, self.roots)
            target = registry.lookup(kind.name, text)
            check_kind(text, target, kind, own=True)
            return target
        except (ConfigError, ImportError) as error:
            if not self.unread or (key == "_target_" and self.roots.allows(text.split(".")[0])):
                self.mistakes.add(where, str(error))
            return None

    def _names(
        self,
        signature: Signature,
        arguments: Mapping[str, Any],
        path: Path,
        given: Collection[str],
        positional: int,
    ) -> None:
        """Notes arguments that the callable does not have or gets from elsewhere."""
        by_position = set(signature.positional[:positional])
        for name in by_position.intersection(given):
            text = f"they reach {name!r}, which is given by Paceline; use names."
            self.mistakes.add((*path, "_args_"), text)
        if positional > len(signature.positional) and not signature.takes_more_positional:
            self.mistakes.add((*path, "_args_"), f"at most {len(signature.positional)} are taken")
        for name in arguments:
            where = (*path, name)
            if name.startswith("_") and name not in signature.named:
                self.mistakes.add(where, f"{_FORBIDDEN}.")
            elif name in given or name in by_position:
                self.mistakes.add(where, "is given by Paceline or by `_args_`; remove it.")
            elif name not in signature.named and not signature.takes_any:
                known = [n for n in signature.named if n not in given]
                self.mistakes.add(
                    where, f"{signature.name} has no such argument{suggestion(name, known)}"
                )

    def _missing(
        self, signature: Signature, there: Collection[str], path: Path, kind: Kind, positional: int
    ) -> None:
        """Notes the arguments that the callable cannot do without."""
        if kind.is_value and signature.is_function:
            return  # a loss gets its outputs and targets from the trainer
        for name in signature.required:
            if name not in there and name not in signature.positional[:positional]:
                self.mistakes.add(path, f"{signature.name} needs the argument {name!r}.")

    def _argument(self, name: str, value: Any, hint: Any, path: Path) -> Any:
        """An argument's value with the components in it; its type is checked if it has none."""
        before = self.mistakes.count
        is_slot = name in _SLOTS
        if name == "milestones":
            hint = list[int | float]  # shares of the run are as good; see horizon.py
        if isinstance(value, Mapping) and ("_target_" in value or (is_slot and "type" in value)):
            kind = _SLOTS.get(name, "part")
            return self.component(value, KINDS[kind], path, **_NESTED.get(kind, {}))
        if isinstance(value, Mapping):
            inner = {k: self._argument("", v, None, (*path, str(k))) for k, v in value.items()}
        elif isinstance(value, list):
            slot = name if is_slot else ""
            inner = [self._argument(slot, v, None, (*path, str(i))) for i, v in enumerate(value)]
        else:
            inner = value
        if hint is None or _holds_component(inner) or self.mistakes.count > before:
            return inner
        try:
            return fit(inner, hint)
        except ValueError as error:
            self.mistakes.add(path, str(error))
            return None


@dataclass(frozen=True)
class Signature:
    """What a callable takes.

    Attributes:
        name: the callable's name, for messages.
        named: arguments that may be given by name.
        positional: those that `_args_` would fill, in order.
        required: those without a default.
        defaults: of those that have one.
        hints: annotations, where they can be resolved.
        is_function: the callable is a function, not a class.
        takes_any: any other name is taken too.
        takes_more_positional: any number of positional arguments is taken.
    """

    name: str
    named: tuple[str, ...]
    positional: tuple[str, ...]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    hints: Mapping[str, Any]
    is_function: bool
    takes_any: bool
    takes_more_positional: bool


def signature_of(target: Callable[..., Any]) -> Signature:
    """The signature of a class or function; a class's `**kwargs` are followed to its bases."""
    name = getattr(target, "__qualname__", str(target))
    is_function = not inspect.isclass(target)
    owners = [target] if is_function else _constructors(target)
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_any = takes_more = False
    for owner in owners:
        try:
            found = list(inspect.signature(owner).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            return Signature(name, (), (), (), {}, {}, is_function, True, True)
        found = found if is_function else found[1:]
        own_hints = _hints(owner)
        for p in found:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in parameters:
                parameters[p.name] = p
                hints[p.name] = _hint(p, own_hints)
        takes_more = takes_more or any(p.kind is p.VAR_POSITIONAL for p in found)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
        if not takes_any:
            break
    by_position = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    named = [n for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY]
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    required = [n for n in parameters if n not in defaults]
    return Signature(
        name,
        tuple(named),
        tuple(by_position),
        tuple(required),
        defaults,
        {n: h for n, h in hints.items() if h is not None},
        is_function,
        takes_any,
        takes_more,
    )


def _constructors(cls: type) -> list[Any]:
    """The `__init__`s that a class's `**kwargs` reach, most derived first."""
    found = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    if found and found[-1] is object.__init__:
        found.pop()
    # Module's own takes anything and refuses it later.
    found = [init for init in found if init is not torch.nn.Module.__init__]
    return [*found, _nothing]


def _nothing(self: object) -> None:
    """What the last `**kwargs` of a chain of constructors may hold."""


def _hints(owner: Any) -> dict[str, Any]:
    """The annotations that can be resolved, one by one: some name what is never imported."""
    owner = inspect.unwrap(owner)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(owner, "__annotations__", {}).items():
        one = SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= typing.get_type_hints(one, globalns=getattr(owner, "__globals__", {}))
        except Exception:  # noqa: BLE001 - an annotation may be any expression; it is only a help
            continue
    return hints


def _hint(parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    hint = hints.get(parameter.name)
    if hint is None or isinstance(hint, typing.TypeVar):
        return None
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and origin.__module__.split(".")[0] not in sys.stdlib_module_names:
        hint = origin  # Dataset[T]: the class is all that can be checked
    return Optional[hint] if parameter.default is None else hint  # noqa: UP045 - a value


def fit(value: Any, hint: Any) -> Any:
    """Checks a plain value against an annotation: strictly, but as YAML can write it.

    A list is accepted for a tuple and an integer for a float, but not "1" for 1.

    Args:
        value: from the recipe.
        hint: the annotation.

    Returns:
        The value, as a tuple or a path where the annotation says so.

    Raises:
        ValueError: it does not fit; the message says what was expected and found.
    """
    config = pydantic.ConfigDict(arbitrary_types_allowed=True, strict=True)
    try:
        text = json.dumps(value)
        adapter = pydantic.TypeAdapter(hint, config=config)
    except (pydantic.errors.PydanticUserError, TypeError, ValueError, NameError):
        return value  # nothing can be said of such an annotation
    try:
        fitted = adapter.validate_json(text)
    except pydantic.ValidationError as error:
        raise ValueError(f"expected {_expected(error, value, hint)}, got {value!r}") from error
    return fitted if isinstance(fitted, tuple | PurePath) else value


def _expected(error: pydantic.ValidationError, value: Any, hint: Any) -> str:
    """What would have fitted, from every branch of a union."""
    texts: list[str] = []
    for part in error.errors():
        text = part["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        if part["type"] in ("missing", "too_long"):  # of a tuple's items
            text = inspect.formatannotation(hint)
        elif part["type"] == "needs_python_object":
            text = str(part["loc"][-1] if part["loc"] else getattr(hint, "__name__", hint))
            text = text.removeprefix("is-instance[").removesuffix("]")
        if part["type"] == "literal_error" and isinstance(value, str):
            text += nearest(value, re.findall("'([^']*)'", text))
        if text not in texts:
            texts.append(text)
    return " or ".join(texts)


def _holds_component(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_component(v) for v in value.values())
    if isinstance(value, list):
        return any(_holds_component(v) for v in value)
    return isinstance(value, Component)
