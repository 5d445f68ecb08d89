"""What a run is: what a resumed run must find unchanged, by dotted key.

Each function in `_PARTS` gives some of it; a further part is one function more:

- settings, data, loss, optimizers and schedulers, window, interval: as they were set.
- arguments of every component: those of the recipe, or else those that the objects keep.
- code: what defines the trainer, the models, the loss and the data, and all that it uses.
- content: a hash of a few samples of map-style data.
- said: what users' objects say themselves in `run_identity()`.

A part that a checkpoint does not know, of an older version, is not compared, and the plan says so.
Callbacks, loggers, workers, the layout and what is not listed here may change freely.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from paceline.data.content import content_of
from paceline.data.custom import is_custom
from paceline.data.loader import loaders_by_name
from paceline.data.streamed import StreamedSource
from paceline.errors import ConfigError
from paceline.parallel.ddp import unwrap
from paceline.trainer.arguments import (
    UNKNOWN,
    arguments_in_model,
    arguments_of,
    flattened,
    kind_of,
    names_of,
    parameters_of,
)
from paceline.trainer.base import TrainerBase
from paceline.trainer.identity_keys import Identity
from paceline.trainer.names import unique_names
from paceline.trainer.ranks_alike import check_contents_alike
from paceline.trainer.run import Run
from paceline.trainer.slots import own_slots, slots_of
from paceline.trainer.source_code import own_code
from paceline.world.world import World

# Wherever a trainer keeps them, they are among its named models, optimizers and schedulers.
_NAMED = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


class HasRunIdentity(Protocol):
    """An object that says what a resumed run must find unchanged of it.

    A Trainer, loss, dataset, sampler, batch sampler, collate function, loader, model, optimizer,
    scheduler, callback, checkpoint object or a component of the Trainer class's own slots may have
    this method. It is called on every rank as a run starts, before a checkpoint is loaded, and has
    to give the same on all of them.
    """

    def run_identity(self) -> Mapping[str, Any]:
        """Numbers, strings, None or lists of them, by a key of one's own.

        The key gets the object's prefix, such as `data.dataset.` or `callbacks.NAME.`. Of anything
        large give a digest.
        """
        ...


def describe_components(trainer: TrainerBase, run: Run) -> Identity:
    """What the components are, before they are placed on the ranks; the same on every rank.

    Args:
        trainer: with its components and data.
        run: that starts; gets a line of the plan for what cannot be compared.
    """
    found: Identity | None = None
    decisions: list[tuple[str, str]] = []
    if run.world.is_main:
        found = Identity()
        for part, keys in _arguments_of_components(trainer):
            # A section of the user's own may have the name of a prefix.
            found.add(part, {key: value for key, value in keys.items() if key not in found.keys})
        found.code = own_code(_roots(trainer))
        found.add("code", {f"code.{name}": d for name, d in found.code.digests.items()})
        decisions += [
            (f"the code of {name} is not compared at a resume: it has no file", "code in a file")
            for name in found.code.unread
        ]
    contents: dict[str, str] = {}
    # Without a folder, users may keep `state_dict()` themselves.
    writes_nothing = trainer.run_dir is not None and trainer.checkpoint_policy is None
    for prefix, loader in _loaders(trainer):
        if is_custom(loader) or writes_nothing:  # the former says itself what it is
            continue
        if found is None and getattr(loader, "num_workers", 0):
            continue  # a worker more is much for a second look
        content, why = content_of(loader)
        if content is not None:
            contents[f"the samples of {prefix}, all of which each rank is given"] = content
        if found is not None and content is not None:
            found.add(f"content of {prefix}", {f"{prefix}.content": content})
        elif found is not None:
            what = f"what {prefix} holds is not compared at a resume: {why}"
            decisions.append((what, "run_identity() of the dataset"))
    check_contents_alike(contents, run)
    found, decisions = run.world.broadcast_object((found, decisions))
    for decision, setting in decisions:
        run.plan.add(decision, setting)
    assert found is not None
    return found


def complete_identity(trainer: TrainerBase, run: Run, described: Identity) -> None:
    """Makes the run's identity of what the components are and of all settings.

    The models' own names and shapes are compared when their weights are loaded.

    Args:
        trainer: with its components and data.
        run: whose models are placed; its identity is set.
        described: what `describe_components` gave.
    """
    run.identity = Identity(code=described.code)
    for name, part in _PARTS.items():
        run.identity.add(name, part(trainer, run))
    for name, keys in described.parts.items():
        # An optimizer's own settings say the same as its recipe.
        new = {key: described.keys[key] for key in keys if key not in run.identity.keys}
        run.identity.add(name, new)


def add_own_identity(trainer: TrainerBase, run: Run) -> None:
    """Adds to a run's identity what users' objects say in `run_identity()`.

    Args:
        trainer: that has all of them: `on_setup` may have made some.
        run: whose identity it is.

    Raises:
        ConfigError: something cannot be compared, is said twice, or differs between ranks.
    """
    own = Identity()
    for prefix, thing in _speakers(trainer):
        say = getattr(thing, "run_identity", None)
        if callable(say):
            name = getattr(thing, "__qualname__", type(thing).__qualname__)
            said = _checked(prefix, say(), f"{name}.run_identity(), of {prefix},")
            own.add("said", said)
    _check_ranks_agree(own.keys, run.world)
    run.identity.leave_out(own.keys)
    run.identity.add("said", own.keys)


def _settings(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "precision": run.placement.computes_in,
        "max_grad_norm": trainer.max_grad_norm,
    }


def _loss(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    loss_fn = trainer.loss_fn
    if isinstance(loss_fn, torch.nn.Module):
        loss_fn = unwrap(loss_fn)
    arguments = {f"loss_fn.{key}": value for key, value in _arguments(loss_fn).items()}
    return {"loss_fn": kind_of(loss_fn), **arguments}


def _data(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    who = f"the identity of {type(trainer.source).__name__}"
    return _checked("data", trainer.source.identity, who)


def _optimizers(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, optimizer in trainer.named_optimizers().items():
        keys[f"{name}.class"] = type(optimizer).__name__
        arguments = inspect.signature(type(optimizer)).parameters
        # torch adds it to the settings of others' optimizers when their state is loaded.
        defaults = {
            key: value
            for key, value in optimizer.defaults.items()
            if key != "differentiable" or key in arguments
        }
        keys |= {f"{name}.{key}": value for key, value in _plain(defaults).items()}
        # Some optimizers count in their groups as well.
        for i, group in enumerate(optimizer.param_groups):
            own = {k: v for k, v in group.items() if k in defaults and k in arguments}
            if "initial_lr" in group:
                own["lr"] = group["initial_lr"]
            for key, value in _plain(own).items():
                if keys[f"{name}.{key}"] != value:
                    keys[f"{name}.group{i}.{key}"] = value
    # A scheduler may have its optimizer's name.
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        keys[f"{name}.class"] = type(scheduler).__name__
        keys |= {f"{name}.{key}": value for key, value in _schedule_settings(scheduler).items()}
    return keys


def _own_slots(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """The classes of the components in the trainer class's own slots.

    Components of the kinds that the Trainer itself has are left out: a model is compared when its
    weights are loaded, and callbacks and loaders may change.
    """
    known = tuple(slot.base for slot in slots_of(TrainerBase).values())
    return {key: kind_of(one) for key, one in _in_own_slots(trainer) if not isinstance(one, known)}


def _in_own_slots(trainer: TrainerBase) -> Iterator[tuple[str, Any]]:
    """The components in the class's own slots, kept as attributes of the slots' names."""
    for name in own_slots(type(trainer)):
        held = getattr(trainer, name, None)
        if isinstance(held, list | tuple):
            yield from ((f"{name}.{i}", component) for i, component in enumerate(held))
        elif held is not None:
            yield name, held


def _window(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """What a window is of data that can only be iterated; other sources say it themselves."""
    if not isinstance(trainer.source, StreamedSource):
        return {}
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return {
        "data.batch_size": size if isinstance(size, int) else None,
        "data.gradient_accumulation_steps": trainer.source.micro_batches_per_window,
        "data.epoch_length": trainer.epoch_length,
    }


def _interval(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    if not trainer.named_schedulers():
        return {}
    return {"lr_scheduler_interval": trainer.lr_scheduler_interval}


# What Paceline compares by itself: each gives values by dotted key.
_PARTS: dict[str, Callable[[TrainerBase, Run], dict[str, Any]]] = {
    "settings": _settings,
    "loss": _loss,
    "data": _data,
    "optimizers": _optimizers,
    "slots": _own_slots,
    "window": _window,
    "interval": _interval,
}


# The components' arguments

_LOADERS_OWN = frozenset(inspect.signature(DataLoader.__init__).parameters)


def _arguments_of_components(trainer: TrainerBase) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of each component, in a part of its own.

    Its name says whether they are the recipe's or the object's, which cannot be compared.
    """
    recipe = trainer.recipe_identity or {}
    for slot, keys in recipe.items():
        yield f"{slot} (recipe)", dict(keys)
    if "trainer" not in recipe:
        yield "trainer (object)", _of_trainer(trainer)
    if "loss_fn" not in recipe:
        settings = arguments_of("loss_fn", trainer.loss_fn)
        known = _arguments(trainer.loss_fn)
        new = {k: v for k, v in settings.items() if k.removeprefix("loss_fn.") not in known}
        yield "loss_fn (object)", new
    if "model" not in recipe:
        keys = {}
        for name, model in trainer.named_models().items():
            keys |= {f"models.{name}.{key}": v for key, v in arguments_in_model(model).items()}
        yield "model (object)", keys
    for prefix, loader in _loaders(trainer):
        slot = "train_dataloader" if prefix == "data" else "val_dataloader"
        if slot not in recipe and not is_custom(loader):
            yield f"{prefix} (object)", _of_loaders_parts(prefix, loader)


