"""Models made on the meta device: memory and values, when it is known where they are to be.

A model of a size that no process could hold is made `with torch.device("meta")`, where tensors have
a shape and no memory. Sharded, its repeated blocks get theirs one after the other, each sharded
before the next one comes. Values are drawn whole, from a stream that depends on the seed and the
block alone, so that they are the same at any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from paceline.errors import ConfigError, some
from paceline.parallel.blocks import repeated_blocks
from paceline.parallel.outline import is_outlined
from paceline.parallel.pipeline_stages import is_given_up
from paceline.world.dtensors import is_dtensor
from paceline.world.seeding import mix, seed_everything, stream


class Materializer:
    """Gives a model's meta tensors memory and values, unit by unit or all at once.

    A module with `init_weights()` fills all of itself; any other its own tensors by
    `reset_parameters()`, as torch's do, after its children have filled theirs. Tensors stay the
    objects they are: ties hold, and optimizers keep what they were given.

    Args:
        module: the model; one without meta tensors is left alone.
        name: its name, for messages.
        device: where its tensors are to be.
        seed: the run's.
    """

    def __init__(self, module: torch.nn.Module, name: str, device: torch.device, seed: int) -> None:
        self._module = module
        self._name = name
        self._device = device
        self._seed = seed
        self.needed = any(tensor.is_meta for tensor in _tensors(module))

    def all(self) -> None:
        """Materialises the whole model."""
        if self.needed:
            for unit in (*repeated_blocks(self._module), self._module):
                self(unit)

    @torch.no_grad()
    def __call__(self, unit: torch.nn.Module) -> None:
        """Materialises a repeated block, or with the model itself what is left of it.

        Raises:
            ConfigError: nothing gave a tensor its values.
        """
        if _own_way(self._module, whole=True):
            unit = self._module  # which fills itself in one go
        if not self.needed:
            return
        self._move(unit)
        empty = {id(t): t for t in _tensors(unit) if t.is_meta and not is_given_up(t)}
        if not empty:
            return
        marks = {key: _materialize(tensor, self._device) for key, tensor in empty.items()}
        if any(is_outlined(tensor) for tensor in empty.values()):
            return  # another model has the values
        parts = [id(part) for part in self._module.modules()]
        seed_everything(mix(stream(self._seed, "init"), parts.index(id(unit))))
        _fill(unit, set(empty), set(empty))
        names = {id(t): f"{self._name}.{key}" for key, t in _named_tensors(self._module)}
        unfilled = [names[key] for key, is_marked in marks.items() if key in names and is_marked()]
        unfilled += [names[key] for key, tensor in empty.items() if tensor.is_meta]
        if unfilled:
            raise ConfigError(
                f"made on the meta device, and given no values: {some(unfilled)}. "
                "A module there needs a reset_parameters() that fills all of its parameters and "
                "buffers, or init_weights() that fills its parts' too."
            )

    def _move(self, unit: torch.nn.Module) -> None:
        """What has values already goes to the device as it is."""
        for tensor in _tensors(unit):
            if not tensor.is_meta and not is_dtensor(tensor):
                tensor.data = tensor.data.to(self._device)


def without_a_way(model: torch.nn.Module) -> list[str]:
    """Names of meta tensors that no method of their module, nor of one around it, could fill."""
    meta = [(name, t) for name, t in _named_tensors(model) if t.is_meta and not is_given_up(t)]
    names = {id(t): name for name, t in meta}
    for module in model.modules():
        if _own_way(module, whole=True):
            filled = _tensors(module)
        elif _own_way(module):
            filled = _own_tensors(module)
        else:
            continue
        for tensor in filled:
            names.pop(id(tensor), None)
    return list(names.values())


def _fill(module: torch.nn.Module, pending: set[int], empty: set[int]) -> None:
    """Fills what is pending of a module and its parts, as their constructors would have done."""
    if not any(id(tensor) in pending for tensor in _tensors(module)):
        return
    way = _own_way(module, whole=True)
    if way is not None:
        filled = [*_tensors(module)]
    else:
        for child in module.children():
            _fill(child, pending, empty)
        way, filled = _own_way(module), [*_own_tensors(module)]
    mine = {id(tensor) for tensor in filled} & pending
    if not mine or way is None:
        return
    # A tied tensor keeps the values of the module that came first.
    kept = [(t, t.clone()) for t in filled if id(t) in empty and id(t) not in pending]
    way()
    for tensor, value in kept:
        tensor.copy_(value)
    pending -= mine


def _own_way(module: torch.nn.Module, *, whole: bool = False) -> Callable[[], Any] | None:
    """The method by which a module fills all of itself (`whole`), or its own tensors."""
    names = ("init_weights",) if whole else ("reset_parameters", "_reset_parameters")
    ways: list[Any] = [getattr(module, name, None) for name in names]
    return next((way for way in ways if callable(way)), None)


def _materialize(tensor: torch.Tensor, device: torch.device) -> Callable[[], bool]:
    """Gives a tensor memory, marked as empty; what is returned tells whether it still is."""
    real = torch.empty_like(tensor, device=device)
    if real.is_floating_point() or real.is_complex():
        real.fill_(torch.nan)
    if isinstance(tensor, torch.nn.Parameter):
        real = torch.nn.Parameter(real, requires_grad=tensor.requires_grad)
    vars(real).update(vars(tensor))
    torch.utils.swap_tensors(tensor, real)
    version = tensor._version

    def is_marked() -> bool:
        if tensor.is_floating_point() or tensor.is_complex():
            return bool(tensor.isnan().any())
        return tensor.numel() > 0 and tensor._version == version

    return is_marked


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    own = chain(module._parameters.values(), module._buffers.values())
    return (tensor for tensor in own if tensor is not None)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def _named_tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
