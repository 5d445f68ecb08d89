"""Slots: the components that a Trainer class takes from a recipe, each with its base class.

A recipe's section fills the slot of its name: the builder passes the component to the constructor
as the argument of that name. The Trainer's own slots are the table below; a subclass adds slots, or
narrows an inherited one:

    class PolicyTrainer(Trainer):
        slots = {"environment": Environment, "rewards": list[Reward]}

        def __init__(self, *, environment, rewards, **settings):
            super().__init__(**settings)
            self.environment, self.rewards = environment, rewards

Only instances of the base class fill a slot, so a recipe can build nothing else there.

A `Slot` with `given` is filled with a component that needs something which is made later: its
constructor takes these arguments, which the recipe may not give, and the trainer receives a
function of them that builds it.

A class whose components are made by factories declares `slots = Only({...})`: these are all its
slots, in place of the inherited ones. A `Slot` with `choices` names the classes that may fill it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from paceline.errors import ConfigError
from paceline.log.sinks import Sink
from paceline.trainer.callback import Callback

# In the order in which a recipe's components are built.
TRAINER_SLOTS: dict[str, type] = {
    "model": torch.nn.Module,
    "train_dataloader": DataLoader,
    "val_dataloader": DataLoader,
    "loss_fn": torch.nn.Module,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": LRScheduler,
    "callbacks": list[Callback],
    "loggers": list[Sink],
}
# The keys of a recipe that hold no component; no slot may have their names.
RECIPE_KEYS = (
    "checkpoint",
    "code",
    "defaults",
    "hydra",
    "parallel",
    "run",
    "seed",
    "seeds",
    "trainer",
    "tune",
)
# Modules whose types are no base classes of components: `subprocess.Popen` is an `object` too, and
# every function is a `Callable`.
_TOO_GENERAL = ("abc", "builtins", "collections.abc", "types", "typing", "typing_extensions")


@dataclass(frozen=True)
class Slot:
    """What a section of a recipe may hold.

    Attributes:
        base: the class of its component.
        is_list: whether it holds a list of components, not one.
        choices: the classes that may fill it, the one without a `type:` first; any if empty.
        given: arguments that the trainer gives once it has them; it receives a function of them.
        optional: whether there may be none where `choices` has a default.
    """

    base: type
    is_list: bool = False
    choices: tuple[type, ...] = ()
    given: tuple[str, ...] = ()
    optional: bool = False


class Only(dict[str, Any]):
    """The slots of a trainer class in place of those that it inherits."""


def slots_of(cls: type) -> dict[str, Slot]:
    """The slots of a trainer class by name, inherited ones first.

    Args:
        cls: a Trainer class, complete with its constructor.

    Raises:
        ConfigError: a slot's base class is too general, its name is taken, it does not narrow the
            inherited slot, or the constructor has no argument for it; every such slot is listed.
    """
    found: dict[str, Slot] = {}
    wrong: list[str] = []
    for owner in reversed(cls.__mro__):
        declared = vars(owner).get("slots", {})
        if not isinstance(declared, Mapping):
            raise ConfigError(f"{owner.__qualname__}.slots: expected a dictionary of classes.")
        if isinstance(declared, Only):
            known = {name: _slot(value) for name, value in declared.items()}
            found = {name: slot for name, slot in known.items() if slot is not None}
            wrong += [f"{name!r}: {declared[name]!r} is no class." for name in known.keys() - found]
            continue
        for name, value in declared.items():
            slot = _slot(value)
            why = _why_not(name, value, slot, found.get(name), cls)
            if why is not None:
                wrong.append(f"{name!r}: {why}")
            elif slot is not None:
                found[name] = slot
    if wrong:
        raise ConfigError(f"the slots of {cls.__qualname__}:\n  " + "\n  ".join(wrong))
    return found


def own_slots(cls: type) -> dict[str, Slot]:
    """The slots of a trainer class that the Trainer itself does not have."""
    return {name: slot for name, slot in slots_of(cls).items() if name not in TRAINER_SLOTS}


def is_base_class(value: Any) -> bool:
    """Whether `value` is a class, and not one of Python's own that nearly anything derives from."""
    return isinstance(value, type) and value.__module__ not in _TOO_GENERAL


def _slot(value: Any) -> Slot | None:
    if isinstance(value, Slot):
        return value
    is_list = typing.get_origin(value) is list
    base = typing.get_args(value)[0] if is_list else value
    return Slot(base, is_list) if is_base_class(base) else None


def _why_not(
    name: str, value: Any, slot: Slot | None, inherited: Slot | None, cls: type
) -> str | None:
    """Why a class cannot have a slot; None if it can."""
    if slot is None:
        return (
            f"{value!r} is not a base class of components: a recipe could build anything there. "
            "Give the class that they derive from, or list[...] of it."
        )
    if inherited is not None:
        if slot.is_list != inherited.is_list or inherited.base not in slot.base.__mro__:
            return (
                f"{slot.base.__qualname__} does not narrow the inherited slot, which takes "
                f"{'a list of ' if inherited.is_list else ''}{inherited.base.__qualname__}."
            )
        return None
    if name in TRAINER_SLOTS:
        return None
    if not name.isidentifier() or name.startswith("_"):
        return "expected the name of an argument."
    if name in RECIPE_KEYS or name in _names_of_the_trainer(cls):
        return "recipes or the Trainer already use this name; choose another."
    if name not in _arguments(cls.__mro__):
        return f"{cls.__qualname__}.__init__ has no argument of this name to receive the component."
    return None


def _names_of_the_trainer(cls: type) -> set[str]:
    """The settings, attributes and methods of the Trainer itself."""
    classes = [base for base in cls.__mro__ if base.__module__.startswith("paceline.trainer.")]
    names = {name for base in classes for name in (*vars(base), *inspect.get_annotations(base))}
    return names | _arguments(classes)


def _arguments(classes: Iterable[type]) -> set[str]:
    """The names of all arguments of the classes' own constructors."""
    constructors = [vars(cls).get("__init__") for cls in classes]
    written = [init for init in constructors if inspect.isfunction(init)]  # in Python, not in C
    return {name for init in written for name in inspect.signature(init).parameters}
