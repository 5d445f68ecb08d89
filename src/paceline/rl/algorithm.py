"""What an algorithm is: it turns rollouts into steps, and steps into losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils.data import default_collate

from paceline import registry
from paceline.data.batches import count_first_dimension
from paceline.errors import ConfigError


class Algorithm:
    """Turns rollouts into steps, and batches of steps into losses.

    A subclass with a `name` registers itself, and recipes take it as `algorithm: {type: NAME}`.

    Args:
        system: whose policy is trained.
        passes: how often each experience is trained on.
        minibatch: steps of all ranks in one optimizer step; None for the whole experience.

    Raises:
        ConfigError: a setting is no positive number.
    """

    name: ClassVar[str]

    def __init__(self, system: Any, *, passes: int = 1, minibatch: int | None = None) -> None:
        for setting, value in (("passes", passes), ("minibatch", minibatch)):
            if value is not None and value < 1:
                raise ConfigError(f"algorithm.{setting}={value}: expected a number of at least 1.")
        self.system = system
        self.passes, self.minibatch = passes, minibatch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named("algorithm", cls)

    def flatten(self, graph: Any) -> Sequence[Any]:
        """The steps of one rollout.

        Args:
            graph: what the sampler's `rollout` returned.

        Returns:
            Dataclasses, tuples, dictionaries or tensors. In a dataclass or dictionary are tensors,
            arrays, numbers and texts, which a checkpoint can hold.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a flatten(graph).")

    def prepare(self, steps: Any) -> Any:
        """The steps of a whole experience, of all ranks, as they are trained on.

        Here belongs what depends on all of them, such as whitened advantages. It is called on every
        rank with the same steps, and has to return the same.

        Args:
            steps: a list of what `flatten` returned, or columns: a dictionary of tensors of
                [steps, ...].
        """
        return steps

    @staticmethod
    def collate_fn(steps: Sequence[Any]) -> Any:
        """A batch of steps; by default torch's `default_collate`.

        Args:
            steps: some of what `flatten` returned.
        """
        return default_collate(list(steps))

    def count_items(self, batch: Any) -> Any:
        """What the loss of a batch is a mean over; by default its number of steps.

        Args:
            batch: what `collate_fn` returned, or columns.

        Returns:
            A number, or a tensor of one element. With it a loss is weighted among other batches'.
        """
        return count_first_dimension(batch)

    @abstractmethod
    def step(self, batch: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """The loss of a batch, a mean over its items, and what is to be logged.

        Args:
            batch: what `collate_fn` returned, or columns, on the device.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a step(batch).")