def _of_trainer(trainer: TrainerBase) -> dict[str, Any]:
    """The arguments of a user's subclass that the Trainer itself does not have."""
    ours = {name for cls in type(trainer).__mro__ if _is_ours(cls) for name in parameters_of(cls)}
    held = {name: vars(trainer).get(name, UNKNOWN) for name in names_of(type(trainer)) - ours}
    return flattened("trainer", held, plain=True)


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "paceline"


def _of_loaders_parts(prefix: str, loader: Any) -> dict[str, Any]:
    """The arguments of a loader's own class, dataset, samplers and collate function."""
    if not isinstance(loader, DataLoader):
        return arguments_of(prefix, loader)
    own = {name: vars(loader).get(name, UNKNOWN) for name in names_of(type(loader))}
    keys = flattened(prefix, {k: v for k, v in own.items() if k not in _LOADERS_OWN})
    for name, thing in _of_loader(prefix, loader):
        made_by_loader = name == f"{prefix}.batch_sampler" and loader.batch_size is not None
        if name not in (prefix, *keys) and not (thing is None or made_by_loader):
            kind = kind_of(thing)
            if kind is not None and not kind.startswith("torch.utils.data."):
                keys[name] = kind
            keys |= arguments_of(name, thing)
    return keys


# The code

_HELD = 1000  # objects to look at
_PLAIN = torch.Tensor | np.ndarray | str | bytes | int | float | None | ModuleType


