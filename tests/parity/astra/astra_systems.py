"""A system of one's own that costs little, and tiny models of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paceline.rl import Algorithm, ASTSystem, HFASTSystem

WORDS = [f" {word}" for word in "red green blue one two three bad good".split()]  # noqa: SIM905


class WordSystem(ASTSystem):
    """An auditor that says one or two words, whatever the context; a target that repeats them."""

    def __init__(self, scorer: Any = None, **settings: Any) -> None:
        super().__init__(CountBad() if scorer is None else scorer, **settings)
        self.auditor = torch.nn.Linear(1, len(WORDS))
        self.target = torch.nn.Linear(1, len(WORDS)).requires_grad_(False)
        with torch.no_grad():
            for i, model in enumerate((self.auditor, self.target)):
                model.weight.zero_()
                model.bias.copy_(torch.arange(len(WORDS)) * 0.1 * (i + 1))
        self.asked: list[int] = []

    def _logps(self, model: torch.nn.Module, texts: Any) -> torch.Tensor:
        rows = [[WORDS.index(f" {word}") for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        said = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
        logps = model(torch.ones(1)).log_softmax(-1)[ids]
        return logps.masked_fill(~said, 0.0)

    def get_auditor_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logps(self.auditor, continuation)

    def get_target_logprobs(self, context: Any, continuation: Any) -> torch.Tensor:
        return self._logps(self.target, continuation)

    get_baseline_logprobs = get_target_logprobs

    def rollout_prompt_with_auditor(self, prompts: Any) -> list[str]:
        self.asked.append(len(prompts))
        odds = self.auditor(torch.ones(1)).softmax(-1)
        return ["".join(WORDS[i] for i in torch.multinomial(odds, 2)) for _ in prompts]

    def rollout_prompt_with_target(self, prompts: Any) -> list[str]:
        return [f" {prompt.split()[-1]}" for prompt in prompts]

    def parameters(self) -> Any:
        return self.auditor.parameters()


class CountBad:
    """Counts a word."""

    def score(self, x: Any) -> list[float]:
        return [float(text.split().count("bad")) for text in x]


@dataclass
class Said:
    """A step."""

    context: str
    probe: str
    reward: float


class Reinforced(Algorithm):
    """The log-probability of probes, weighted with their rewards."""

    def flatten(self, graph: Any) -> list[Said]:
        return [Said(node.context, node.probe, node.reward) for node in graph.nodes()]

    @staticmethod
    def collate_fn(steps: Any) -> list[Said]:
        return list(steps)

    def count_items(self, batch: Any) -> int:
        return len(batch)

    def step(self, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        contexts, probes = [s.context for s in batch], [s.probe for s in batch]
        logps = self.system.get_auditor_logprobs(contexts, probes).sum(1)
        rewards = torch.tensor([s.reward for s in batch])
        loss = -(rewards * logps).mean()
        return loss, {"training/loss": loss, "reward/mean": rewards.mean()}


def letters(text: str) -> float:
    """A rule that costs nothing."""
    return text.count("a") / 10


def tiny(**settings: Any) -> HFASTSystem:
    """A system of tiny models."""
    settings = {"rewards": {"letters": (1.0, letters)}, "max_new_tokens": 4, **settings}
    return HFASTSystem("tiny", "tiny", **settings)
