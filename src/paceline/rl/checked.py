"""What the methods of a system return is checked, on every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.errors import DataError


class Checked:
    """A system whose methods' results are looked at before they are used.

    Args:
        system: of any class with the methods of `System`.
    """

    def __init__(self, system: Any) -> None:
        self.system = system
        self._device: torch.device | None = None
        self._warned = False

    def get_auditor_logprobs(self, context: Sequence[Any], continuation: Sequence[Any]) -> Any:
        """The auditor's log-probabilities, which carry gradients.

        Args:
            context, continuation: as of `System`.

        Raises:
            DataError: they are no log-probabilities of these texts.
        """
        return self._logprobs("auditor", self.system.get_auditor_logprobs, context, continuation)

    def get_target_logprobs(self, context: Sequence[Any], continuation: Sequence[Any]) -> Any:
        """The target's log-probabilities, without gradients.

        Args:
            context, continuation: as of `System`.
        """
        with torch.no_grad():
            return self._logprobs("target", self.system.get_target_logprobs, context, continuation)

    def get_baseline_logprobs(self, context: Sequence[Any], continuation: Sequence[Any]) -> Any:
        """The baseline's log-probabilities, without gradients.

        Args:
            context, continuation: as of `System`.
        """
        with torch.no_grad():
            get = self.system.get_baseline_logprobs
            return self._logprobs("baseline", get, context, continuation)

    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> list[Any]:
        """What the auditor says, one for each prompt.

        Args:
            prompts: as of `System`.
        """
        said = self.system.rollout_prompt_with_auditor(prompts)
        return self._each("rollout_prompt_with_auditor", said, prompts)

    def rollout_prompt_with_target(self, prompts: Sequence[Any]) -> list[Any]:
        """What the target responds, one for each prompt.

        Args:
            prompts: as of `System`.
        """
        said = self.system.rollout_prompt_with_target(prompts)
        return self._each("rollout_prompt_with_target", said, prompts)

    def reward(
        self, context: Sequence[Any], probe: Sequence[Any], response: Sequence[Any]
    ) -> list[float]:
        """Finite rewards, one for each turn.

        Args:
            context, probe, response: as of `System`.
        """
        given = self.system.reward(context, probe, response)
        values = self._each("reward", given, context)
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            raise self._wrong("reward", "it returned values that are no numbers") from None
        if bad := [n for n in numbers if n != n or abs(n) == float("inf")]:
            raise self._wrong("reward", f"it returned {bad[0]}")
        return numbers

    def _each(self, method: str, given: Any, prompts: Sequence[Any]) -> list[Any]:
        if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
            raise self._wrong(method, f"it returned a {type(given).__name__}, not one of each")
        values = given.tolist() if isinstance(given, torch.Tensor) else list(given)
        if len(values) != len(prompts):
            raise self._wrong(method, f"it returned {len(values)} for {len(prompts)} prompts")
        return values

    def _logprobs(
        self,
        role: str,
        get: Callable[[Sequence[Any], Sequence[Any]], Any],
        context: Sequence[Any],
        continuation: Sequence[Any],
    ) -> torch.Tensor:
        method, values = f"get_{role}_logprobs", get(context, continuation)
        if not isinstance(values, torch.Tensor):
            raise self._wrong(method, f"it returned a {type(values).__name__}, not a tensor")
        if role == "auditor" and torch.is_grad_enabled() and not values.requires_grad:
            raise self._wrong(method, "its log-probabilities carry no gradient")
        if values.ndim != 2 or len(values) != len(context):
            raise self._wrong(
                method,
                f"it returned the shape {list(values.shape)}, not [{len(context)}, tokens]",
            )
        if self._device is None:
            self._device = values.device
        if values.device != self._device:
            raise self._wrong(
                method,
                f"All logprobs must be on the same device. Expected {self._device}, but {role} "
                f"logprobs are on {values.device}",
            )
        held = values.detach()
        if held.numel():
            least, most = held.aminmax()
            low, high = float(least), float(most)
            if not (low > float("-inf") and high < float("inf")):
                raise self._wrong(method, "there is a log-probability that is no finite number")
            if low >= 0 and high > 0 and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{type(self.system).__qualname__}.{method}: the values look like "
                    "probabilities, not log-probabilities.",
                    stacklevel=3,
                )
        return values

    def _wrong(self, method: str, what: str) -> DataError:
        return DataError(f"{type(self.system).__qualname__}.{method}: {what}.")
