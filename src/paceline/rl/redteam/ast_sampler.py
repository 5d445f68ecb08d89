"""ASTSampler: plays dialogues of auditor and target as trees, all live branches in one batch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.rl.checked import Checked
from paceline.rl.graph import Graph, Node
from paceline.rl.prompts import eval_seed, file_of, read_prompts, usable
from paceline.rl.redteam.ast_system import ASTSystem
from paceline.rl.redteam.turns import Dialogue, Exchange, Said, Verdict
from paceline.rl.sampler import Sampler
from paceline.world.seeding import random_state_kept, seed_everything, stream

EMPTY_PROBE = "empty probe"
NO_REWARD = "no reward"


class ASTSampler(Sampler):
    """Plays dialogues: at each point the auditor probes several times, and the target responds.

    Every branch has random numbers of its own, so it is the same alone and in a batch, on any rank.
    With a system of one's own, which draws from the global generators, episodes are played one by
    one, each from its own seed.

    Args:
        system: what is played.
        prompts: with which dialogues begin: texts, or {"file": path} with one a line, relative to
            the recipe.
        tree_width: probes at each point.
        tree_depth: turns of a dialogue.
        episodes: in one experience, over all ranks.

    Raises:
        ConfigError: a number is impossible, there is no prompt, or nothing says what a turn is
            worth.
    """

    name = "ast"

    def __init__(
        self,
        system: Any,
        prompts: Any,
        tree_width: int = 2,
        tree_depth: int = 3,
        *,
        episodes: int = 8,
    ) -> None:
        super().__init__(system, episodes=episodes)
        for setting, value, least in (("tree_width", tree_width, 1), ("tree_depth", tree_depth, 0)):
            if value < least:
                raise ConfigError(f"sampler.{setting}={value}: expected at least {least}.")
        if isinstance(system, ASTSystem) and not system.judges:
            raise ConfigError("scorer, rewards: nothing says what a turn of the system is worth.")
        self.tree_width, self.tree_depth = tree_width, tree_depth
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise ConfigError("sampler.prompts: expected texts, or {file: path}.")
        self._file: str | None = None
        if isinstance(prompts, Mapping):
            self._file = file_of("sampler.prompts", prompts)
            self.prompts: list[Any] = []
        else:
            self.prompts = usable(list(prompts), "sampler.prompts")

    @property
    def files(self) -> list[str]:
        return [] if self._file is None else [self._file]

    def locate(self, folder: Path) -> None:
        if self._file is not None and not self.prompts:
            self.prompts = read_prompts(folder, self._file)

    def rollout(self, seed: int | None = None) -> Graph:
        """One dialogue tree.

        Args:
            seed: of everything in it, the prompt too; None for one of Python's global generator.
        """
        return self.rollouts([random.getrandbits(63) if seed is None else seed])[0]

    def rollouts(self, seeds: Sequence[int]) -> list[Graph]:
        self.locate(Path())
        chosen = [self.prompts[stream(seed, "probe") % len(self.prompts)] for seed in seeds]
        return self._play(chosen, seeds, self.tree_width)

    def eval_rollout(self, seed: Any = None) -> Graph:
        """One dialogue for an evaluation.

        Args:
            seed: a text is a prompt, which is played once, without branches, always with the same
                random numbers; an int or None is as for `rollout`.
        """
        return self.eval_rollouts([seed])[0] if isinstance(seed, str) else self.rollout(seed)

    def eval_rollouts(
        self, prompts: Sequence[str], attempts: Sequence[int] | None = None
    ) -> list[Graph]:
        """One dialogue for each prompt, without branches.

        Args:
            prompts: with which they begin.
            attempts: the number of each among those at the same prompt, which differ; None for 0.
        """
        numbers = [0] * len(prompts) if attempts is None else attempts
        seeds = [eval_seed(p, number) for p, number in zip(prompts, numbers, strict=True)]
        return self._play(prompts, seeds, 1)

    def _play(self, prompts: Sequence[Any], seeds: Sequence[int], width: int) -> list[Graph]:
        if hasattr(self.system, "begin"):
            with random_state_kept():
                return self._batch(self.system, prompts, seeds, width)
        graphs = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            with random_state_kept():
                seed_everything(seed)
                graphs += self._batch(_OfTexts(self.system), [prompt], [seed], width)
        return graphs

    def _batch(
        self, system: Any, prompts: Sequence[Any], seeds: Sequence[int], width: int
    ) -> list[Graph]:
        graphs = [Graph(prompt, []) for prompt in prompts]
        level = [
            _Point(graph, graph.children, system.begin(graph.context), seed, 0)
            for graph, seed in zip(graphs, seeds, strict=True)
        ]
        for turn in range(self.tree_depth):
            live = [(point, point.branch * width + k) for point in level for k in range(width)]
            level = self._turn(system, live, turn)
            if not level:
                break
        return graphs

    def _turn(self, system: Any, live: Sequence[tuple[_Point, int]], turn: int) -> list[_Point]:
        """Plays one turn of all live branches; those that go on."""
        self.check_stop()
        probes = system.probe(
            [point.dialogue for point, _ in live],
            [stream(point.seed, "probe", branch, turn) for point, branch in live],
        )
        spoken = []
        for (point, branch), probe in zip(live, probes, strict=True):
            if isinstance(probe.text, str) and not probe.text.strip():
                point.skip(EMPTY_PROBE)
            else:
                spoken.append((point, branch, probe))
        if not spoken:
            return []
        self.check_stop()
        responses = system.respond(
            [point.dialogue for point, _, _ in spoken],
            [probe for _, _, probe in spoken],
            [stream(point.seed, "response", branch, turn) for point, branch, _ in spoken],
        )
        self.check_stop()
        turns = [
            Exchange(point.dialogue, probe, response, id(point))
            for (point, _, probe), response in zip(spoken, responses, strict=True)
        ]
        following = []
        for (point, branch, _), played, verdict in zip(
            spoken, turns, system.judge(turns), strict=True
        ):
            if verdict is None:
                point.skip(NO_REWARD)
                continue
            node = self._node(played, verdict)
            point.children.append(node)
            dialogue = system.follow(played.dialogue, played.probe, played.response)
            following.append(_Point(point.graph, node.children, dialogue, point.seed, branch))
        return following

    def _node(self, turn: Exchange, verdict: Verdict) -> Node:
        return Node(
            turn.dialogue.text,
            turn.probe.text,
            turn.response.text,
            verdict.reward,
            [],
            turn.probe.context_ids,
            turn.probe.ids,
            turn.probe.logprobs,
            self.version if turn.probe.version is None else turn.probe.version,
            verdict.parts,
        )


@dataclass(frozen=True)
class _Point:
    """Where turns begin.

    Args:
        graph: of the episode.
        children: takes the turns.
        dialogue: so far.
        seed: the episode's.
        branch: the number of what leads here, among all that there may be at its depth.
    """

    graph: Graph
    children: list[Node]
    dialogue: Dialogue
    seed: int
    branch: int

    def skip(self, reason: str) -> None:
        self.graph.skipped[reason] = self.graph.skipped.get(reason, 0) + 1


class _OfTexts:
    """A system of one's own, which has texts alone, as the sampler plays it."""

    def __init__(self, system: Any) -> None:
        self._system, self._checked = system, Checked(system)

    def begin(self, context: Any) -> Dialogue:
        return Dialogue(context)

    def probe(self, dialogues: Sequence[Dialogue], seeds: Sequence[int]) -> list[Said]:
        texts = self._checked.rollout_prompt_with_auditor([d.text for d in dialogues])
        return [Said(text) for text in texts]

    def respond(
        self, dialogues: Sequence[Dialogue], probes: Sequence[Said], seeds: Sequence[int]
    ) -> list[Said]:
        prompts = [d.text + probe.text for d, probe in zip(dialogues, probes, strict=True)]
        return [Said(text) for text in self._checked.rollout_prompt_with_target(prompts)]

    def judge(self, turns: Sequence[Exchange]) -> list[Verdict | None]:
        if isinstance(self._system, ASTSystem):
            return self._system.judge(turns)
        values = self._checked.reward(
            [turn.dialogue.text for turn in turns],
            [turn.probe.text for turn in turns],
            [turn.response.text for turn in turns],
        )
        return [Verdict(value, {}) for value in values]

    def follow(self, dialogue: Dialogue, probe: Said, response: Said) -> Dialogue:
        return Dialogue(self._system.advance(dialogue.text, probe.text, response.text))