def _roots(trainer: TrainerBase) -> Iterator[Any]:
    """The classes and functions that define the trainer, its models, loss and data."""
    yield type(trainer)
    yield from trainer.recipe_targets
    for model in trainer.named_models().values():
        yield from {type(module) for module in model.modules()}
    yield from map(type, trainer.named_optimizers().values())
    yield from map(type, (trainer.named_schedulers() or {}).values())
    held: deque[Any] = deque([trainer.loss_fn, *(one for _, one in _in_own_slots(trainer))])
    for prefix, loader in _loaders(trainer):
        held += [thing for _, thing in _of_loader(prefix, loader)]
    seen: set[int] = set()
    while held and len(seen) < _HELD:
        thing = held.popleft()
        if id(thing) in seen or isinstance(thing, _PLAIN):
            continue
        seen.add(id(thing))
        if isinstance(thing, partial):
            held += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.isroutine(thing) or isinstance(thing, type):
            yield thing
        elif isinstance(thing, Mapping):
            held += list(thing.values())[:_HELD]
        elif isinstance(thing, list | tuple):
            held += thing[:_HELD]
        else:
            yield type(thing)
            held += getattr(thing, "__dict__", {}).values()


def _loaders(trainer: TrainerBase) -> Iterator[tuple[str, Any]]:
    """The training and validation loaders, each with the prefix of its keys."""
    if trainer.train_dataloader is not None:
        yield "data", trainer.train_dataloader
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        yield _of_validation(name), loader


def _of_validation(name: str | None) -> str:
    return "validation" if name is None else f"validation.{name}"


def _speakers(trainer: TrainerBase) -> Iterator[tuple[str, Any]]:
    """The objects that may have a `run_identity()`, each with the prefix of its keys."""
    yield "trainer", trainer
    loss_fn = trainer.loss_fn
    yield "loss_fn", loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    for prefix, loader in _loaders(trainer):
        yield from _of_loader(prefix, loader)
    for name, model in trainer.named_models().items():
        if name != "loss_fn":
            yield f"models.{name}", model
    yield from trainer.named_optimizers().items()
    yield from (trainer.named_schedulers() or {}).items()
    for name, callback in unique_names(trainer.callbacks).items():
        yield f"callbacks.{name}", callback
    for name, thing in trainer.named_objects().items():
        yield f"objects.{name}", thing
    for name, component in _in_own_slots(trainer):
        if not isinstance(component, _NAMED):
            yield name, component


