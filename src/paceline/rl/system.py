"""What a system is: an auditor that is trained to probe a target, and what the probes are worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from paceline import registry
from paceline.errors import ConfigError
from paceline.rl.checked import Checked
from paceline.rl.engine import Engine
from paceline.rl.old_names import take_old_names
from paceline.rl.text.local import LocalEngine
from paceline.rl.text.logprobs import Scored


class System:
    """An auditor that probes a target, a baseline that it is compared with, and a reward.

    The first three methods return log-probabilities of [texts, tokens], 0 where there is no token.
    A subclass with a `name` registers itself, and recipes take it as `system: {type: NAME}`.

    Args:
        scorer: judges what was said.

    Attributes:
        make_engine: makes what completes prompts, from `model` and `tokenizer`; None for a
            `LocalEngine`.
        version: optimizer steps that the policy has taken; set by who samples.
        check_stop: raises `StopCollecting` if the run stops; set by who samples.
    """

    name: ClassVar[str]
    version: int = 0
    check_stop: Callable[[], None] = staticmethod(lambda: None)
    make_engine: Callable[..., Engine] | None = None

    def __init__(self, scorer: Any = None) -> None:
        self.scorer = scorer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        take_old_names(cls)
        registry.register_named("system", cls)

    def auditor_logps(self, turns: Sequence[Any]) -> Scored:
        """How likely the auditor finds what was said; this is what algorithms call.

        By default it calls `get_auditor_logprobs` with the texts. A system that keeps token ids
        overrides this and `baseline_logps`, so that nothing sampled is tokenised again.

        Args:
            turns: with `context` and `probe`, and `context_ids` and `probe_ids` where a node had
                them, see `paceline.rl.algorithm.Turn`.

        Raises:
            DataError: `get_auditor_logprobs` returned something else than log-probabilities.
        """
        return self._scored("auditor", turns)[0]

    def baseline_logps(self, turns: Sequence[Any]) -> Scored:
        """How likely the baseline finds what was said, without gradients: the reference.

        Args:
            turns: as for `auditor_logps`.

        Raises:
            DataError: `get_baseline_logprobs` returned something else than log-probabilities.
        """
        with torch.no_grad():
            return self._scored("baseline", turns)[0]

    def engine_of(self, model: Any, tokenizer: Any) -> Engine:
        """What completes prompts: as the recipe's `engine:` says, by default a `LocalEngine`.

        Args:
            model: one of the system's.
            tokenizer: the model's.
        """
        make = LocalEngine if self.make_engine is None else self.make_engine
        engine = make(model=model, tokenizer=tokenizer)
        engine.check_stop, engine.version = self.check_stop, self.version
        return engine

    def keep_baseline(self) -> None:
        """Called before training for an algorithm that compares with the baseline.

        Here a system makes one of the policy as it is then; others have theirs already.
        """

    def _scored(self, whose: str, turns: Sequence[Any]) -> tuple[Scored, torch.Tensor]:
        """Log-probabilities as `Scored`, and where each was among those that the method returned.

        The second is [turns, tokens]: places in a row.
        """
        checked = vars(self).setdefault("_checked", Checked(self))
        get = getattr(checked, f"get_{whose}_logprobs")
        return aligned(get([t.context for t in turns], [t.probe for t in turns]))

    @abstractmethod
    def get_auditor_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The auditor's log-probabilities of continuations, with gradients.

        Args:
            context: what was there before, one each.
            continuation: what follows.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_auditor_logprobs.")

    @abstractmethod
    def get_target_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The target's log-probabilities of continuations.

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_target_logprobs.")

    @abstractmethod
    def get_baseline_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The baseline's log-probabilities of continuations.

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs get_baseline_logprobs.")

    @abstractmethod
    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """What the auditor says next, without the prompt.

        Args:
            prompts: what was said before, one each.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs rollout_prompt_with_auditor.")

    @abstractmethod
    def rollout_prompt_with_target(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """What the target responds, without the prompt.

        Args:
            prompts: what was said before, one each.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs rollout_prompt_with_target.")

    @abstractmethod
    def advance(self, context: Any, probe: Any, response: Any) -> Any:
        """The context after a turn.

        Args:
            context, probe, response: of the turn.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs advance.")

    @abstractmethod
    def reward(
        self, context: Sequence[Any], probe: Sequence[Any], response: Sequence[Any]
    ) -> Sequence[float]:
        """What turns are worth, one number each.

        Args:
            context, probe, response: of the turns.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs reward.")

    @abstractmethod
    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters that are trained."""
        raise NotImplementedError(f"{type(self).__qualname__} needs parameters.")


class ValueFunctionSystem(System):
    """A system with a value function, for algorithms that need one."""

    def auditor_logps_and_values(self, turns: Sequence[Any]) -> tuple[Scored, torch.Tensor]:
        """How likely the auditor finds what was said, and the value before each token of it.

        By default it calls `get_auditor_logprobs` and `value` with the texts.

        Args:
            turns: as for `auditor_logps`.

        Returns:
            Log-probabilities, and values in their shape, [turns, tokens].

        Raises:
            ConfigError: a method returned something of another shape.
        """
        scored, places = self._scored("auditor", turns)
        values = self.value([turn.context for turn in turns], [turn.probe for turn in turns])
        values = values.squeeze(-1) if values.ndim == 3 else values
        needed = 1 + int(places.max()) if places.numel() else 0
        if values.ndim != 2 or len(values) != len(turns) or values.shape[1] < needed:
            raise ConfigError(
                f"{type(self).__qualname__}.value() returned {list(values.shape)} for "
                f"{len(turns)} texts: give [texts, tokens], one value for each log-probability."
            )
        return scored, values.gather(1, places).masked_fill(~scored.mask, 0.0)

    @abstractmethod
    def value(self, context: Sequence[Any], continuation: Sequence[Any]) -> torch.Tensor:
        """The values before each token of the continuations, [texts, tokens].

        Args:
            context, continuation: as for `get_auditor_logprobs`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs value.")


def aligned(logps: torch.Tensor) -> tuple[Scored, torch.Tensor]:
    """Rows of log-probabilities moved to the left, to where their first token is.

    What comes before the first and after the last number that is not 0 is no token.

    Args:
        logps: [texts, tokens].

    Returns:
        Log-probabilities of [texts, tokens of the longest], and the place of each in its row.
    """
    said = logps.detach() != 0
    after_first, before_last = said.cumsum(1) > 0, said.flip(1).cumsum(1).flip(1) > 0
    inside = after_first & before_last
    lengths = inside.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=logps.device)
    mask = steps < lengths[:, None]
    first = inside.to(torch.int8).argmax(1) if logps.shape[1] else lengths
    places = (first[:, None] + steps).masked_fill(~mask, 0)
    return Scored(logps.gather(1, places).masked_fill(~mask, 0.0), mask), places
