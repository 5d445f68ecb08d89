"""Models as they act: nothing that they do for a rollout leaves a trace in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from paceline.world.seeding import random_state_kept


@contextmanager
def acting(
    models: Iterable[torch.nn.Module], *around: AbstractContextManager[object]
) -> Iterator[None]:
    """Within it models are in eval mode and without gradients; afterwards all is as before.

    The modes of all modules and the global random generators are put back.

    Args:
        models: those that act.
        around: further contexts, such as the precision.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with random_state_kept(), torch.no_grad(), ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
