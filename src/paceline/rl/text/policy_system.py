"""PolicySystem: one language model that completes prompts, and the frozen copy it began as."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.lm.loading import read_tokenizer, reading
from paceline.rl.named_models import model_and_tokenizer
from paceline.rl.system import System
from paceline.rl.text.logprobs import Scored, completion_logps


class PolicySystem(System):
    """A language model that is trained on rewards of what it completes prompts with.

    It is the auditor of this system; there is no target, and responses are empty. The baseline is
    a frozen copy of the model as it is before training, made only for an algorithm that needs it.

    Args:
        model: a folder, a hub id, "smollm2", "tiny" for a small random model of English words, or a
            causal language model of transformers, or one that is called alike.
        tokenizer: the model's; of a folder, a hub id or a name its own unless given.
        temperature: at which the model is sampled and trained.
        scorer: judges texts, for samplers that ask the system for rewards.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
    """

    name = "policy"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        temperature: float = 1.0,
        scorer: Any = None,
    ) -> None:
        super().__init__(scorer)
        if not temperature > 0:
            raise ConfigError(f"system.temperature={temperature}: expected above 0.")
        self.temperature = temperature
        self.model_id = str(model) if isinstance(model, str | Path) else None
        if self.model_id is not None:
            where = f"system.model={self.model_id!r}"
            model, own = model_and_tokenizer(self.model_id, where=where)
            tokenizer = own if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ConfigError("system.tokenizer: give the model's.")
        if isinstance(tokenizer, str | Path):
            with reading(f"system.tokenizer={str(tokenizer)!r}"):
                tokenizer = read_tokenizer(str(tokenizer))
        self.auditor: Any = model
        self.tokenizer: Any = tokenizer
        self.baseline: Any = None

    def keep_baseline(self) -> None:
        if self.baseline is None:
            self.baseline = copy.deepcopy(self.auditor).eval().requires_grad_(False)

    def auditor_logps(self, turns: Sequence[Any]) -> Scored:
        return self._of(self.auditor, turns)

    @torch.no_grad()
    def baseline_logps(self, turns: Sequence[Any]) -> Scored:
        self.keep_baseline()
        return self._of(self.baseline, turns)

    def _of(self, model: Any, turns: Sequence[Any], *, values: bool = False) -> Scored:
        pairs = [self._ids(turn) for turn in turns]
        return completion_logps(
            model,
            [context for context, _ in pairs],
            [probe for _, probe in pairs],
            temperature=self.temperature,
            values=values,
        )

    def _ids(self, turn: Any) -> tuple[Any, Any]:
        """Token ids of a context and of what followed: as they were sampled, where they were."""
        context = getattr(turn, "context_ids", None)
        probe = getattr(turn, "probe_ids", None)
        if context is None or probe is None:
            context = self.tokenizer(turn.context)["input_ids"]
            probe = self.tokenizer(turn.probe, add_special_tokens=False)["input_ids"]
        return np.asarray(context), np.asarray(probe)

    def get_auditor_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        return self._of(self.auditor, _turns(context, continuation)).logps

    def get_target_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        raise ConfigError("system: a PolicySystem has no target.")

    def get_baseline_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        return self.baseline_logps(_turns(context, continuation)).logps

    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> Sequence[Any]:
        raise ConfigError(
            "system: a PolicySystem is played by the sampler `prompts`, which completes token ids."
        )

    def rollout_prompt_with_target(self, prompts: Sequence[Any]) -> Sequence[Any]:
        return [""] * len(prompts)

    def advance(self, context: Any, probe: Any, response: Any) -> Any:
        return context + probe + response

    def reward(
        self, context: Sequence[Any], probe: Sequence[Any], response: Sequence[Any]
    ) -> Sequence[float]:
        if self.scorer is None:
            raise ConfigError("system.scorer: nothing says what a completion is worth.")
        return self.scorer.score(list(probe))

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.auditor.parameters()


class _Text:
    """A context and what followed."""

    def __init__(self, context: Any, probe: Any) -> None:
        self.context, self.probe = context, probe


def _turns(context: Sequence[Any], continuation: Sequence[Any]) -> list[_Text]:
    return [_Text(one, other) for one, other in zip(context, continuation, strict=True)]
