"""Models without memory: modules whose parameters are fake from the moment they take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # other kinds of tensor stay what they are


@contextmanager
def parameters_made_fake(fake: FakeTensorMode) -> Iterator[None]:
    """Has every module that is made meanwhile hold parameters without memory.

    All else that a constructor does, it does for real: a model that fits nowhere can be built, one
    parameter at a time. A fake mode around the constructor would do as much, but would leave fake
    tensors in caches of the user's code, and bears no `.item()` or `.numpy()`.
    """
    converter = fake.fake_tensor_converter.meta_converter
    memo, converter.tensor_memo = converter.tensor_memo, _Recent()  # pyright: ignore
    handle = register_module_parameter_registration_hook(
        lambda module, name, value: None if value is None else fake_parameter(fake, value)  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        handle.remove()
        converter.tensor_memo = memo


def fake_parameter(fake: FakeTensorMode, parameter: Any) -> Any:
    """A parameter like this one, without memory; itself, if it is fake already."""
    if type(parameter) not in _PLAIN:
        return parameter
    with fake:
        empty = torch.empty_strided(
            parameter.size(), parameter.stride(), dtype=parameter.dtype, device="cpu"
        )
        made = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


@contextmanager
def meshes_made_real() -> Iterator[None]:
    """Has meshes that FSDP2 puts together, to shard split modules, be made of real numbers.

    A rank looks for its place among them.
    """
    put_together = DeviceMesh._concatenate

    def real(device_mesh_list: Any) -> DeviceMesh:
        with _disable_current_modes():
            return put_together(device_mesh_list)

    DeviceMesh._concatenate = staticmethod(real)
    try:
        yield
    finally:
        DeviceMesh._concatenate = staticmethod(put_together)


@contextmanager
def whole_shapes_found_apart() -> Iterator[None]:
    """Has DTensors work out the shape of a whole tensor apart from the fake mode that is entered.

    They do it with fake tensors, in that mode if there is one, though nobody ever has the whole.
    """
    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def apart(self: ShardingPropagator, op_schema: Any) -> Any:
        with _disable_current_modes():
            return find(self, op_schema)

    ShardingPropagator._propagate_tensor_meta_non_cached = apart
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = find


def make_fake(modules: Iterable[torch.nn.Module], fake: FakeTensorMode) -> dict[int, Any]:
    """Makes fake what modules hold for real: buffers, and parameters put there past their back.

    Returns:
        What became of parameters, by the `id` of what they were.
    """
    renewed: dict[int, Any] = {}
    for module in modules:
        for name, value in module._parameters.items():
            if type(value) in _PLAIN:
                made = renewed.setdefault(id(value), fake_parameter(fake, value))
                module._parameters[name] = made
        for name, value in module._buffers.items():
            if type(value) in _PLAIN:
                module._buffers[name] = fake.from_tensor(value)  # pyright: ignore
    return renewed


class _Recent(dict[Any, Any]):
    """A fake mode's memory of what it made of which tensor, for as long as it takes to look there.

    Torch's own keeps weak references, and a parameter to which there is one cannot be swapped, as
    `module.to(...)` does with fake ones.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > 8:
            del self[next(iter(self))]
