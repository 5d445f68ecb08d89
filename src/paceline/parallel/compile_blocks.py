"""Compiling a model: whole, or block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paceline.parallel.blocks import needed_blocks, repeated_blocks


def compile_blocks(
    module: torch.nn.Module, name: str, which: object, *, staged: bool = False
) -> list[torch.nn.Module]:
    """Compiles each repeated block of a model; blocks of a kind share what is compiled.

    A block's hooks stay outside, those by which it is sharded above all: a model is compiled block
    by block before it is sharded. Parameters keep their names.

    Args:
        module: the model.
        name: its name, for messages.
        which: "blocks", or True for a model that is compiled as one if it has none.
        staged: whether no process calls the model as one.

    Returns:
        What is compiled; each has a `forward` of its own in its `__dict__` now.

    Raises:
        ConfigError: it is to be compiled by its blocks, is trained, and has none.
    """
    if which != "blocks" and not staged:
        parts = repeated_blocks(module) or [module]
    elif any(p.requires_grad for p in module.parameters()):
        parts = needed_blocks(module, name, f"compile={which!r}")
    else:
        parts = repeated_blocks(module)
    for part in parts:
        vars(part)["forward"] = torch.compile(part.forward)
    return parts


@contextmanager
def memory_budget(budget: float) -> Iterator[None]:
    """Has what is compiled within keep this part of its activations, and compute the rest twice.

    Args:
        budget: from 0, a compiled region's inputs alone, to 1, all that it would keep by itself.
    """
    from torch._functorch import config

    with config.patch(activation_memory_budget=budget):
        yield
