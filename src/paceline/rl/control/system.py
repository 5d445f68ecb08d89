"""A policy among environments, as algorithms see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from paceline.rl.control.actor_critic import Policy

_PART = "obs/"  # before the names of an observation's parts, among a batch's columns


class ControlSystem:
    """Evaluates the actions of a batch of transitions with the policy that is trained.

    Args:
        policy: gives it, as it is placed.
    """

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self._policy = policy

    def evaluate(self, batch: Mapping[str, torch.Tensor]) -> tuple[Any, Any, Any]:
        """Log-probabilities, entropies and values of [steps].

        Args:
            batch: columns of [steps, ...]: the observation as "obs", or its parts as "obs/NAME",
                and "action".
        """
        return self._policy()(observation_of(batch), batch["action"])


def columns_of(observation: Any) -> dict[str, torch.Tensor]:
    """An observation as columns.

    Args:
        observation: a tensor, or tensors by name.
    """
    if isinstance(observation, Mapping):
        return {_PART + name: value for name, value in observation.items()}
    return {"obs": observation}


def observation_of(batch: Mapping[str, torch.Tensor]) -> Any:
    """The observation that `columns_of` made columns of.

    Args:
        batch: columns.
    """
    if "obs" in batch:
        return batch["obs"]
    return {n.removeprefix(_PART): v for n, v in batch.items() if n.startswith(_PART)}
