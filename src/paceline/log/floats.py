"""Floats that JSON cannot represent: NaN and the infinities are written as text."""

from __future__ import annotations

import math
from typing import Any

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def as_text(value: float) -> float | str:
    """A finite value as it is; "nan", "inf" or "-inf" for any other."""
    return value if math.isfinite(value) else str(value)


def revived(value: Any) -> Any:
    """The float that `as_text` converted; anything else as it is."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
