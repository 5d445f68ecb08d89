"""What an algorithm is: it turns rollouts into steps, and steps into losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import default_collate

from paceline import registry
from paceline.data.batches import count_first_dimension
from paceline.errors import ConfigError


@dataclass(frozen=True)
class Turn:
    """What the policy said in a context, as steps keep it.

    Attributes:
        context: what was there before.
        probe: what the policy said.
        context_ids: the token ids that the policy saw, [length] integers; None where there are no
            tokens.
        probe_ids: the token ids that the policy sampled, [length] integers.
    """

    context: Any
    probe: Any
    context_ids: np.ndarray | None = None
    probe_ids: np.ndarray | None = None


def turn_of(node: Any) -> Turn:
    """The turn of a node.

    Args:
        node: a `Node`, or an object of the user's with `context` and `probe`.
    """
    ids = (getattr(node, name, None) for name in ("context_ids", "probe_ids"))
    return Turn(node.context, node.probe, *ids)


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
    compares = False  # whether it needs the system's baseline
    ends_early = False  # whether `goes_on` may end an experience before its last pass
    redraws = 0  # how often an episode that `teaches_nothing` may be played anew

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

    def teaches_nothing(self, graph: Any) -> bool:
        """Whether a rollout is to be played anew, with other random numbers; asked with `redraws`.

        Args:
            graph: what the sampler's `rollout` returned.
        """
        return False

    def prepare(self, steps: Any) -> Any:
        """The steps of a whole experience, of all ranks, as they are trained on.

        Here belongs what depends on all of them, such as whitened advantages. It is called on every
        rank with the same steps, and has to return the same.

        Args:
            steps: a list of what `flatten` returned, or columns: a dictionary of tensors of
                [steps, ...].
        """
        return steps

    def check(self, sampler: Any) -> None:
        """Called before training, to refuse a sampler whose rollouts cannot be trained on.

        Args:
            sampler: plays the episodes.
        """

    def row(self, steps: Sequence[Any]) -> Mapping[str, float]:
        """What is logged of a whole experience, in its row.

        Args:
            steps: a list of what `flatten` returned, of all ranks.
        """
        return {}

    def goes_on(self, steps: Any) -> bool:
        """Whether another pass over an experience is made; asked only with `ends_early`.

        It is called in front of every pass but the first, without gradients, on every rank with the
        same steps and weights, and has to return the same.

        Args:
            steps: what `prepare` returned.
        """
        return True

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
