"""A system without a language model: the auditor's words are bits, the target answers with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from paceline.rl import Graph, Node, Sampler, System
from paceline.world.seeding import stream

LENGTH = 4


class Bits(nn.Module):
    """Bernoulli logits of the next bit by place and context length."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(8, LENGTH))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[rows % 8]


class Game(System):
    """Worth the share of ones in a probe; contexts and probes are texts of 0 and 1."""

    def __init__(self, auditor: nn.Module | None = None) -> None:
        super().__init__()
        self.auditor = Bits() if auditor is None else auditor
        self.baseline = Bits().requires_grad_(False)
        self.generator: torch.Generator | None = None

    def _logprobs(self, model: Any, context: Sequence[str], probe: Sequence[str]) -> torch.Tensor:
        logits = model(torch.tensor([len(one) // LENGTH for one in context]))
        bits = torch.tensor([[int(bit) for bit in one] for one in probe]).float()
        return -nn.functional.binary_cross_entropy_with_logits(logits, bits, reduction="none")

    def get_auditor_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logprobs(self.auditor, context, continuation)

    def get_baseline_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logprobs(self.baseline, context, continuation)

    get_target_logprobs = get_baseline_logprobs

    def rollout_prompt_with_auditor(self, prompts: Sequence[str]) -> list[str]:
        logits = self.auditor(torch.tensor([len(one) // LENGTH for one in prompts]))
        drawn = torch.rand(logits.shape, generator=self.generator) < logits.sigmoid()
        return ["".join(str(int(bit)) for bit in row) for row in drawn]

    def rollout_prompt_with_target(self, prompts: Sequence[str]) -> list[str]:
        return [one[-1] * LENGTH for one in prompts]

    def advance(self, context: str, probe: str, response: str) -> str:
        return context + probe + response

    def reward(self, context: Any, probe: Sequence[str], response: Any) -> list[float]:
        return [one.count("1") / LENGTH for one in probe]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.auditor.parameters()


class GameSampler(Sampler):
    """Trees of a width and a depth."""

    def __init__(self, system: Any, *, width: int = 2, depth: int = 2, episodes: int = 4) -> None:
        super().__init__(system, episodes=episodes)
        self.width, self.depth = width, depth

    def rollout(self, seed: int | None = None) -> Graph:
        key = 0 if seed is None else seed
        self.system.generator = torch.Generator().manual_seed(stream(key, "probe") >> 1)
        return Graph("", self._turns("", self.depth))

    def _turns(self, context: str, depth: int) -> list[Node]:
        if depth == 0:
            return []
        contexts = [context] * self.width
        probes = self.system.rollout_prompt_with_auditor(contexts)
        said = [a + b for a, b in zip(contexts, probes, strict=True)]
        responses = self.system.rollout_prompt_with_target(said)
        rewards = self.system.reward(contexts, probes, responses)
        return [
            Node(context, probe, response, reward,
                 self._turns(self.system.advance(context, probe, response), depth - 1),
                 version=self.version)
            for probe, response, reward in zip(probes, responses, rewards, strict=True)
        ]  # fmt: skip
