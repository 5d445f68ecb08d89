"""What a rollout leads to: a tree of turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Node:
    """One turn: a probe, the response to it and what they were worth.

    Args:
        context: what was there before the turn.
        probe: what the policy that is trained said or did.
        response: what came back.
        reward: of the turn; the higher, the more of it is wanted.
        children: the turns that follow; none for a leaf.
        context_ids: the token ids that the policy saw before its probe, [length] int32; None where
            there are no tokens.
        probe_ids: the token ids that the policy sampled, the end token among them, [length] int32.
        logprobs: their log-probabilities as they were sampled, [length] float32.
        version: optimizer steps that the policy had taken.
        rewards: the parts of the reward by name, before they were weighted.
    """

    context: Any
    probe: Any
    response: Any
    reward: float
    children: list[Node] = field(default_factory=list)
    context_ids: np.ndarray | None = None
    probe_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    version: int = 0
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass
class Graph:
    """A rollout: where it began, and the first turns.

    Args:
        context: the first context.
        children: the turns that begin there.
        skipped: branches that were given up, by the reason in a few plain words.
    """

    context: Any
    children: list[Node]
    skipped: dict[str, int] = field(default_factory=dict)

    def nodes(self) -> Iterator[Node]:
        """All turns, level by level."""
        for siblings in self.siblings():
            yield from siblings

    def siblings(self) -> Iterator[list[Node]]:
        """The turns that share a context, level by level; sets without a turn are left out."""
        level = [self.children]
        while level:
            level = [each for each in level if each]
            yield from level
            level = [node.children for each in level for node in each]


def first_turns(graph: Graph) -> list[Node]:
    """The turns along the first branches, to a leaf.

    Args:
        graph: of a rollout.
    """
    found, children = [], graph.children
    while children:
        found.append(children[0])
        children = children[0].children
    return found


def final_reward(graph: Graph) -> float | None:
    """The reward of the leaf at the end of the first branches; None if there is no turn.

    Args:
        graph: of a rollout.
    """
    turns = first_turns(graph)
    return turns[-1].reward if turns else None
