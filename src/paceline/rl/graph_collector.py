"""Experiences of a sampler: the steps of its episodes, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from paceline.errors import ConfigError
from paceline.rl.algorithm import Algorithm
from paceline.rl.graph import Graph
from paceline.rl.recorded import record_of
from paceline.rl.sampler import Sampler
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World

DRAWN_ANEW = "an episode of equal rewards, drawn anew"


class GraphCollector:
    """Has a sampler play episodes, each with a seed of its own, on whatever rank.

    Args:
        sampler: plays them.
        algorithm: makes steps of them.
        acting: within it they are played.
        version: optimizer steps that the policy has taken.
        identity: settings that decide what is collected.
        record: takes the records of all episodes; None to make none.
    """

    steps = None

    def __init__(
        self,
        sampler: Sampler,
        algorithm: Algorithm,
        acting: Callable[[], AbstractContextManager[None]],
        *,
        version: Callable[[], int],
        identity: Mapping[str, Any],
        record: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self._record = record
        self._sampler, self._algorithm = sampler, algorithm
        self._acting, self._version = acting, version
        self.identity = dict(identity)

    def open(self, seed: int, world: World, stopping: Callable[[], bool]) -> None:
        """A run begins; see `paceline.rl.source.Collector`.

        Args:
            seed: the run's.
            world: the ranks, which share out the episodes.
            stopping: whether to give up the experience at hand.
        """
        count = self._sampler.episodes
        if count < 1:
            raise ConfigError(f"sampler.episodes={count}: expected at least 1.")
        self._algorithm.check(self._sampler)
        size, most = self._algorithm.minibatch, getattr(self._sampler, "turns", None)
        if size is not None and most is not None and size > most:
            raise ConfigError(
                f"algorithm.minibatch={size}: an experience has {most} samples at most; take "
                "fewer, or null for all of them."
            )
        self._seed, self._stopping = seed, stopping
        self._own = np.array_split(np.arange(count), world.dp_size)[world.dp_rank].tolist()

    def collect(self, experience: int) -> list[Any]:
        seeds = [stream(self._seed, "probe", experience, episode) for episode in self._own]
        with self._acting():
            self._sampler.begin(self._version(), self._stopping)
            first = experience * self._sampler.episodes
            self._sampler.numbers = [first + episode for episode in self._own]
            if seeds:  # for samplers that draw from the global generators
                seed_everything(seeds[0])
            try:
                graphs = self._sampler.rollouts(seeds)
                self._draw_anew(graphs, seeds, experience)
            finally:
                self._sampler.end()
            steps = [list(self._algorithm.flatten(graph)) for graph in graphs]
        played = zip(self._own, seeds, steps, graphs, strict=True)
        return [
            (
                episode,
                made,
                _summary(graph),
                record_of(graph, experience=experience, episode=episode, seed=seed)
                if self._record
                else None,
            )
            for episode, seed, made, graph in played
        ]

    def _draw_anew(self, graphs: list[Graph], seeds: list[int], experience: int) -> None:
        """Plays episodes anew that there is nothing to learn from, a bounded number of times.

        Each on its own, whatever the others come to, so that it is the same on any rank.

        Args:
            graphs, seeds: of this rank's episodes; those of new ones take their places.
            experience: the number of the experience.
        """
        for attempt in range(1, self._algorithm.redraws + 1):
            again = [i for i, g in enumerate(graphs) if self._algorithm.teaches_nothing(g)]
            if not again:
                return
            for i in again:
                seeds[i] = stream(self._seed, "probe", experience, self._own[i], attempt)
            first = experience * self._sampler.episodes
            self._sampler.numbers = [first + self._own[i] for i in again]
            seed_everything(seeds[again[0]])
            drawn = self._sampler.rollouts([seeds[i] for i in again])
            for i, graph in zip(again, drawn, strict=True):
                before = graphs[i].skipped  # what has failed counts, also in what is thrown away
                graph.skipped = {
                    n: before.get(n, 0) + graph.skipped.get(n, 0) for n in (*before, *graph.skipped)
                }
                graph.skipped[DRAWN_ANEW] = graph.skipped.get(DRAWN_ANEW, 0) + 1
                graphs[i] = graph

    def together(self, parts: list[Any]) -> tuple[list[Any], dict[str, float]]:
        episodes = sorted((one for part in parts for one in part), key=lambda one: one[0])
        if self._record is not None:
            self._record([record for *_, record in episodes])
        steps = [step for _, made, *_ in episodes for step in made]
        summaries = [summary for _, _, summary, _ in episodes]
        self._sampler.check_skipped(_skipped(summaries))
        return steps, {**_row(summaries), **self._algorithm.row(steps)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _summary(graph: Graph) -> dict[str, Any]:
    """What is logged of an episode: the values of its turns by name, and what was skipped."""
    nodes = list(graph.nodes())
    values: dict[str, list[float]] = {"rollout/reward": [node.reward for node in nodes]}
    for node in nodes:
        for name, value in node.rewards.items():
            values.setdefault(f"rollout/reward/{name}", []).append(value)
        if node.probe_ids is not None:
            values.setdefault("rollout/length", []).append(float(len(node.probe_ids)))
    groups = [{node.reward for node in each} for each in graph.siblings() if len(each) > 1]
    if groups:
        values["rollout/equal_groups"] = [float(len(rewards) == 1) for rewards in groups]
    return {"values": values, "skipped": dict(graph.skipped)}


def _skipped(summaries: list[dict[str, Any]]) -> dict[str, int]:
    """How many branches of an experience were given up, by the reason."""
    skipped: dict[str, int] = {}
    for summary in summaries:
        for reason, count in summary["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
    return skipped


def _row(summaries: list[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    skipped = _skipped(summaries)
    for summary in summaries:
        for name, found in summary["values"].items():
            values.setdefault(name, []).extend(found)
    row = {name: float(np.mean(found)) for name, found in values.items() if found}
    row["rollout/episodes"] = float(len(summaries))
    row["rollout/turns"] = float(len(values.get("rollout/reward", ())))
    row |= {f"rollout/skipped/{reason}": float(n) for reason, n in sorted(skipped.items())}
    return row
