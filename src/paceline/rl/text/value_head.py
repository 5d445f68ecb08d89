"""A value function on a causal language model: one number for each token, from what it has read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.parallel.ddp import unwrap

HEAD = "value_head"
"""The name of the head among a model's modules."""


class ValueHead(nn.Module):
    """Values from a model's last hidden states; 0 before training.

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values of [...] from hidden states of [..., width]."""
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


def add_value_head(model: Any) -> None:
    """Gives a model a value head, as its module `value_head`, unless it has one.

    It is trained, saved and placed with the model.

    Args:
        model: causal, of transformers.

    Raises:
        ConfigError: it has no output embeddings whose input the head could read.
    """
    model = unwrap(model)
    if isinstance(getattr(model, HEAD, None), nn.Module):
        return
    output = _output_of(model)
    setattr(model, HEAD, ValueHead(output.weight.shape[-1]).to(output.weight.device))


@contextmanager
def values_seen(model: Any) -> Iterator[list[torch.Tensor]]:
    """Within it, each call of a model adds its head's values, in the places of the logits.

    The head is called within the model, as all its modules are, so any placement works.

    Args:
        model: with a value head.

    Raises:
        ConfigError: it has no output embeddings.
    """
    model = unwrap(model)
    seen: list[torch.Tensor] = []

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(getattr(model, HEAD)(inputs[0]))

    handle = _output_of(model).register_forward_pre_hook(read)
    try:
        yield seen
    finally:
        handle.remove()


def _output_of(model: Any) -> Any:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        raise ConfigError(
            f"a value head reads what the output embeddings of a model do, and a "
            f"{type(model).__qualname__} has none (get_output_embeddings)."
        )
    return output
