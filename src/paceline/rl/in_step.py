"""Sharded models in rollouts: ranks call them differently often, and every call takes all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from paceline.data.source import StopCollecting
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World


@contextmanager
def in_step(models: Sequence[torch.nn.Module], world: World) -> Iterator[None]:
    """Within it each rank calls language models as often as it likes, without gradients.

    In front of each call of a model that is spread over ranks all of them say which they are about
    to call. A rank that calls none of these reads one token with it, so that the others get the
    weights. At the end a rank waits this way until all are there.

    Args:
        models: all that are called, in the same order on every rank; of these the sharded ones
            matter.
        world: the ranks, all of which enter.
    """
    sharded = [model for model in models if any(map(is_dtensor, model.parameters()))]
    if world.size == 1 or not sharded:
        yield
        return
    together = _Together(sharded, world)
    handles: list[Any] = []
    for i, model in enumerate(sharded):
        handles.append(model.register_forward_pre_hook(together.before(i), prepend=True))
        handles.append(model.register_forward_hook(together.after(i)))
    try:
        yield
        together.finish()
    except StopCollecting:  # all ranks stop, but not all at the same call
        together.finish()
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Together:
    """What all ranks call at the same time: models by their number, the lower ones first."""

    def __init__(self, models: list[torch.nn.Module], world: World) -> None:
        self._models, self._world = models, world
        self._called: list[int] = []
        self._standing_in = False

    def before(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._standing_in:
                self._called = self._agree(number)
                self._stand_in(other for other in self._called if other < number)

        return hook

    def after(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._standing_in:
                self._stand_in(other for other in self._called if other > number)

        return hook

    def finish(self) -> None:
        while called := self._agree(None):
            self._stand_in(iter(called))

    def _agree(self, number: int | None) -> list[int]:
        """The numbers of the models that some rank is about to call."""
        flags = torch.tensor([int(i == number) for i in range(len(self._models))])
        return self._world.all_reduce(flags, "max").nonzero().flatten().tolist()

    @torch.no_grad()
    def _stand_in(self, numbers: Iterator[int]) -> None:
        self._standing_in = True
        try:
            for number in numbers:
                model = self._models[number]
                one = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
                model(input_ids=one, attention_mask=one, position_ids=one - 1)
        finally:
            self._standing_in = False
