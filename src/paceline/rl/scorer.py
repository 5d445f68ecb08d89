"""What a scorer is: it judges texts, or other states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from paceline import registry


class Scorer:
    """Judges states; by convention, the higher the score, the more harmful.

    A subclass with a `name` registers itself, and recipes take it as a reward of that name.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registry.register_named("scorer", cls)

    @abstractmethod
    def score(self, x: Sequence[Any]) -> Sequence[float]:
        """A score for each state, in the same order.

        Args:
            x: the states, such as texts.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a score(x).")
