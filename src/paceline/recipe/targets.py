"""What a recipe may name, and how a name becomes a class or a function.

A recipe may come from anywhere. `_target_: torch.os.system` is a path inside torch, and torch holds
classes that run commands or unpickle files, so a target must pass three checks:

1. Its first name is torch, torchdata, paceline, the recipe's own code, a package with an entry
   point in the group "paceline", or one named by `--trust`.
2. The path is resolved attribute by attribute; each module on it must have the name in the path,
   and the object must be defined in the same package under its own name. So a module that merely
   imported `os` or `subprocess` leads nowhere.
3. The object is of the kind that its slot takes. From torch and paceline only classes of that kind
   in their home modules, and functions on an explicit list, are accepted. A function of a trusted
   package must be annotated to return that kind; one of the recipe's own code is called, and its
   result is checked.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from paceline.errors import RecipeError, nearest
from paceline.recipe.code import is_own_code

# Ours and PyTorch's own. Of these, only what a Kind lists can be built.
_HOUSE = ("torch", "torchdata", "paceline")


@dataclass(frozen=True)
class Kind:
    """What a slot of the recipe takes.

    Attributes:
        name: the slot's name, which is also its registry (`type: name`).
        base: "module:Class" that a class must derive from.
        homes: the modules of torch and paceline whose classes may fill the slot.
        methods: the user's own class is also accepted if it has all of these.
        functions: "module:name" of torch's functions that may fill the slot.
        is_value: a function is the value itself (a loss, a collate_fn); otherwise it is called to
            make the value.
    """

    name: str
    base: str
    homes: tuple[str, ...] = ("paceline",)
    methods: tuple[str, ...] = ()
    functions: frozenset[str] = frozenset()
    is_value: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether `value`, a class or an instance, is of this kind."""
        if not self.base:
            return True
        cls = value if inspect.isclass(value) else type(value)
        if issubclass(cls, _load(self.base)):
            return True
        # Not hasattr: every class is callable, whether its instances are or not.
        defined = {name for base in cls.__mro__ for name in vars(base)}
        return bool(self.methods) and defined.issuperset(self.methods)


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
_DATA = ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.utils.data.distributed")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("trainer", "paceline.trainer.trainer:Trainer"),
        Kind("model", "torch.nn:Module", ("torch.nn.modules", "paceline")),
        Kind("optimizer", "torch.optim:Optimizer", ("torch.optim", "paceline")),
        Kind(
            "lr_scheduler",
            "torch.optim.lr_scheduler:LRScheduler",
            ("torch.optim.lr_scheduler", "torch.optim.swa_utils", "paceline"),
        ),
        Kind(
            "loss_fn",
            "torch.nn:Module",
            ("torch.nn.modules.loss", "paceline"),
            methods=("__call__",),
            functions=_LOSSES,
            is_value=True,
        ),
        Kind(
            "dataloader",
            "torch.utils.data:DataLoader",
            ("torch.utils.data.dataloader", "torchdata.stateful_dataloader", "paceline"),
            methods=("__iter__",),
        ),
        Kind("dataset", "torch.utils.data:Dataset", (*_DATA, "paceline"), ("__getitem__",)),
        Kind("sampler", "torch.utils.data:Sampler", (*_DATA, "paceline"), ("__iter__",)),
        Kind("collate_fn", "", (), is_value=True),
        Kind("callback", "paceline.trainer.callback:Callback"),
        Kind("logger", "paceline.log.sinks:Sink"),
        # An argument of a component that has no slot of its own.
        Kind("part", "", ("torch.nn.modules", *_DATA, "paceline.recipe.schedules")),
    )
}


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
    wanted = f"a {kind.name}" + (f" ({kind.base.replace(':', '.')})" if kind.base else "")
    if inspect.isclass(target):
        home = target.__module__ + "."
        at_home = own or any(home.startswith(f"{known}.") for known in kind.homes)
        if not at_home or not kind.accepts(target):
            raise RecipeError(f"{text!r} is not {wanted}.")
        return
    listed = f"{target.__module__}:{target.__name__}" in kind.functions
    if not own and not listed:
        raise RecipeError(f"{text!r} is a function, and not one that can be {wanted}.")


def _check_factory(text: str, target: Any, kind: Kind) -> None:
    """Checks that a function of a merely trusted package is annotated to return the slot's kind.

    The recipe chooses its arguments, and a package has many functions that do something else.
    """
    if inspect.isclass(target) or kind.is_value:
        return
    try:
        made = typing.get_type_hints(target).get("return")
    except Exception:  # noqa: BLE001 - an annotation may be any expression
        made = None
    if not inspect.isclass(made) or not kind.accepts(made):
        raise RecipeError(
            f"{text!r} is a function that is not annotated to return a {kind.name}. Call it in a "
            "function of your own in `code:`."
        )


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


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def _plugins() -> frozenset[str]:
    """The installed packages that have an entry point for Paceline."""
    found = entry_points(group="paceline")
    return frozenset(point.value.partition(":")[0].split(".")[0] for point in found)
