"""What a recipe may name, and how a name becomes a class or a function.

A recipe may come from anywhere. `_target_: torch.os.system` is a path inside torch, and torch holds
classes that run commands or unpickle files, so a target must pass three checks:

1. Its first name is torch, torchdata, paceline, the recipe's own code, a package with an entry
   point in the group "paceline", or one named by `--trust`.
2. The path is resolved attribute by attribute; each module on it must have the name in the path,
   and the object must be defined in the same package under its own name. So a module that merely
   imported `os` or `subprocess` leads nowhere.
3. The object is of the kind that its slot takes: a class that derives from the slot's base class.
   From torch and paceline only classes in the kind's home modules, and functions on an explicit
   list, are accepted. A function of a trusted package must be annotated to return that kind; one of
   the recipe's own code is called, and its result is checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from paceline import registry
from paceline.errors import RecipeError, nearest
from paceline.recipe.code import is_own_code
from paceline.recipe.mistakes import with_article

# Ours and PyTorch's own. Of these, only what a Kind lists can be built.
_HOUSE = ("torch", "torchdata", "paceline")


@dataclass(frozen=True)
class Kind:
    """What a slot of a recipe, or an argument of a component, takes.

    Attributes:
        name: the kind's name, for messages.
        base: the class that a class must derive from, or "module:Class"; "" for any class.
        homes: the modules of torch and paceline whose classes are accepted.
        methods: the user's own class is also accepted if it has all methods of one of these sets.
        functions: "module:name" of torch's functions that are accepted.
        is_value: a function is the value itself (a loss, a collate_fn); otherwise it is called to
            make the value.
        registry: the kind under which `type: name` is looked up; "" if there are no such names.
    """

    name: str
    base: str | type
    homes: tuple[str, ...] = ("paceline",)
    methods: tuple[tuple[str, ...], ...] = ()
    functions: frozenset[str] = frozenset()
    is_value: bool = False
    registry: str = ""

    def accepts(self, cls: type) -> bool:
        """Whether instances of a class are of this kind.

        The class has to derive from the base. `issubclass` would also accept virtual subclasses,
        and whatever the base's metaclass likes.
        """
        if not self.base:
            return True
        base = self.base if isinstance(self.base, type) else _load(self.base)
        if base in cls.__mro__:
            return True
        # Not hasattr: every class is callable, whether its instances are or not.
        defined = {name for owner in cls.__mro__ for name in vars(owner)}
        return any(defined.issuperset(methods) for methods in self.methods)

    def __str__(self) -> str:
        """The name and the base class, as messages give them."""
        base = self.base
        path = f"{base.__module__}:{base.__qualname__}" if isinstance(base, type) else base
        return f"{self.name} ({path.replace(':', '.')})" if path else self.name


_LOSSES = frozenset(
    f"torch.nn.functional:{name}"
    for name in (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cosine_embedding_loss",
        "cross_entropy",
        "gaussian_nll_loss",
        "hinge_embedding_loss",
        "huber_loss",
        "kl_div",
        "l1_loss",
        "margin_ranking_loss",
        "mse_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "nll_loss",
        "poisson_nll_loss",
        "smooth_l1_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
    )
)
_LOADER = registry.KINDS["dataloader"]
_LOADERS = ("torch.utils.data.dataloader", "torchdata.stateful_dataloader", "paceline")
_DATA = ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.utils.data.distributed")


def _kind(name: str, *homes: str, **more: Any) -> Kind:
    """A kind of the registry; `homes` are the modules of torch whose classes are accepted."""
    return Kind(name, registry.KINDS[name], (*homes, "paceline"), registry=name, **more)


# Every kind of the registry, with what it accepts from torch.
KINDS: dict[str, Kind] = {name: _kind(name) for name in registry.KINDS} | {
    kind.name: kind
    for kind in (
        _kind("model", "torch.nn.modules"),
        _kind("optimizer", "torch.optim"),
        _kind("lr_scheduler", "torch.optim.lr_scheduler", "torch.optim.swa_utils"),
        _kind(
            "loss_fn",
            "torch.nn.modules.loss",
            methods=(("__call__",),),
            functions=_LOSSES,
            is_value=True,
        ),
        Kind("dataloader", _LOADER, _LOADERS, (("__iter__",),), registry="dataloader"),
        # A slot of the Trainer that also takes a source, or an object that makes sources.
        Kind(
            "train_dataloader",
            _LOADER,
            _LOADERS,
            methods=(("__iter__",), ("open_source",), ("start_epoch", "draw", "at_end")),
            registry="dataloader",
        ),
        _kind("dataset", *_DATA, methods=(("__getitem__",),)),
        _kind("sampler", *_DATA, methods=(("__iter__",),)),
        Kind("collate_fn", "", (), is_value=True, registry="collate_fn"),
        # An argument of a component that has neither a slot of its own nor an annotation.
        Kind("part", "", ("torch.nn.modules", *_DATA, "paceline.recipe.schedules")),
    )
}


def kind_of(name: str, base: type) -> Kind:
    """The kind of a slot or an argument.

    Args:
        name: the slot's or argument's name.
        base: the class that its components derive from.

    Returns:
        The known kind of that class; or a kind for the class alone, with the homes and the
        registered names of the nearest known kind above it. If there is none, only classes of
        Paceline and the user's own are accepted.
    """
    named = KINDS.get(name)
    if named is not None and _base_of(named) is base:
        return named
    for cls in base.__mro__:
        for kind in KINDS.values():
            if _base_of(kind) is cls:
                if cls is base:
                    return kind
                return Kind(base.__name__, base, kind.homes, registry=kind.registry)
    return Kind(base.__name__, base)


def _base_of(kind: Kind) -> type | None:
    """A known kind's base class; None if it is not imported, since then nothing derives from it."""
    module, _, name = str(kind.base).partition(":")
    return getattr(sys.modules.get(module), name, None)


