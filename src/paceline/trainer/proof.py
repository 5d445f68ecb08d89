"""The proof that a run's state can be saved and loaded back, before it matters.

What exists before the first step is tried then; what a first step makes (moments, counters) right
after it. Each part of the state goes through the codec and back into the same live object, a share
of its tensors at a time, and has to be what it was. The weights, moments and attributes themselves
are as before afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paceline.checkpoint.codec import decode, encode
from paceline.checkpoint.state import (
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    parameter_names,
)
from paceline.errors import StateError, some
from paceline.trainer.base import TrainerBase
from paceline.trainer.names import unique_names
from paceline.trainer.ranks_alike import check_state_alike
from paceline.trainer.run import Run
from paceline.world.dtensors import copied, local_part, reshard

_SHARE = 1 << 28
"""Bytes of a part's tensors that are copied at a time, at least; at most an eighth of them are."""

_LOOKED_INTO = 1000
"""Longer containers are not searched for objects with a state."""

_EDGE = 64
"""Elements of a tensor that are changed, to see them come back."""

_SIZED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Part:
    """One object's state.

    Attributes:
        path: of its state in the tree.
        holder: the object.
        state, load: give its state, and take it back.
        in_place: whether `load` writes into the tensors that `state` gives, or replaces them.
    """

    path: tuple[str, ...]
    holder: Any
    state: Callable[[], Any]
    load: Callable[[Any], None]
    in_place: bool = False


def prove(trainer: TrainerBase, run: Run) -> None:
    """Saves and loads all of a run's state in memory.

    Where each rank reads its own data, and where rows are, is part of the state as well, but only
    a new process can go back to it.

    Args:
        trainer: whose state it is.
        run: between two windows.

    Raises:
        StateError: something could be saved and never loaded; the message gives its path.
    """
    reshard(trainer.named_models().values())
    _check_made(trainer, run)
    parts = list(_parts(trainer, run))
    of_users = [part for part in parts if part.path[0] in ("callbacks", "objects")]
    check_state_alike(run, {".".join(p.path): (p.holder, p.state()) for p in of_users})
    for part in parts:
        _prove(part, staged=run.placement.pipeline is not None)
    run.proven = _with_moments(trainer)


def prove_what_is_new(trainer: TrainerBase, run: Run) -> None:
    """Calls `prove` before a save if an optimizer has taken its first step since the last proof.

    Args:
        trainer: whose state it is.
        run: between two windows.
    """
    if _with_moments(trainer) - run.proven:
        prove(trainer, run)


def _with_moments(trainer: TrainerBase) -> set[str]:
    return {name for name, each in trainer.named_optimizers().items() if each.state}


def prove_first_step(trainer: TrainerBase, run: Run) -> None:
    """Has `prove` called once more, right after the first step that this process takes.

    Args:
        trainer: whose state it is.
        run: that has not begun its first window.
    """
    listeners = run.events.on_step_end

    def once(row: dict[str, Any]) -> None:
        run.events.on_step_end = listeners
        prove(trainer, run)

    run.events.on_step_end = (*listeners, once)


def _parts(trainer: TrainerBase, run: Run) -> Iterator[_Part]:
    models = trainer.named_models()
    for name, model in models.items():
        load = partial(load_tensors, model)
        yield _Part(("models", name), model, model.state_dict, load, in_place=True)
    names = parameter_names(models)
    for name, optimizer in trainer.named_optimizers().items():
        state = partial(optimizer_state, optimizer, names)
        load = partial(load_optimizer_state, optimizer, names=names)
        yield _Part(("optimizers", name), optimizer, state, load, in_place=True)
    named: dict[str, Mapping[str, Any]] = {
        "schedulers": trainer.named_schedulers() or {},
        "callbacks": unique_names(trainer.callbacks),
        "objects": trainer.named_objects(),
    }
    for kind, things in named.items():
        for name, thing in things.items():
            yield _Part((kind, name), thing, thing.state_dict, thing.load_state_dict)
    for name, thing in (("scaler", run.scaler), ("monitor", trainer.metric_monitor)):
        if thing is not None:
            yield _Part((name,), thing, thing.state_dict, thing.load_state_dict)


def _check_made(trainer: TrainerBase, run: Run) -> None:
    """Refuses what training has made and a resumed run would not have.

    Raises:
        StateError: there are such optimizers or parameters.
    """
    models, optimizers = trainer.named_models(), trainer.named_optimizers()
    where = [f"optimizers.{name}" for name in optimizers.keys() ^ run.made.groups.keys()]
    for name, changed in run.made.changes(models, optimizers)["models"].items():
        before = run.made.models[name].parameters
        now = {key for key, _ in models[name].named_parameters(remove_duplicate=False)}
        where += [f"models.{name}.{key}" for key in changed["tensors"] if key in before | now]
    if where:
        raise StateError(
            f"{some(where)}: training has made or replaced it after the run was set up, so a "
            "resumed run could not load it. Make it before: in configure() or on_setup."
        )


