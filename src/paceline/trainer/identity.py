"""What a run is: the settings that a resumed run must find unchanged.

Each function in `_PARTS` gives some of them by dotted key; a further kind is one function more.
What users' own objects are, they say themselves in `run_identity()`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import ConcatDataset, Subset

from paceline.data.loader import loaders_by_name
from paceline.errors import ConfigError
from paceline.parallel.ddp import unwrap
from paceline.trainer.base import TrainerBase
from paceline.trainer.names import unique_names
from paceline.trainer.run import Run
from paceline.trainer.slots import own_slots, slots_of
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


def identity_of(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    """The settings that a resumed run must find unchanged, by dotted key.

    The models' own names and shapes are compared when their weights are loaded.

    Args:
        trainer: with its components and data.
        run: whose models are placed.
    """
    keys: dict[str, Any] = {}
    for part in _PARTS:
        _add(keys, part(trainer, run))
    return keys


def add_own_identity(trainer: TrainerBase, run: Run) -> None:
    """Adds to a run's identity what users' objects say in `run_identity()`.

    Args:
        trainer: that has all of them: `on_setup` may have made some.
        run: whose identity it is.

    Raises:
        ConfigError: something cannot be compared, is said twice, or differs between ranks.
    """
    own: dict[str, Any] = {}
    for prefix, thing in _speakers(trainer):
        say = getattr(thing, "run_identity", None)
        if callable(say):
            name = getattr(thing, "__qualname__", type(thing).__qualname__)
            _add(own, _checked(prefix, say(), f"{name}.run_identity(), of {prefix},"))
    _check_ranks_agree(own, run.world)
    _add(run.identity, own)


def _add(keys: dict[str, Any], more: dict[str, Any]) -> None:
    twice = keys.keys() & more.keys()
    if twice:
        raise ConfigError(
            f"the identity key {min(twice)!r} is given twice: rename it in the run_identity() that "
            "gives it."
        )
    keys.update(more)


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
    return {"loss_fn": _kind(loss_fn), **arguments}


def _data(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    who = f"the identity of {type(trainer.source).__name__}"
    return _checked("data", trainer.source.identity, who)


def _optimizers(trainer: TrainerBase, run: Run) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, optimizer in trainer.named_optimizers().items():
        keys[f"{name}.class"] = type(optimizer).__name__
        keys |= {f"{name}.{key}": value for key, value in _plain(optimizer.defaults).items()}
        # Some optimizers count in their groups as well.
        arguments = inspect.signature(type(optimizer)).parameters
        for i, group in enumerate(optimizer.param_groups):
            own = {k: v for k, v in group.items() if k in optimizer.defaults and k in arguments}
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
    return {key: _kind(one) for key, one in _in_own_slots(trainer) if not isinstance(one, known)}


def _in_own_slots(trainer: TrainerBase) -> Iterator[tuple[str, Any]]:
    """The components in the class's own slots, kept as attributes of the slots' names."""
    for name in own_slots(type(trainer)):
        held = getattr(trainer, name, None)
        if isinstance(held, list | tuple):
            yield from ((f"{name}.{i}", component) for i, component in enumerate(held))
        elif held is not None:
            yield name, held


# What Paceline compares by itself: each gives values by dotted key.
_PARTS: tuple[Callable[[TrainerBase, Run], dict[str, Any]], ...] = (
    _settings,
    _loss,
    _data,
    _optimizers,
    _own_slots,
)


def _speakers(trainer: TrainerBase) -> Iterator[tuple[str, Any]]:
    """The objects that may have a `run_identity()`, each with the prefix of its keys."""
    yield "trainer", trainer
    loss_fn = trainer.loss_fn
    yield "loss_fn", loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    yield from _of_loader("data", trainer.train_dataloader)
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        yield from _of_loader("validation" if name is None else f"validation.{name}", loader)
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


def _kind(thing: Any) -> str | None:
    if thing is None:
        return None
    if isinstance(thing, partial):
        thing = thing.func
    # FSDP2 makes a class of its own for what it shards.
    classes = (c for c in type(thing).__mro__ if not c.__module__.startswith("torch.distributed."))
    named = thing if hasattr(thing, "__qualname__") else next(classes)
    return f"{named.__module__}.{named.__qualname__}"


def _arguments(thing: Any) -> dict[str, Any]:
    """The plain settings of a loss: attributes of a module, keywords of a partial function."""
    if isinstance(thing, partial):
        return _plain(thing.keywords)
    if not isinstance(thing, torch.nn.Module):
        return {}
    own = {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "training"}
    return _plain(own)
