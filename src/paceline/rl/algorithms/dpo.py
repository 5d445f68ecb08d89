"""Direct preference optimization (Rafailov et al., 2023, 2305.18290) and IPO (2310.12036)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.losses import dpo_loss, sequence_logps
from paceline.losses.masked import check_choice
from paceline.rl.algorithm import Turn
from paceline.rl.algorithms.compared import Compared
from paceline.rl.algorithms.policy_gradient import (
    check_groups,
    count,
    plain,
    usable,
)


@dataclass
class DPOStep:
    """A pair of turns in one context.

    Attributes:
        prefix: the context.
        suffix_pos: what is preferred.
        suffix_neg: what is not.
        prefix_ids, pos_ids, neg_ids: their token ids, [length] integers; None without tokens.
    """

    prefix: Any
    suffix_pos: Any
    suffix_neg: Any
    prefix_ids: np.ndarray | None = None
    pos_ids: np.ndarray | None = None
    neg_ids: np.ndarray | None = None


@dataclass
class DPOBatch:
    """Pairs.

    Attributes:
        prefixes: the contexts.
        suffix_pos: what is preferred.
        suffix_neg: what is not.
        ids: token ids of each context and both turns; empty without tokens.
    """

    prefixes: Sequence[Any]
    suffix_pos: Sequence[Any]
    suffix_neg: Sequence[Any]
    ids: Sequence[Any] = field(default_factory=tuple)

    def turns(self) -> list[Turn]:
        """What is preferred, and then what is not."""
        ids = self.ids or [(None, None, None)] * len(self.prefixes)
        return [
            Turn(prefix, suffix, one[0], one[which])
            for which, suffixes in ((1, self.suffix_pos), (2, self.suffix_neg))
            for prefix, suffix, one in zip(self.prefixes, suffixes, ids, strict=True)
        ]


class DPO(Compared):
    """Direct preference optimization on the best and the worst of each set of siblings.

    A set of one turn gives no pair, and is counted in the rollout's row; what follows it does. The
    system's baseline is the reference.

    Args:
        system: whose policy is trained.
        beta: how much the policy is held to the reference, above 0.
        label_smoothing: the share of pairs whose labels are taken to be swapped, below 0.5.
        **settings: `reference`, as of `Compared`; `passes` and `minibatch` (of pairs), as of
            `Algorithm`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name = "dpo"
    kind = "sigmoid"
    compares = True

    def __init__(
        self,
        system: Any,
        beta: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(system, **settings)
        self.beta, self.label_smoothing = beta, label_smoothing
        nothing = torch.zeros(1)
        self._loss(nothing, nothing, nothing, nothing, (nothing, nothing))

    def check(self, sampler: Any) -> None:
        check_groups(self, sampler)

    def flatten(self, graph: Any) -> list[DPOStep]:
        """A pair of each set of siblings: the one of the most reward, and the one of the least.

        The first of equal ones is taken. Left out, and counted in `graph.skipped`, are sets of one,
        sets of equal rewards, and turns in which nothing was said or whose reward is not finite.

        Args:
            graph: with `siblings()` and `skipped`.

        Raises:
            ConfigError: siblings have different contexts.
        """
        steps = []
        for siblings in graph.siblings():
            if any(node.context != siblings[0].context for node in siblings):
                raise ConfigError(
                    "paired rollouts for DPO must share the same prefix: siblings of the rollout "
                    "have different contexts."
                )
            good = [node for node in siblings if usable(node, graph.skipped)]
            if len(good) < 2:
                count(graph.skipped, "no pair, for a group of one (width 2 is needed)")
                continue
            best = max(good, key=lambda node: node.reward)
            worst = min(good, key=lambda node: node.reward)
            if best.reward == worst.reward:
                count(graph.skipped, "a group of equal rewards")
                continue
            ids = [getattr(best, n, None) for n in ("context_ids", "probe_ids")]
            ids.append(getattr(worst, "probe_ids", None))
            steps.append(DPOStep(best.context, best.probe, worst.probe, *ids))
        return steps

    @staticmethod
    def collate_fn(steps: Sequence[DPOStep]) -> DPOBatch:
        """A batch of pairs.

        Args:
            steps: some pairs.
        """
        ids = [(step.prefix_ids, step.pos_ids, step.neg_ids) for step in steps]
        return DPOBatch(
            [step.prefix for step in steps],
            [step.suffix_pos for step in steps],
            [step.suffix_neg for step in steps],
            ids if all(one[1] is not None for one in ids) else (),
        )

    def count_items(self, batch: DPOBatch) -> int:
        return len(batch.prefixes)

    def _loss(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        ref_chosen: torch.Tensor,
        ref_rejected: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of log-probabilities of sequences.

        Args:
            chosen, rejected, ref_chosen, ref_rejected: [pairs].
            lengths: tokens of both, [pairs] each.
        """
        del lengths
        return dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=self.beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
        )

    def step(self, batch: DPOBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of pairs.

        Args:
            batch: from `collate_fn`.
        """
        turns = batch.turns()
        scored = self.system.auditor_logps(turns)
        base = self.system.baseline_logps(turns)
        chosen, rejected = sequence_logps(scored.logps, scored.mask).chunk(2)
        ref_chosen, ref_rejected = sequence_logps(base.logps, base.mask).chunk(2)
        lengths = scored.mask.sum(1).chunk(2)
        loss, stats = self._loss(chosen, rejected, ref_chosen, ref_rejected, lengths)
        return loss, plain(
            {
                "training/loss": loss,
                "reward/chosen_rewards": stats["reward_chosen"],
                "reward/rejected_rewards": stats["reward_rejected"],
                "reward/reward_accuracies": stats["accuracy"],
                "reward/reward_margin": stats["margin"],
                "policy/logprobs_chosen": stats["logp_chosen"],
                "policy/logprobs_rejected": stats["logp_rejected"],
                "ref/logprobs_chosen": ref_chosen.mean(),
                "ref/logprobs_rejected": ref_rejected.mean(),
            }
        )


class IPO(DPO):
    """Identity preference optimization.

    Args:
        system: whose policy is trained.
        beta: how much the policy is held to the reference, above 0; called tau in the paper.
        level: "token" compares log-probabilities per token, "sequence" sums over tokens.
        **settings: `reference`, `passes` and `minibatch`, as of `DPO`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name = "ipo"
    kind = "ipo"

    def __init__(
        self,
        system: Any,
        beta: float = 0.1,
        *,
        level: str = "token",
        **settings: Any,
    ) -> None:
        check_choice("algorithm", "level", level, ("token", "sequence"))
        self.level = level
        super().__init__(system, beta, label_smoothing=0.0, **settings)

    def _loss(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        ref_chosen: torch.Tensor,
        ref_rejected: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=self.beta,
            kind="ipo",
            lengths=lengths if self.level == "token" else None,
        )