def _prove(part: _Part, *, staged: bool) -> None:
    """Saves and loads one part.

    Raises:
        StateError: it cannot be stored or loaded, or is another one afterwards.
    """
    where = ".".join(part.path)
    with torch.no_grad():
        live, skeleton = encode(part.state(), part.path, elsewhere=staged)
        if not live and not skeleton:
            return
        text = json.dumps(skeleton)
        for names in _shares(live):
            copies = {name: copied(live[name]) for name in names}
            given = decode({**live, **copies}, json.loads(text))
            with _as_before(part.holder):
                turned = [live[name] for name in names] if part.in_place else []
                try:
                    _turn(turned)
                    _load(part, given, where)
                    again, left = encode(part.state(), part.path, elsewhere=staged)
                    _compare(live, again, copies, where)
                    if json.dumps(left) != text:
                        raise StateError(_other(_difference(json.loads(text), left, where)))
                finally:
                    for name, copy in copies.items() if turned else ():
                        _put_back(live[name], copy)


def _load(part: _Part, given: Any, where: str) -> None:
    try:
        part.load(given)
    except Exception as error:
        raise StateError(
            f"{where}: its state_dict() can be saved and not loaded back: {type(error).__name__}: "
            f"{error}. Its load_state_dict() has to take what state_dict() returns."
        ) from error


def _compare(
    live: Mapping[str, torch.Tensor],
    again: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor],
    where: str,
) -> None:
    """Compares what was loaded with what was given.

    Args:
        live: the tensors that were saved.
        again: those that the part gives now.
        copies: what was given in place of some.
        where: the part's path.

    Raises:
        StateError: they differ.
    """
    for name in sorted(live.keys() ^ again.keys()):
        raise StateError(_other(name.replace("/", ".")))
    for name, copy in copies.items():
        if not _same(copy, again[name]):
            raise StateError(_other(name.replace("/", ".")))


def _other(path: str) -> str:
    return (
        f"{path}: is saved, and is another value once it is loaded back: a resumed run would train "
        "differently. Have load_state_dict() restore all that state_dict() returns."
    )


def _difference(one: Any, other: Any, path: str) -> str:
    """The path to the first difference of two skeletons."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other or one[key] != other[key]:
                return _difference(one.get(key), other.get(key), f"{path}.{key}")
    return path


def _shares(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names of a part's tensors, in shares of memory; one without any if there is none."""
    sizes = {name: local_part(tensor).nbytes for name, tensor in tensors.items()}
    most = max(_SHARE, sum(sizes.values()) // 8)
    share: list[str] = []
    held = 0
    for name, size in sizes.items():
        if share and held + size > most:
            yield share
            share, held = [], 0
        share.append(name)
        held += size
    yield share


# A value that is loaded cannot be told from one that was never lost: so some bits are turned first.


def _bits(tensor: torch.Tensor) -> torch.Tensor | None:
    """The same memory as integers; None for what has none of its own."""
    local = local_part(tensor)
    if local.is_meta or local.numel() == 0:
        return None
    if local.is_complex():
        local = torch.view_as_real(local)
    return local.view(_SIZED[local.element_size()])


def _edge(tensor: torch.Tensor) -> torch.Tensor | None:
    """The first elements of a tensor, as integers."""
    bits = _bits(tensor)
    if bits is None or bits.is_shared():  # other processes read that
        return None
    return bits.view(-1)[:_EDGE] if bits.is_contiguous() else bits


def _turn(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        edge = _edge(tensor)
        if edge is not None:
            edge.bitwise_not_()


def _put_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    edge, before = _edge(tensor), _edge(copy)
    if edge is not None and before is not None:
        edge.copy_(before)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    left, right = _bits(one), _bits(other)
    if left is None or right is None:
        return left is right and one.shape == other.shape
    return one.dtype == other.dtype and torch.equal(left, right.to(left.device))


@contextmanager
def _as_before(holder: Any) -> Iterator[None]:
    """Gives an object, and those with a state of their own in it, their attributes back."""
    kept = [(place, dict(place)) for place in _places(holder, {})]
    try:
        yield
    finally:
        for place, before in kept:
            for name in place.keys() - before.keys():
                del place[name]
            place.update(before)


def _places(thing: Any, seen: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """Where an object, and those with a state of their own in it, keep attributes."""
    if id(thing) in seen or isinstance(thing, (TrainerBase, type)):
        return
    seen[id(thing)] = thing
    if isinstance(thing, (list, tuple, dict)) and len(thing) <= _LOOKED_INTO:
        for value in thing.values() if isinstance(thing, dict) else thing:
            yield from _places(value, seen)
    elif isinstance(thing, torch.nn.Module):
        for module in thing.modules():
            yield from (vars(module), module._parameters, module._buffers)
    elif hasattr(thing, "__dict__") and hasattr(thing, "load_state_dict"):
        yield vars(thing)
        for value in vars(thing).values():
            yield from _places(value, seen)
