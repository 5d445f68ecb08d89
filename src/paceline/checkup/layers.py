"""A model's modules: names, types, output shapes and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from paceline.data.batches import describe


@dataclass(frozen=True)
class Layer:
    """A module of a model.

    Attributes:
        name: its dotted name, which begins with the model's.
        depth: 0 for the model itself.
        kind: its class.
        output: the result of its first call, in words; empty if it was not called.
        parameters: the number of parameters in it and its submodules, each counted once.
        trainable: the number of trainable ones.
    """

    name: str
    depth: int
    kind: str
    output: str
    parameters: int
    trainable: int


@contextmanager
def outputs_noted(models: Mapping[str, torch.nn.Module]) -> Iterator[dict[torch.nn.Module, str]]:
    """Within the block, records the result of each module's first call."""
    outputs: dict[torch.nn.Module, str] = {}

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(module, describe(output))

    hooks = [
        module.register_forward_hook(note)
        for model in models.values()
        for module in set(model.modules())
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(
    models: Mapping[str, torch.nn.Module], outputs: Mapping[torch.nn.Module, str]
) -> list[Layer]:
    """Every module in the order of the models' attributes.

    Args:
        models: by name.
        outputs: from `outputs_noted`.
    """
    found = []
    for model_name, model in models.items():
        for name, module in model.named_modules():
            sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
            found.append(
                Layer(
                    f"{model_name}.{name}" if name else model_name,
                    name.count(".") + 1 if name else 0,
                    type(module).__name__,
                    outputs.get(module, ""),
                    sum(size for size, _ in sizes),
                    sum(size for size, trained in sizes if trained),
                )
            )
    return found
