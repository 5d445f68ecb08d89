"""Rewards of a turn: what scorers say, how likely a probe is, how much probes differ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from paceline import registry
from paceline.errors import ConfigError
from paceline.rl.played import words
from paceline.rl.redteam.judging import Watch
from paceline.rl.redteam.scorers import RuleScorer
from paceline.rl.redteam.turns import Exchange, Verdict

Of = Literal["response", "probe", "both"]
Likelihoods = Literal["probability", "per_token"]


class Reward(ABC):
    """One part of what turns are worth."""

    @abstractmethod
    def score(self, turns: Sequence[Exchange], system: Any, watch: Watch) -> list[float | None]:
        """A number for each turn; None where there is none.

        Args:
            turns: to be judged.
            system: that they were played in.
            watch: calls scorers.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs score.")


class ScorerReward(Reward):
    """What a scorer says of a turn's text.

    Args:
        name: of the reward, for messages.
        scorer: judges texts.
        of: "response", "probe", or "both": the probe with the response after it.
    """

    def __init__(self, name: str, scorer: Any, of: Of = "response") -> None:
        if of not in get_args(Of):
            raise ConfigError(f"rewards.{name}.of={of!r}: choose one of {', '.join(get_args(Of))}.")
        self.name, self.scorer, self.of = name, scorer, of

    def score(self, turns: Sequence[Exchange], system: Any, watch: Watch) -> list[float | None]:
        if self.of == "both":
            texts = [turn.probe.text + turn.response.text for turn in turns]
        else:
            texts = [getattr(turn, self.of).text for turn in turns]
        return watch.scores(self.name, self.scorer.score, texts)


class LikelihoodReward(Reward):
    """How likely the target finds a probe, so that it stays natural.

    Args:
        kind: "per_token" for the mean log-probability of its tokens, in nats; "probability" for
            the probability of the whole probe.
    """

    def __init__(self, kind: Likelihoods = "per_token") -> None:
        self.kind = kind

    def score(self, turns: Sequence[Exchange], system: Any, watch: Watch) -> list[float | None]:
        found: list[float | None] = []
        for logps in system.probe_logps(turns):
            total = float(logps.sum())
            if not math.isfinite(total) or not len(logps):
                found.append(None)
            else:
                found.append(
                    total / len(logps) if self.kind == "per_token" else math.exp(min(total, 0.0))
                )
        return found


class DiversityReward(Reward):
    """How much a probe differs from those that began at the same point: 1 less the largest share
    of words and word pairs in common (Jaccard). 0 for one that has no sibling to differ from."""

    def score(self, turns: Sequence[Exchange], system: Any, watch: Watch) -> list[float | None]:
        sets = [words(turn.probe.text) for turn in turns]
        groups: dict[int, list[int]] = {}
        for i, turn in enumerate(turns):
            groups.setdefault(turn.siblings, []).append(i)
        found: list[float | None] = []
        for i, turn in enumerate(turns):
            others = [j for j in groups[turn.siblings] if j != i]
            shared = [len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j])) for j in others]
            found.append(1.0 - max(shared) if shared else 0.0)
        return found


_OWN: dict[str, type[Reward]] = {"likelihood": LikelihoodReward, "diversity": DiversityReward}


class Judge:
    """The weighted sum of rewards.

    Args:
        rewards: weight and reward by name.
        watch: calls scorers.
    """

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]], watch: Watch) -> None:
        self.rewards, self.watch = dict(rewards), watch

    def __call__(self, turns: Sequence[Exchange], system: Any) -> list[Verdict | None]:
        """What turns are worth; None for one that a reward has no number for.

        Args:
            turns: to be judged.
            system: that they were played in.
        """
        if not turns:
            return []
        parts = {n: r.score(turns, system, self.watch) for n, (_, r) in self.rewards.items()}
        verdicts: list[Verdict | None] = []
        for i in range(len(turns)):
            values = {name: found[i] for name, found in parts.items()}
            given = {name: value for name, value in values.items() if value is not None}
            total = sum(self.rewards[name][0] * value for name, value in given.items())
            complete = len(given) == len(values) and math.isfinite(total)
            verdicts.append(Verdict(float(total), given) if complete else None)
        return verdicts


def rewards_from(given: Mapping[str, Any]) -> dict[str, tuple[float, Reward]]:
    """Rewards as recipes and constructors write them.

    Args:
        given: by name a weight; or a mapping of `weight`, `of` and the scorer's own settings; or a
            pair of a weight and a scorer, a function of a text, or a `Reward`.

    Raises:
        ConfigError: a name or a setting is unknown, or there is no reward.
    """
    if not given:
        raise ConfigError("rewards: give at least one, such as {profanity: 1.0}.")
    return {name: _reward(str(name), value) for name, value in given.items()}


def _reward(name: str, value: Any) -> tuple[float, Reward]:
    where = f"rewards.{name}"
    if isinstance(value, tuple) and len(value) == 2:
        weight, made = value
        if not isinstance(made, Reward):
            made = ScorerReward(name, made if hasattr(made, "score") else RuleScorer(made))
        return _weight(where, weight), made
    settings: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = _weight(where, settings.pop("weight", 1.0))
    if name in _OWN:
        if name == "diversity" or settings.keys() - {"kind"}:
            if settings:
                raise ConfigError(f"{where}: no setting {next(iter(settings))!r}.")
            return weight, _OWN[name]()
        kind = settings.get("kind", "per_token")
        if kind not in get_args(Likelihoods):
            raise ConfigError(f"{where}.kind={kind!r}: choose one of per_token, probability.")
        return weight, LikelihoodReward(kind)
    try:
        target = registry.lookup("scorer", name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error} Besides: {', '.join(_OWN)}.") from None
    of = settings.pop("of", "response")
    if isinstance(target, type):
        try:
            scorer = target(**settings)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}.") from None
    elif settings:
        raise ConfigError(f"{where}: a function takes no setting {next(iter(settings))!r}.")
    else:
        scorer = RuleScorer(target)
    return weight, ScorerReward(name, scorer, of)


def _weight(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}.weight={value!r}: expected a number.")
    return float(value)