@dataclass(frozen=True)
class Roots:
    """The packages whose names this recipe may use, besides torch and Paceline.

    Args:
        code: the name of the recipe's own module, or None.
        trusted: the packages given with `--trust`.
    """

    code: str | None = None
    trusted: Collection[str] = ()

    def allows(self, root: str) -> bool:
        """Whether a target may begin with `root`."""
        return root in _HOUSE or root == self.code or root in self.trusted or root in _plugins()


def find_target(text: str, kind: Kind, roots: Roots) -> Callable[..., Any]:
    """Finds the class or function that `_target_: text` names; does not call it.

    Args:
        text: the dotted path.
        kind: what the slot takes.
        roots: the packages that the recipe may name.

    Raises:
        RecipeError: it may not be named, does not exist, or is not of the slot's kind.
    """
    parts = text.split(".")
    if len(parts) < 2 or not all(p.isidentifier() and not p.startswith("_") for p in parts):
        raise RecipeError(f"{text!r} is not the dotted path of a public class or function.")
    if not roots.allows(parts[0]):
        known = [*_HOUSE, *([roots.code] if roots.code else [])]
        raise RecipeError(
            f"{text!r}: a recipe may name things from {', '.join(known)}"
            f"{nearest(parts[0], known) or '.'} To use the package {parts[0]!r} as well: "
            f"--trust {parts[0]}"
        )
    target, module, name = _walk(parts)
    _check_origin(text, target, module, name)
    check_kind(text, target, kind, own=parts[0] not in _HOUSE)
    if parts[0] not in _HOUSE and not is_own_code(parts[0]):
        _check_factory(text, target, kind)
    return target


def check_kind(text: str, target: Any, kind: Kind, *, own: bool) -> None:
    """Checks that a class or function may fill a slot.

    Args:
        text: how the recipe names it.
        target: the class or function.
        kind: what the slot takes.
        own: whether it is the user's code (or trusted), not torch's or Paceline's.

    Raises:
        RecipeError: it may not.
    """
    if inspect.isclass(target):
        if not kind.accepts(target):
            raise RecipeError(f"{text!r} is not {with_article(str(kind))}.")
        home = target.__module__ + "."
        if not own and not any(home.startswith(f"{known}.") for known in kind.homes):
            raise RecipeError(
                f"{text!r} is not {with_article(kind.name)} that a recipe may name; build it in a "
                "function of your own in `code:`."
            )
        return
    listed = f"{target.__module__}:{target.__name__}" in kind.functions
    if not own and not listed:
        raise RecipeError(
            f"{text!r} is a function, and not one that can be {with_article(str(kind))}."
        )


def _check_factory(text: str, target: Any, kind: Kind) -> None:
    """Checks that a function of a merely trusted package is annotated to return the slot's kind.

    The recipe chooses its arguments, and a package has many functions that do something else.
    """
    if inspect.isclass(target) or kind.is_value:
        return
    made = returned_class(target)
    if made is None or not kind.accepts(made):
        raise RecipeError(
            f"{text!r} is a function that is not annotated to return {with_article(kind.name)}. "
            "Call it in a function of your own in `code:`."
        )


def returned_class(function: Callable[..., Any]) -> type | None:
    """The class that a function is annotated to return, if it is annotated with one."""
    try:
        made = typing.get_type_hints(function).get("return")
    except Exception:  # noqa: BLE001 - an annotation may be any expression
        return None
    return made if inspect.isclass(made) else None


def _walk(parts: list[str]) -> tuple[Any, str, str]:
    """Follows a path; returns the object, the module it was found in and its name there."""
    found: Any = _import(parts[0])
    module = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        path = ".".join(parts[: i + 1])
        if isinstance(found, ModuleType):
            below = _attribute(found, part)
            if below is None and hasattr(found, "__path__") and importlib.util.find_spec(path):
                below = _import(path)
            if isinstance(below, ModuleType):
                if below.__name__ != path:
                    raise RecipeError(
                        f"'{path}' is the module {below.__name__!r}, which belongs elsewhere."
                    )
                module = path
        else:
            below = inspect.getattr_static(found, part, None)
        if below is None:
            known = [name for name in dir(found) if not name.startswith("_")]
            raise RecipeError(f"'{module}' has no {part!r}{nearest(part, known)}")
        found = below
    return found, module, ".".join(parts[module.count(".") + 1 :])


def _check_origin(text: str, target: Any, module: str, name: str) -> None:
    """The object must be a class or function that its own package defines under this name."""
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise RecipeError(f"{text!r} is neither a class nor a function.")
    own_module = getattr(target, "__module__", None) or ""
    own_name = getattr(target, "__qualname__", "")
    same_package = own_module.split(".")[0] == module.split(".")[0]
    if not same_package or own_name != name:
        raise RecipeError(f"{text!r} is another name for {own_module}.{own_name}; name that.")


def _import(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"the module {path!r} cannot be imported: {error}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    """A module's attribute, or None: some of torch's modules raise errors of their own."""
    try:
        return getattr(module, name, None)
    except Exception:  # noqa: BLE001 - for a look-up, no answer is an answer
        return None


@cache
def _load(reference: str) -> type:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def _plugins() -> frozenset[str]:
    """The installed packages that have an entry point for Paceline."""
    found = entry_points(group="paceline")
    return frozenset(point.value.partition(":")[0].split(".")[0] for point in found)
