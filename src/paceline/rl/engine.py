"""The one way to text: requests of token ids, and completions of token ids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paceline import registry
from paceline.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: of a completion, the end token among them.
        temperature: that divides the logits; 0 takes the most likely token.
        top_k: only so many of the most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have this probability.
        stop: texts that end a completion; they stay in it.

    Raises:
        ConfigError: a setting is out of its range.
    """

    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for holds, name, expected in (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "0 or above"),
            (self.top_k >= 0, "top_k", "0 for all tokens, or how many"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1, which takes all tokens"),
            (not isinstance(self.stop, str) and all(self.stop), "stop", "texts with characters"),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}.")


@dataclass(frozen=True)
class Request:
    """One completion that is wanted.

    Args:
        ids: the prompt's token ids, [length] int32.
        seed: of the completion's own random numbers: it is the same alone and among others.
        sampling: how tokens are chosen.
    """

    ids: np.ndarray
    seed: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    Attributes:
        ids: token ids, the end token among them, [length] int32.
        logprobs: their log-probabilities at the sampling temperature, before top_k and top_p,
            [length] float32: what `completion_logps` gives at this temperature, so that a ratio of
            the two is 1 as long as the policy is the same. Sampling at 0 records those at 1.
        ended: "end" at an end token, "stop" at a text of `Sampling.stop`, or "length".
        version: the policy's version, as the engine was told.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    ended: Literal["end", "stop", "length"]
    version: int = 0


class Engine:
    """Completes prompts.

    A subclass with a `name` registers itself, and recipes take it as `engine: {type: NAME}`; its
    constructor is given `model` and `tokenizer`.

    Attributes:
        version: the policy's version, which completions record; set by who samples.
        check_stop: to be called between tokens: raises `StopCollecting` if the run stops.
    """

    name: ClassVar[str]
    version: int = 0
    check_stop: Callable[[], None] = staticmethod(lambda: None)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named("engine", cls)

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, in the same order.

        Args:
            requests: what is wanted.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a generate(requests).")
