"""Models without memory: modules whose parameters become fake when they are registered."""

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

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # other kinds of tensors are not changed


@contextmanager
def parameters_made_fake(fake: FakeTensorMode) -> Iterator[None]:
    """Within the block, modules that are constructed hold parameters without memory.

    Everything else in a constructor is real, so a model that fits nowhere can be built, one
    parameter at a time. A fake mode around the constructor would also work, but would leave fake
    tensors in caches of the user's code, and does not support `.item()` or `.numpy()`.
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
    """Converts a parameter to a fake one.

    Args:
        fake: the mode that the fake parameter belongs to.
        parameter: of any shape; one that is already fake is returned as it is.

    Returns:
        A parameter of the same shape and dtype, without memory.
    """
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
    """Within the block, meshes that FSDP2 concatenates have real ranks, not fake ones.

    FSDP2 does so to shard modules under tensor parallelism, and looks up this rank in the mesh.
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
    """Makes DTensors compute the shape of a whole tensor outside of the current fake mode.

    They use fake tensors for it, in the current mode if there is one, where the whole tensor would
    be counted although no rank ever holds it.
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
    """Makes real tensors of modules fake: buffers, and parameters that bypassed registration.

    Args:
        modules: the modules to change.
        fake: the mode that the fake tensors belong to.

    Returns:
        The fake parameters, by the `id` of the real ones.
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
    """A fake mode's cache from real to fake tensors that forgets each entry after its use.

    Torch's own keeps weak references, and `module.to(...)` cannot swap a fake parameter that has
    one.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > 8:
            del self[next(iter(self))]
