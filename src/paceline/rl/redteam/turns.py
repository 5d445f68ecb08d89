"""Turns of a dialogue, as samplers hand them to systems and rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Dialogue:
    """What was said so far.

    Args:
        text: as the system's `advance` makes it.
        auditor_ids: the auditor's token ids of it, [length] int32; None where there are none.
        target_ids: the target's.
    """

    text: Any
    auditor_ids: np.ndarray | None = None
    target_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Said:
    """What one model said.

    Args:
        text: without special tokens.
        context_ids: the token ids that the model saw, [length] int32; None where there are none.
        ids: the token ids that it sampled, the end token among them, [length] int32.
        logprobs: their log-probabilities as they were sampled, [length] float32.
        version: optimizer steps that the model had taken; None where no engine says so.
    """

    text: Any
    context_ids: np.ndarray | None = None
    ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    version: int | None = None


@dataclass(frozen=True)
class Exchange:
    """A probe and the response to it, to be judged.

    Args:
        dialogue: what was there before.
        probe, response: what was said.
        siblings: which turns began at the same point of the same episode.
    """

    dialogue: Dialogue
    probe: Said
    response: Said
    siblings: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a turn is worth.

    Args:
        reward: the weighted sum.
        parts: its parts by name, before they were weighted.
    """

    reward: float
    parts: dict[str, float]
