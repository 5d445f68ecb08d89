"""What a trained policy is compared with: one that draws actions or tokens uniformly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paceline.rl.control.actor_critic import Policy
from paceline.rl.engine import Completion, Engine, Request
from paceline.rl.text.local import end_tokens
from paceline.world.seeding import stream


class RandomActions(Policy):
    """Draws each episode's actions from its space, from a stream of the episode's own.

    Args:
        space: of actions.
        seed: of all streams.
    """

    def __init__(self, space: Any, seed: int) -> None:
        super().__init__()
        self._space, self._seed = space, seed
        self._spaces: list[Any] = []

    @property
    def actions(self) -> RandomActions:
        """What makes actions those of the environment."""
        return self

    def begin_episodes(self, numbers: Sequence[int]) -> None:
        """Episodes begin, one in each environment.

        Args:
            numbers: of the episodes, over all ranks.
        """
        self._spaces = [copy.deepcopy(self._space) for _ in numbers]
        for space, number in zip(self._spaces, numbers, strict=True):
            space.seed(stream(self._seed, "eval", int(number)) % 2**32)

    def act(self, obs: Any, deterministic: bool = False) -> tuple[Any, Any, Any]:
        drawn = np.stack([space.sample() for space in self._spaces])
        nothing = torch.zeros(len(drawn))
        return drawn, nothing, nothing

    def to_environment(self, action: Any) -> Any:
        """The actions, as they were drawn.

        Args:
            action: of [envs, ...].
        """
        return action


class RandomTokens(Engine):
    """Completes prompts with tokens that are drawn uniformly, up to an end token.

    Args:
        model: whose vocabulary it is.
        tokenizer: the model's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._words = min(int(model.get_input_embeddings().num_embeddings), len(tokenizer))
        self._ends = end_tokens(model, tokenizer)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        drawn = np.random.default_rng(request.seed % 2**64).integers(
            self._words, size=request.sampling.max_new_tokens
        )
        ends = np.flatnonzero(np.isin(drawn, list(self._ends)))
        ids = drawn[: int(ends[0]) + 1] if len(ends) else drawn
        logprobs = np.full(len(ids), -np.log(self._words), np.float32)
        how = "end" if len(ends) else "length"
        return Completion(ids.astype(np.int32), logprobs, how, self.version)
