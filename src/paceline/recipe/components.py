"""Checks every component of a recipe against its callable's signature; builds nothing.

The result is a tree of `Component`s: a callable, its arguments, and where it stands.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Optional

import pydantic
import torch

from paceline import registry
from paceline.errors import ConfigError, RecipeError, nearest
from paceline.recipe.mistakes import Mistakes, Path, dotted, suggestion
from paceline.recipe.targets import KINDS, Kind, Roots, check_kind, find_target, kind_of
from paceline.recipe.typed import Config, OfKind, config_type_of, human_number, of_kind
from paceline.trainer.slots import is_base_class

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
_NESTED = {
    "schedulers": {"given": ("optimizer",), "filled": HORIZON},
    "sampler": {"filled": ("data_source",)},  # the loader's data set; see builder.py
    "batch_sampler": {"filled": ("data_source",)},
}
_TAKES_FUNCTIONS = ("LambdaLR", "MultiplicativeLR")
_MISTAKEN = object()  # replaces a component that has mistakes
_PLAIN_NUMBER = re.compile(r"[-+\d._]+")  # a text all the same: "1" is not 1
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
        config: of a class with a `config_type`: the keyword arguments, as the object it takes.
    """

    path: Path
    kind: Kind
    target: Callable[..., Any]
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    config: Config | None = None


def is_component(node: Any) -> bool:
    """Whether a node of a recipe says that it is one object to build."""
    return isinstance(node, Mapping) and ("_target_" in node or "type" in node)


def _is_several(node: Mapping[str, Any]) -> bool:
    """Whether a node holds several components by name, not one."""
    if not node or is_component(node):
        return False
    return all(isinstance(one, Mapping | str) for one in node.values())


def configs_in(value: Any) -> Any:
    """A value of a recipe with the config of each Component in its place."""
    if isinstance(value, Component):
        return value.config
    if isinstance(value, Mapping):
        return {key: configs_in(one) for key, one in value.items()}
    return [configs_in(one) for one in value] if isinstance(value, list) else value


