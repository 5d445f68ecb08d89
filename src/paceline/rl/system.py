"""What a system is: an auditor that is trained to probe a target, and what the probes are worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from paceline import registry
from paceline.rl.old_names import take_old_names


class System:
    """An auditor that probes a target, a baseline that it is compared with, and a reward.

    The first three methods return log-probabilities of [texts, tokens], 0 where there is no token.
    A subclass with a `name` registers itself, and recipes take it as `system: {type: NAME}`.

    Args:
        scorer: judges what was said.
    """

    name: ClassVar[str]

    def __init__(self, scorer: Any = None) -> None:
        self.scorer = scorer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        take_old_names(cls)
        registry.register_named("system", cls)

    @abstractmethod
    def get_auditor_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The auditor's log-probabilities of continuations, with gradients.

        Args:
            context: what was there before, one each.
            continuation: what follows.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_auditor_logprobs.")

    @abstractmethod
    def get_target_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The target's log-probabilities of continuations.

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_target_logprobs.")

    @abstractmethod
    def get_baseline_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The baseline's log-probabilities of continuations.

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_baseline_logprobs.")

    @abstractmethod
    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """What the auditor says next, without the prompt.

        Args:
            prompts: what was said before, one each.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs rollout_prompt_with_auditor.")

    @abstractmethod
    def rollout_prompt_with_target(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """What the target responds, without the prompt.

        Args:
            prompts: what was said before, one each.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs rollout_prompt_with_target.")

    @abstractmethod
    def advance(self, context: Any, probe: Any, response: Any) -> Any:
        """The context after a turn.

        Args:
            context, probe, response: of the turn.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs advance.")

    @abstractmethod
    def reward(
        self, context: Sequence[Any], probe: Sequence[Any], response: Sequence[Any]
    ) -> Sequence[float]:
        """What turns are worth, one number each.

        Args:
            context, probe, response: of the turns.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs reward.")

    @abstractmethod
    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters that are trained."""
        raise NotImplementedError(f"{type(self).__qualname__} needs parameters.")


class ValueFunctionSystem(System):
    """A system with a value function, for algorithms that need one."""

    @abstractmethod
    def value(self, context: Sequence[Any], continuation: Sequence[Any]) -> torch.Tensor:
        """The values before each token of the continuations, [texts, tokens].

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs value.")
