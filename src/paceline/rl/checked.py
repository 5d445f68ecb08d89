"""What a user's system says and rewards is checked, on every call."""

from __future__ import annotations

from collections.abc import Sequence
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

    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> list[Any]:
        """What the auditor says, one for each prompt.

        Args:
            prompts: as of `System`.

        Raises:
            DataError: there are not as many.
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

    def _wrong(self, method: str, what: str) -> DataError:
        return DataError(f"{type(self.system).__qualname__}.{method}: {what}.")