def _of_loader(prefix: str, loader: Any) -> Iterator[tuple[str, Any]]:
    yield prefix, loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    yield f"{prefix}.batch_sampler", batch_sampler
    yield f"{prefix}.sampler", sampler
    yield f"{prefix}.collate_fn", getattr(loader, "collate_fn", None)
    yield from _of_dataset(f"{prefix}.dataset", getattr(loader, "dataset", None))


def _of_dataset(prefix: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """A dataset, or those that torch's own ones are made of."""
    if type(dataset) is Subset:
        yield from _of_dataset(prefix, dataset.dataset)
    elif type(dataset) is ConcatDataset:
        for i, part in enumerate(dataset.datasets):
            yield from _of_dataset(f"{prefix}.{i}", part)
    else:
        yield prefix, dataset


def _checked(prefix: str, said: Any, who: str) -> dict[str, Any]:
    """What somebody says of themselves, under their prefix.

    Args:
        prefix: of the keys.
        said: values by key.
        who: says it, for messages.

    Raises:
        ConfigError: it cannot be compared with what a checkpoint says.
    """
    if not isinstance(said, Mapping):
        raise ConfigError(
            f"{who} gives {said!r:.60}: give a dictionary of what a resumed run "
            "must find unchanged."
        )
    for key in said:
        if not isinstance(key, str):
            raise ConfigError(f"{who} gives the key {key!r:.60}: keys are strings.")
    return {
        f"{prefix}.{key}": _comparable(value, f"{who} at {key!r}") for key, value in said.items()
    }


def _comparable(value: Any, where: str) -> Any:
    """A value as a checkpoint gives it back, so that equal ones compare equal."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_comparable(each, where) for each in value]
    raise ConfigError(
        f"{where} gives {value!r:.60}, a {type(value).__name__}, which cannot be compared at a "
        "resume: give a number, a string, None or a list of them; of anything else a digest, such "
        "as hashlib.sha256(...).hexdigest()."
    )


def _check_ranks_agree(keys: dict[str, Any], world: World) -> None:
    """A checkpoint keeps what rank 0 says, and each rank compares its own with it.

    Raises:
        ConfigError: naming the keys of which ranks say different things.
    """
    first, *others = everywhere = world.all_gather_object(keys)
    differing = {k for said in others for k in {**first, **said} if said.get(k) != first.get(k)}
    if differing:
        key = min(differing)
        values = ", ".join(f"{said.get(key)!r} on rank {i}" for i, said in enumerate(everywhere))
        raise ConfigError(
            f"run_identity() has to give the same on every rank; {key} is {values}. Leave out what "
            "is a rank's own."
        )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an optimizer's settings that can be compared."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                continue
            value = value.item()
        if isinstance(value, (bool, int, float, str, type(None))):
            found[key] = value
        elif isinstance(value, (tuple, list)):
            found[key] = str(tuple(value))
    return found


def _schedule_settings(scheduler: Any) -> dict[str, Any]:
    """The plain arguments a scheduler was made with, as far as its state holds them."""
    arguments = set(inspect.signature(type(scheduler).__init__).parameters)
    arguments -= {"optimizer", "last_epoch", "verbose"}
    found: dict[str, Any] = {}
    for key, value in scheduler.state_dict().items():
        name = key.removeprefix("_")
        if name not in arguments:
            continue
        if name == "schedulers":
            for i, inner in enumerate(getattr(scheduler, key)):
                found |= {f"{i}.{k}": v for k, v in _schedule_settings(inner).items()}
        elif isinstance(value, Counter):
            found[name] = str(sorted(value.elements()))
        elif isinstance(value, (list, tuple)):
            found[name] = str(list(value))
        elif isinstance(value, (bool, int, float, str, type(None))):
            found[name] = value
    return found


def _arguments(thing: Any) -> dict[str, Any]:
    """The plain settings of a loss: attributes of a module, keywords of a partial function."""
    if isinstance(thing, partial):
        return _plain(thing.keywords)
    if not isinstance(thing, torch.nn.Module):
        return {}
    own = {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "training"}
    return _plain(own)
