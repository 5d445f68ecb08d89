"""Scorers fail; a reward is then tried again, and in the end left out, but never made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from paceline.errors import ConfigError, DataError, in_a_line
from paceline.rl.timed import within


class Watch:
    """Calls scorers, with a bound on their time and their failures.

    Args:
        timeout: seconds that one call may take.
        retries: further calls for what one has not given.
        max_failures: states in a row that no scorer's call gave a number for.

    Attributes:
        failed: states without a number so far.

    Raises:
        ConfigError: a setting is impossible.
    """

    def __init__(self, timeout: float = 60.0, retries: int = 1, max_failures: int = 16) -> None:
        for name, value, least in (
            ("timeout", timeout, 1e-3),
            ("retries", retries, 0),
            ("max_failures", max_failures, 0),
        ):
            if not value >= least:
                raise ConfigError(f"{name}={value}: expected a number of at least {least:g}.")
        self.timeout, self.retries, self.max_failures = timeout, retries, max_failures
        self.failed = self._in_a_row = 0

    def scores(
        self, name: str, score: Callable[[list[Any]], Any], states: Sequence[Any]
    ) -> list[float | None]:
        """A finite number for each state, or None where there is none after all retries.

        Args:
            name: the reward's, for messages.
            score: gives a number each; called in a thread of its own.
            states: what is scored.

        Raises:
            DataError: more than `max_failures` states in a row have none.
        """
        found: list[float | None] = [None] * len(states)
        why = ""
        for _ in range(1 + self.retries):
            missing = [i for i, value in enumerate(found) if value is None]
            if not missing:
                break
            values, why = self._call(score, [states[i] for i in missing])
            for i, value in zip(missing, values, strict=True):
                found[i] = value
        for value in found:
            self._in_a_row = 0 if value is not None else self._in_a_row + 1
            self.failed += value is None
            if self._in_a_row > self.max_failures:
                raise DataError(
                    f"rewards.{name}: {self._in_a_row} states in a row have no score: {why}. "
                    "Mend the scorer, or raise max_failures."
                )
        return found

    def _call(
        self, score: Callable[[list[Any]], Any], states: list[Any]
    ) -> tuple[list[float | None], str]:
        """What one call gave for each state, and what was wrong with it."""
        nothing: list[float | None] = [None] * len(states)
        try:
            given = within(self.timeout, lambda: score(states), "scorer")
        except ConfigError:
            raise
        except TimeoutError as error:
            return nothing, str(error)
        except Exception as error:  # noqa: BLE001 - whatever a user's scorer raises
            return nothing, in_a_line(error)
        try:
            values = given.tolist() if hasattr(given, "tolist") else list(given)
        except TypeError:
            return nothing, f"it gave a {type(given).__name__}, not a number each"
        if len(values) != len(states):
            return nothing, f"it gave {len(values)} values for {len(states)} states"
        numbers = [_number(value) for value in values]
        bad = [v for v, n in zip(values, numbers, strict=True) if n is None]
        return numbers, f"it gave {bad[0]!r:.40}" if bad else ""


def _number(value: Any) -> float | None:
    """A value as a finite number; None if it is none, or has a shape of its own."""
    if isinstance(value, (list, tuple, str)) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
