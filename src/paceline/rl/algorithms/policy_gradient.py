"""What REINFORCE, RLOO, GRPO and PPO share: samples with their advantages and old probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.losses import kl
from paceline.rl.algorithm import Algorithm, Turn, turn_of
from paceline.rl.algorithms.compared import Compared
from paceline.rl.text.logprobs import mismatch


@dataclass
class Sample:
    """One turn that the policy sampled.

    Attributes:
        turn: what was said.
        reward: of the turn.
        place: among its siblings, from 0.
        old: log-probabilities of its tokens under the policy that is about to be trained, [tokens].
        ref: those under the reference, [tokens]; None without one.
        sampled: those that the sampler recorded, [tokens]; None if it did not.
        values: before each token, [tokens]; None without a value function.
        advantages: of each token, [tokens]; None before `prepare`.
        returns: of each token, [tokens]; None without a value function.
    """

    turn: Turn
    reward: float
    place: int
    old: np.ndarray
    ref: np.ndarray | None = None
    sampled: np.ndarray | None = None
    values: np.ndarray | None = None
    advantages: np.ndarray | None = None
    returns: np.ndarray | None = None


class PolicyGradient(Compared):
    """An algorithm that makes each turn of a rollout one sample.

    The system says how likely the policy and the baseline, which is the reference, find what was
    said (`System.auditor_logps`, `System.baseline_logps`). Both are asked once, before the first
    pass.

    Args:
        system: whose policy is trained.
        beta: how much the policy is held to the reference; 0 needs none.
        **settings: `reference`, as of `Compared`; `passes` and `minibatch` (of samples), as of
            `Algorithm`.

    Raises:
        ConfigError: a setting is out of its range, or the reference does not exist.
    """

    grouped = False  # whether a sample is compared with its siblings

    def __init__(self, system: Any, *, beta: float = 0.0, **settings: Any) -> None:
        super().__init__(system, **settings)
        if not beta >= 0:
            raise ConfigError(f"algorithm.beta={beta}: expected at least 0.")
        self.beta = beta
        self.compares = beta > 0

    def check(self, sampler: Any) -> None:
        if self.grouped:
            check_groups(self, sampler)

    def flatten(self, graph: Any) -> list[Sample]:
        """A sample of each turn.

        Left out, and counted in `graph.skipped`, are turns in which nothing was said or whose
        reward is not finite.

        Args:
            graph: with `siblings()` and `skipped`.
        """
        found: list[tuple[int, Any]] = []
        for siblings in graph.siblings():
            found += enumerate(self.kept(siblings, graph.skipped))
        return self.sampled([node for _, node in found], [place for place, _ in found])

    def kept(self, siblings: Sequence[Any], skipped: dict[str, int]) -> list[Any]:
        """Those of some siblings that are trained on.

        Args:
            siblings: nodes that share a context.
            skipped: counts those that are not.
        """
        good = [node for node in siblings if usable(node, skipped)]
        if self.grouped and len(good) == 1:
            count(skipped, "a group of one")
            return []
        return good

    def sampled(self, nodes: Sequence[Any], places: Sequence[int]) -> list[Sample]:
        """Samples of nodes, with log-probabilities as they are before the first pass.

        Args:
            nodes: the turns.
            places: of each among its siblings.
        """
        if not nodes:
            return []
        turns = [turn_of(node) for node in nodes]
        with torch.no_grad():
            scored, values = self.scored(turns)
            olds = rows_of(scored.logps, scored.mask)
            refs: list[Any] = [None] * len(turns)
            if self.beta:
                base = self.system.baseline_logps(turns)
                refs = rows_of(base.logps, base.mask)
            of_values: list[Any] = [None] * len(turns)
            if values is not None:
                of_values = rows_of(values, scored.mask)
        samples = []
        for node, turn, place, old, ref, value in zip(
            nodes, turns, places, olds, refs, of_values, strict=True
        ):
            recorded = getattr(node, "logprobs", None)
            for what, row in (("the baseline", ref), ("the sampler", recorded)):
                if row is not None and len(row) != len(old):
                    raise ConfigError(
                        f"{what} has log-probabilities of {len(row)} tokens for a turn in which "
                        f"the policy has {len(old)}: both have to read the same tokens."
                    )
            samples.append(Sample(turn, float(node.reward), place, old, ref, recorded, value))
        return samples

    def scored(self, turns: Sequence[Turn]) -> tuple[Any, torch.Tensor | None]:
        """How likely the policy finds turns, and values, if there is a value function.

        Args:
            turns: what was said.
        """
        return self.system.auditor_logps(turns), None

    def row(self, steps: Sequence[Sample]) -> Mapping[str, float]:
        both = [(step.old, step.sampled) for step in steps if step.sampled is not None]
        if not both:
            return {}
        old, sampled = (torch.as_tensor(np.concatenate(part)) for part in zip(*both, strict=True))
        return mismatch(old, sampled, torch.ones_like(old))

    def prepare(self, steps: list[Sample]) -> list[Sample]:
        if not steps:
            return steps
        advantages = self.advantages(steps)
        return [
            dataclasses.replace(sample, advantages=row.astype(np.float32))
            for sample, row in zip(steps, advantages, strict=True)
        ]

    def advantages(self, samples: list[Sample]) -> list[np.ndarray]:
        """Advantages of the tokens of samples, [tokens] each.

        Args:
            samples: of a whole experience.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs an advantages(samples).")

    @staticmethod
    def collate_fn(steps: Sequence[Sample]) -> dict[str, Any]:
        """Turns, and tensors of [samples, tokens of the longest], padded at the right.

        Args:
            steps: some samples.
        """
        lengths = torch.tensor([len(step.old) for step in steps])
        longest = max((len(step.old) for step in steps), default=0)
        batch: dict[str, Any] = {
            "turns": [step.turn for step in steps],
            "reward": torch.tensor([step.reward for step in steps]),
            "mask": torch.arange(longest) < lengths[:, None],
        }
        for name in ("old", "ref", "values", "advantages", "returns"):
            rows = [getattr(step, name) for step in steps]
            if rows and rows[0] is not None:
                batch[name] = padded(rows, longest)
        return batch

    def count_items(self, batch: Mapping[str, Any]) -> Any:
        return batch["mask"].sum()

    def logps(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Log-probabilities of a batch's tokens under the policy, in the shape of its mask.

        Args:
            batch: from `collate_fn`.
        """
        return same_tokens(self.system.auditor_logps(batch["turns"]), batch["mask"]).logps


def same_tokens(scored: Any, mask: torch.Tensor) -> Any:
    """What a system said of a batch, if it is about the tokens that the samples have.

    Args:
        scored: from the system.
        mask: of the samples, [samples, tokens].

    Raises:
        ConfigError: it has others.
    """
    if scored.mask.shape != mask.shape:
        raise ConfigError(
            f"the system has log-probabilities of {list(scored.mask.shape)} [turns, tokens] for "
            f"turns that had {list(mask.shape)} before: it has to read the same tokens each time."
        )
    return scored


def check_groups(algorithm: Algorithm, sampler: Any) -> None:
    """Refuses a sampler whose every turn is alone.

    Args:
        algorithm: compares siblings.
        sampler: plays the episodes.

    Raises:
        ConfigError: its groups have one turn.
    """
    for name in ("group_size", "tree_width"):
        if getattr(sampler, name, 2) == 1:
            raise ConfigError(
                f"sampler.{name}=1: {type(algorithm).__name__} compares what was said in one "
                "context; it needs at least 2."
            )


def usable(node: Any, skipped: dict[str, int]) -> bool:
    """Whether there is something to learn from a node; counts it if there is not.

    Args:
        node: a turn.
        skipped: how many were left out, by the reason.
    """
    ids = getattr(node, "probe_ids", None)
    if len(node.probe if ids is None else ids) == 0:
        count(skipped, "empty probe")
        return False
    if not math.isfinite(node.reward):
        count(skipped, "reward not finite")
        return False
    return True


def count(skipped: dict[str, int], reason: str, number: int = 1) -> None:
    """Counts what is left out.

    Args:
        skipped: how many were, by the reason.
        reason: in a few plain words.
        number: how many more.
    """
    skipped[reason] = skipped.get(reason, 0) + number


def rows_of(values: torch.Tensor, mask: torch.Tensor) -> list[np.ndarray]:
    """The numbers of each row that count, on the CPU.

    Args:
        values: [rows, columns].
        mask: of the same shape.
    """
    held, lengths = values.detach().float().cpu().numpy(), mask.sum(1).tolist()
    return [row[:length].copy() for row, length in zip(held, lengths, strict=True)]


def padded(rows: Sequence[Any], longest: int) -> torch.Tensor:
    """Rows with 0 behind them, [rows, longest].

    Args:
        rows: arrays of [length].
        longest: columns.
    """
    out = torch.zeros(len(rows), longest)
    for into, row in zip(out, rows, strict=True):
        into[: len(row)] = torch.as_tensor(row)
    return out


def groups_of(samples: Sequence[Sample]) -> torch.Tensor:
    """To which set of siblings each sample belongs, [samples].

    Args:
        samples: in their order, so that each set begins with its place 0.
    """
    places = torch.tensor([sample.place for sample in samples])
    return (places == 0).cumsum(0)


def rewards_of(samples: Sequence[Sample]) -> torch.Tensor:
    """Rewards of samples, [samples] float64.

    Args:
        samples: of an experience.
    """
    return torch.tensor([sample.reward for sample in samples], dtype=torch.float64)


def penalties(samples: Sequence[Sample], beta: float) -> torch.Tensor:
    """What is taken from rewards for leaving the reference: beta times k1, [samples] float64.

    Args:
        samples: with `ref`, unless beta is 0.
        beta: the weight.
    """
    if not beta:
        return torch.zeros(len(samples), dtype=torch.float64)
    found = [
        kl(torch.as_tensor(s.old), torch.as_tensor(s.ref), "k1").double().sum() for s in samples
    ]
    return beta * torch.stack(found)


def plain(stats: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Statistics as numbers; on an accelerator they stay tensors, so that nothing waits for it.

    Args:
        stats: tensors of one element by name.
        prefix: of the names.
    """
    return {
        prefix + name: value.item() if value.device.type == "cpu" else value.detach()
        for name, value in stats.items()
    }