def arguments_of(node: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A component's arguments, by name and by position."""
    named = {k: v for k, v in node.items() if k not in ("_target_", "type", "_args_")}
    return named, node.get("_args_", [])


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
            known = registry.names(kind.registry) if kind.registry else []
            named = f" or `type:` ({', '.join(known)})" if known else ""
            self.mistakes.add(path, f"expected a mapping with `_target_:`{named}, got {node!r}")
            return None
        target = self.target(node, kind, path)
        arguments, args = arguments_of(node)
        return self.call(target, arguments, path, kind, given=given, filled=filled, args=args)

    def call(
        self,
        target: Callable[..., Any] | None,
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
            target: the class or function. If it is not known (None), only the components in the
                arguments are checked.
            arguments: keyword arguments from the recipe.
            path: the place of the call in the recipe.
            kind: what the slot takes.
            given: arguments that the builder gives and the recipe may not.
            filled: arguments that the builder gives if the recipe does not.
            args: positional arguments (`_args_`), a list.

        Returns:
            The component, or None if it has mistakes.
        """
        if target is None:
            for name, value in arguments.items():
                self._argument(name, value, None, (*path, name))
            return None
        config_type = config_type_of(target)
        if config_type is not None:
            return self._typed(target, config_type, arguments, path, kind)
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
        hints = [signature.hints.get(name) for name in signature.positional]
        positional = [
            self._within("", value, hint, (*path, "_args_", str(i)))
            for i, (value, hint) in enumerate(zip_longest(args, hints[: len(args)]))
        ]
        if self.mistakes.count > before:
            return None
        known = frozenset(signature.named)
        return Component(path, kind, target, positional, kwargs, known)

    def _typed(
        self,
        target: Any,
        config_type: type[Config],
        arguments: Mapping[str, Any],
        path: Path,
        kind: Kind,
    ) -> Component | None:
        """Checks the arguments of a class with a `config_type`; see `call`."""
        held = self.fields(config_type, arguments, path)
        if held is None:
            return None
        config = self.config(config_type, held, path, type=getattr(target, "name", ""))
        if config is None:
            return None
        config._class = target
        return Component(path, kind, target, kwargs=held, config=config)

    def fields(
        self,
        config_type: type[Config],
        arguments: Mapping[str, Any],
        path: Path,
        *,
        without: Collection[str] = (),
    ) -> dict[str, Any] | None:
        """Checks the fields of a `Config` one by one.

        Args:
            config_type: the type of the config.
            arguments: the values from the recipe.
            path: the place of the config in the recipe.
            without: fields that are given elsewhere.

        Returns:
            The values, with a Component for each that the recipe describes; None if there are
            mistakes.
        """
        before, held = self.mistakes.count, {}
        apart = {"type", *without}
        known = {n: f for n, f in config_type.model_fields.items() if n not in apart}
        for name, value in arguments.items():
            where = (*path, name)
            if name not in known:
                later = config_type.not_yet.get(name)
                text = f"there is no such key{suggestion(name, known)}"
                self.mistakes.add(where, text if later is None else f"{later} does not exist yet.")
                continue
            mark = of_kind(known[name])
            if mark is not None:
                held[name] = self._shaped(value, known[name].annotation, mark, where)
                continue
            try:
                held[name] = fit(value, known[name].rebuild_annotation())
            except ValueError as error:
                self.mistakes.add(where, str(error))
        for name, one in known.items():
            if one.is_required() and name not in arguments:
                self.mistakes.add(path, f"{dotted((*path, name))} is missing.")
        return held if self.mistakes.count == before else None

    def config(
        self, config_type: type[Config], held: Mapping[str, Any], path: Path, **more: Any
    ) -> Config | None:
        """A config of fields that were checked one by one.

        Args:
            config_type: its type.
            held: the fields; of Components, the configs are taken.
            path: the place of the config in the recipe.
            **more: fields that the recipe does not give.

        Returns:
            The config; None, and a mistake, if its fields do not fit together.
        """
        try:
            return config_type(**{n: configs_in(v) for n, v in held.items()}, **more)
        except pydantic.ValidationError as error:
            for part in error.errors():
                text = part["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
                self.mistakes.add((*path, *map(str, part["loc"])), text)
            return None

    def _shaped(self, value: Any, hint: Any, mark: OfKind, path: Path) -> Any:
        """The components in a field that is annotated as a list or a mapping of them, or as one."""
        shape = typing.get_origin(hint)
        if shape is dict and isinstance(value, Mapping) and not is_component(value):
            return {str(k): self._of_kind(v, mark, (*path, str(k))) for k, v in value.items()}
        if shape is dict:
            self.mistakes.add(path, f"expected a mapping, each {mark.kind} by name, got {value!r}")
        elif shape is list and not isinstance(value, list):
            self.mistakes.add(path, f"expected a list, one {mark.kind} an item, got {value!r}")
        else:
            return self._of_kind(value, mark, path)
        return _MISTAKEN

    def _of_kind(self, given: Any, mark: OfKind, path: Path) -> Any:
        """The components in a field that holds components of a kind."""
        value: Any = given
        if isinstance(value, list):
            return [self._of_kind(one, mark, (*path, str(i))) for i, one in enumerate(value)]
        if isinstance(value, str) and mark.shorthand is not None:
            try:
                value = dict(mark.shorthand(value))
            except ConfigError as error:
                self.mistakes.add(path, str(error))
                return _MISTAKEN
        several: Any = value
        if isinstance(several, Mapping) and _is_several(several):
            return {str(k): self._of_kind(v, mark, (*path, str(k))) for k, v in several.items()}
        if isinstance(value, Mapping) and not is_component(value) and mark.default:
            value = {"type": mark.default, **value}
        made = self.component(value, KINDS[mark.kind], path)
        return _MISTAKEN if made is None else made

    def target(self, node: Mapping[str, Any], kind: Kind, path: Path) -> Callable[..., Any] | None:
        """Finds the class or function that a component names.

        Args:
            node: the component.
            kind: what the slot takes.
            path: the place of the component in the recipe.

        Returns:
            The class or function; None, and a mistake, if it does not exist or may not be named.
        """
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
            if not kind.registry:
                raise RecipeError(f"no {kind.name} has a registered name; give its `_target_:`.")
            target = registry.lookup(kind.registry, text)
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
        if name == "milestones":
            hint = list[int | float]  # shares of the run are as good; see horizon.py
        inner = self._within(name, value, hint, path)
        if hint is None or _holds_component(inner) or self.mistakes.count > before:
            return inner
        try:
            return fit(inner, hint)
        except ValueError as error:
            self.mistakes.add(path, str(error))
            return None

    def _within(self, name: str, value: Any, hint: Any, path: Path) -> Any:
        """An argument's value with its components, whose kind its name or annotation determines.

        `type:` names a component only if that kind has registered names; otherwise it is a key like
        any other.
        """
        kind = _kind_of_argument(name, hint)
        if isinstance(value, Mapping):
            if "_target_" in value or (kind.registry and "type" in value):
                made = self.component(value, kind, path, **_NESTED.get(name, {}))
                return _MISTAKEN if made is None else made
            item = _item_hint(hint, Mapping)
            return {k: self._within("", v, item, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, list):
            slot = name if name in _SLOTS else ""
            item = _item_hint(hint, Iterable)
            return [self._within(slot, v, item, (*path, str(i))) for i, v in enumerate(value)]
        return value


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
    passed: tuple[int, frozenset[str]] = 0, frozenset()  # to the base's, by position and by name
    for owner in owners:
        try:
            found = list(inspect.signature(owner).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            return Signature(name, (), (), (), {}, {}, is_function, True, True)
        found = found if is_function else found[1:]
        on = passed[1] - {p.name for p in found}  # what it hands on to its own base, unseen
        found = [p for i, p in enumerate(found) if i >= passed[0] and p.name not in passed[1]]
        own_hints = _hints(owner)
        for p in found:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in parameters:
                parameters[p.name] = p
                hints[p.name] = _hint(p, own_hints)
        takes_more = takes_more or any(p.kind is p.VAR_POSITIONAL for p in found)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
        if not takes_any:
            break
        by_place, by_name = _passed_on(owner)
        passed = by_place, by_name | on
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


@functools.lru_cache(256)  # source code takes long to read
def _passed_on(init: Any) -> tuple[int, frozenset[str]]:
    """The arguments that a constructor gives to its base's: how many by position, and names."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except (OSError, TypeError, SyntaxError):
        return 0, frozenset()
    for call in ast.walk(code):
        match call:
            case ast.Call(ast.Attribute(ast.Call(ast.Name("super")), "__init__"), args, keywords):
                named = frozenset(word.arg for word in keywords if word.arg is not None)
                return sum(not isinstance(one, ast.Starred) for one in args), named
    return 0, frozenset()


def _nothing(self: object) -> None:
    """What the last `**kwargs` of a chain of constructors may hold."""


def _hints(owner: Any) -> dict[str, Any]:
    """The annotations that can be resolved, one by one: some name what is never imported."""
    owner = inspect.unwrap(owner)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(owner, "__annotations__", {}).items():
        one = SimpleNamespace(__annotations__={name: annotation})
        try:
            known = getattr(owner, "__globals__", {})
            hints |= typing.get_type_hints(one, globalns=known, include_extras=True)
        except Exception:  # noqa: BLE001 - an annotation may be any expression; it is only a help
            continue
    return hints


def _hint(parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    hint = hints.get(parameter.name)
    if hint is None or isinstance(hint, typing.TypeVar):
        return None
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and not _is_standard(origin):
        hint = origin  # Dataset[T]: the class is all that can be checked
    return Optional[hint] if parameter.default is None else hint  # noqa: UP045 - a value


def fit(value: Any, hint: Any) -> Any:
    """Turns a plain value into what an annotation says: strictly, but as YAML can write it.

    A list is accepted for a tuple and an integer for a float, but not "1" for 1. An enumeration is
    given by value or name, a dtype or device of torch by name, a duration or date as in ISO 8601.

    Args:
        value: from the recipe.
        hint: the annotation.

    Returns:
        The value as the annotation says.

    Raises:
        ValueError: it does not fit; the message says what was expected and found.
    """
    config = pydantic.ConfigDict(arbitrary_types_allowed=True, strict=True)
    try:
        text = json.dumps(value)
        plain = as_yaml_writes(hint)
        # An annotated class with settings of its own takes none here.
        config = None if _has_settings(plain) else config
        adapter = pydantic.TypeAdapter(plain, config=config)
    except (pydantic.errors.PydanticUserError, TypeError, ValueError, NameError):
        return value  # nothing can be said of such an annotation
    try:
        fitted = adapter.validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        number = human_number(value) if isinstance(value, str) and takes_number(hint) else None
        if number is not None and not _PLAIN_NUMBER.fullmatch(value):
            with contextlib.suppress(ValueError):
                return fit(number, hint)
        raise ValueError(f"expected {_expected(error, value, hint)}, got {value!r}") from error
    texts_as_keys = typing.get_args(hint)[:1] == (str,)
    return fitted if texts_as_keys else _with_own_keys(value, fitted)


def takes_number(hint: Any) -> bool:
    """Whether an annotation takes numbers, which may then be written as `1.25K` or `5%` as well."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return any(member in (int, float) for member in _members(plain))


def as_yaml_writes(hint: Any) -> Any:
    """An annotation with what YAML has no value for: enumerations by name, dtypes and devices.

    Args:
        hint: the annotation. Iterables become lists, since pydantic's can be read only once.
    """
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return hint
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return Annotated[hint, pydantic.BeforeValidator(partial(_member, hint))]
    if inspect.isclass(hint) and hint in _OF_TORCH:
        return Annotated[Any, pydantic.PlainValidator(partial(_of_torch, hint))]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is None or origin is typing.Literal or not inner:
        return hint
    if origin is Annotated:
        return Annotated[(as_yaml_writes(inner[0]), *inner[1:])]
    if origin in (typing.Union, UnionType):
        return typing.Union[tuple(map(as_yaml_writes, inner))]  # noqa: UP007 - made here
    if origin in (Iterable, Iterator, Generator):
        return list[as_yaml_writes(inner[0])]
    if not isinstance(origin, type) or issubclass(origin, Callable):
        return hint
    generic: Any = origin
    return generic[tuple(one if one is ... else as_yaml_writes(one) for one in inner)]


_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _has_settings(hint: Any) -> bool:
    """Whether pydantic refuses settings from outside for a class: it may have its own."""
    if not inspect.isclass(hint):
        return False
    return is_dataclass(hint) or issubclass(hint, pydantic.BaseModel) or typing.is_typeddict(hint)


def _member(cls: type[enum.Enum], value: Any) -> Any:
    """A member by its value, or else by its name."""
    with contextlib.suppress(ValueError):
        return cls(value)
    return cls.__members__.get(value, value) if isinstance(value, str) else value


def _of_torch(cls: type, value: Any) -> Any:
    name = str(value).removeprefix("torch.")
    made = getattr(torch, name, None) if name.isidentifier() else None
    if cls is torch.device:
        with contextlib.suppress(RuntimeError):
            made = torch.device(value)
    if not isinstance(made, cls):
        raise ValueError(f"a {cls.__name__} of torch")
    return made


def _with_own_keys(value: Any, fitted: Any) -> Any:
    """`fitted` with numbers as keys where JSON has made text of them and nothing else says so."""
    if isinstance(value, Mapping) and type(fitted) is dict and len(fitted) == len(value):
        names = {str(key): key for key in value}
        if all(key in names for key in fitted):
            return {names[k]: _with_own_keys(value[names[k]], v) for k, v in fitted.items()}
    elif isinstance(value, list) and type(fitted) is list and len(value) == len(fitted):
        return [_with_own_keys(*pair) for pair in zip(value, fitted, strict=True)]
    return fitted


def _expected(error: pydantic.ValidationError, value: Any, hint: Any) -> str:
    """What would have fitted, from every branch of a union."""
    texts: list[str] = []
    for part in error.errors():
        text = part["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        text = text.removeprefix("Value error, ")
        if part["type"] in ("missing", "too_long"):  # of a tuple's items
            text = inspect.formatannotation(hint)
        elif part["type"] == "needs_python_object":
            whole = hint.__name__ if inspect.isclass(hint) else inspect.formatannotation(hint)
            text = str(part["loc"][-1] if part["loc"] else whole)
            text = text.removeprefix("is-instance[").removesuffix("]")
        if part["type"] == "literal_error" and isinstance(value, str):
            text += nearest(value, re.findall("'([^']*)'", text))
        if text not in texts:
            texts.append(text)
    return " or ".join(texts)


def _kind_of_argument(name: str, hint: Any) -> Kind:
    """The kind of component that an argument takes, by its name or else its annotation."""
    if name in _SLOTS:
        return KINDS[_SLOTS[name]]
    cls = _class_in(hint)
    return KINDS["part"] if cls is None else kind_of(name, cls)


def _class_in(hint: Any) -> type | None:
    """The one class of components that an annotation allows, besides None and containers.

    Classes of the standard library and protocols do not count: objects that fit them need not
    derive from them.
    """
    asked = [one for one in _members(hint) if one is not None and not _is_container(one)]
    if len(asked) != 1:
        return None
    cls = typing.get_origin(asked[0]) or asked[0]
    is_asked = is_base_class(cls) and not _is_standard(cls) and not _is_protocol(cls)
    return cls if is_asked else None


def _item_hint(hint: Any, container: type) -> Any:
    """The annotation of a list's items, or of a mapping's values; None if there is none."""
    for one in _members(hint):
        if _is_container(one) and issubclass(typing.get_origin(one), container):
            inner = typing.get_args(one)
            return inner[-1] if container is Mapping else inner[0]
    return None


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, with None for NoneType; any other annotation by itself."""
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    return tuple(None if one is type(None) else one for one in members)


def _is_container(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and _is_standard(origin) and issubclass(origin, Iterable)


def _is_protocol(cls: type) -> bool:
    return getattr(cls, "_is_protocol", False)


def _is_standard(cls: type) -> bool:
    return cls.__module__.split(".")[0] in sys.stdlib_module_names


def _holds_component(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_component(v) for v in value.values())
    if isinstance(value, list):
        return any(_holds_component(v) for v in value)
    return isinstance(value, Component) or value is _MISTAKEN
