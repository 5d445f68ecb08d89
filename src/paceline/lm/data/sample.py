"""One tokenized sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One tokenized sample.

    Attributes:
        ids: token ids, [length] int32.
        labels: [length] int32, equal to `ids` where trained, else IGNORED.
    """

    ids: np.ndarray
    labels: np.ndarray
