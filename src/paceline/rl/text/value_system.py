"""Systems whose auditor has a value head, for PPO on text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from paceline.rl.algorithm import Turn
from paceline.rl.system import ValueFunctionSystem
from paceline.rl.text.logprobs import Scored
from paceline.rl.text.policy_system import PolicySystem
from paceline.rl.text.value_head import add_value_head


class ValueHeadSystem(ValueFunctionSystem):
    """A system whose auditor has a value head; text and values come from one call of the model."""

    @abstractmethod
    def scored_with_values(self, turns: Sequence[Any]) -> Scored:
        """How likely the auditor finds what was said, with `values`.

        Args:
            turns: as for `auditor_logps`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs scored_with_values(turns).")

    def auditor_logps_and_values(self, turns: Sequence[Any]) -> tuple[Scored, torch.Tensor]:
        scored = self.scored_with_values(turns)
        assert scored.values is not None
        return scored, scored.values

    def value(self, context: Sequence[Any], continuation: Sequence[Any]) -> torch.Tensor:
        turns = [Turn(one, other) for one, other in zip(context, continuation, strict=True)]
        return self.auditor_logps_and_values(turns)[1]


class PolicyValueSystem(PolicySystem, ValueHeadSystem):
    """A `PolicySystem` with a value function: a linear layer on the model's last hidden states.

    The layer is the model's module `value_head`, made unless the model has one; it is 0 before
    training, and is trained, saved and placed with the model.

    Args:
        model: of transformers, otherwise as of `PolicySystem`.
        tokenizer: as of `PolicySystem`.
        temperature, scorer: as of `PolicySystem`.

    Raises:
        ConfigError: as of `PolicySystem`, or the model has no output embeddings.
    """

    name = "policy_value"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        temperature: float = 1.0,
        scorer: Any = None,
    ) -> None:
        super().__init__(model, tokenizer, temperature=temperature, scorer=scorer)
        add_value_head(self.auditor)

    def scored_with_values(self, turns: Sequence[Any]) -> Scored:
        return self._of(self.auditor, turns, values=True)
