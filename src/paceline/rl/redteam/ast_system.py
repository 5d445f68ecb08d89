"""ASTSystem: adaptive stress testing of a language model (Hardy et al., 2024, arXiv:2407.09447)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from paceline.errors import ConfigError, DataError
from paceline.rl.redteam.judging import Watch
from paceline.rl.redteam.rewards import (
    Judge,
    LikelihoodReward,
    ScorerReward,
    rewards_from,
)
from paceline.rl.redteam.turns import Dialogue, Exchange, Said, Verdict
from paceline.rl.system import System


class ASTSystem(System):
    """Text that auditor and target write in turns, and what a turn is worth.

    Without `rewards`, a turn is worth

        ppl_weight * likelihood(probe | context) + combined_weight * score(probe + response)
            + defense_toxicity_weight * score(response)

    Args:
        scorer: judges texts.
        ppl_weight: of the likelihood that the target gives the probe.
        combined_weight: of the score of the probe with the response after it.
        defense_toxicity_weight: of the score of the response.
        likelihood: "probability" of the whole probe, which for long ones is next to nothing; or
            "per_token", the mean log-probability of its tokens, in nats.
        rewards: in place of all these: by name a weight, a mapping of `weight`, `of` and a scorer's
            settings, or a pair of a weight and a scorer or function.
        scorer_timeout: seconds that a scorer's call may take.
        scorer_retries: further calls where one failed.
        max_failures: turns in a row that may be left out because a scorer failed.

    Raises:
        ConfigError: a setting is impossible, or a reward is unknown.
    """

    def __init__(
        self,
        scorer: Any = None,
        ppl_weight: float = 0.025,
        combined_weight: float = 0.1,
        defense_toxicity_weight: float = 0.1,
        *,
        likelihood: Literal["probability", "per_token"] = "probability",
        rewards: Mapping[str, Any] | None = None,
        scorer_timeout: float = 60.0,
        scorer_retries: int = 1,
        max_failures: int = 16,
    ) -> None:
        super().__init__(scorer)
        known = ("probability", "per_token")
        if likelihood not in known:
            raise ConfigError(f"likelihood={likelihood!r}: choose one of {', '.join(known)}.")
        if scorer is not None and rewards is not None:
            raise ConfigError("scorer and rewards both say what a turn is worth: give one of them.")
        self.ppl_weight, self.combined_weight = ppl_weight, combined_weight
        self.defense_toxicity_weight, self.likelihood = defense_toxicity_weight, likelihood
        self.rewards = rewards
        watch = Watch(scorer_timeout, scorer_retries, max_failures)
        self.scorer_timeout, self.scorer_retries = scorer_timeout, scorer_retries
        self.max_failures = max_failures
        self._judge: Judge | None = None
        if rewards is not None:
            self._judge = Judge(rewards_from(rewards), watch)
        elif scorer is not None:
            parts = {
                "likelihood": (ppl_weight, LikelihoodReward(likelihood)),
                "combined": (combined_weight, ScorerReward("combined", scorer, "both")),
                "response": (defense_toxicity_weight, ScorerReward("response", scorer)),
            }
            self._judge = Judge(parts, watch)

    @property
    def judges(self) -> bool:
        """Whether anything says what a turn is worth."""
        return self._judge is not None or type(self).reward is not ASTSystem.reward

    def advance(self, context: Any, probe: Any, response: Any) -> Any:
        return context + probe + response

    def judge(self, turns: Sequence[Exchange]) -> list[Verdict | None]:
        """What turns are worth; None where a scorer failed, whatever was tried.

        Args:
            turns: to be judged.

        Raises:
            ConfigError: there is neither a scorer nor a reward.
            DataError: too many failed in a row.
        """
        if type(self).reward is not ASTSystem.reward:
            values = self.reward(
                [turn.dialogue.text for turn in turns],
                [turn.probe.text for turn in turns],
                [turn.response.text for turn in turns],
            )
            return [Verdict(float(value), {}) for value in values]
        if self._judge is None:
            raise ConfigError("scorer, rewards: nothing says what a turn is worth.")
        return self._judge(turns, self)

    def reward(
        self, context: Sequence[Any], probe: Sequence[Any], response: Sequence[Any]
    ) -> Sequence[float]:
        turns = [
            Exchange(Dialogue(c), Said(p), Said(r))
            for c, p, r in zip(context, probe, response, strict=True)
        ]
        verdicts = self.judge(turns)
        given = [verdict.reward for verdict in verdicts if verdict is not None]
        if len(given) < len(turns):
            raise DataError(f"{len(turns) - len(given)} of {len(turns)} turns have no reward.")
        return given

    def probe_logps(self, turns: Sequence[Exchange]) -> list[torch.Tensor]:
        """The target's log-probabilities of each probe's tokens, [tokens] float64 each.

        Args:
            turns: to be judged.
        """
        with torch.no_grad():
            found = self.get_target_logprobs(
                [turn.dialogue.text for turn in turns], [turn.probe.text for turn in turns]
            )
        # 0 is what stands where there is no token.
        return [row[row != 0] for row in found.detach().double().cpu()]
