"""Values from run folders as text for a terminal, with control characters escaped."""

from __future__ import annotations

import math
from typing import Any

LONGEST = 120


def printable(value: Any, longest: int | None = None) -> str:
    r"""Text in which characters that are not printable are escaped (`\x1b`).

    A terminal interprets escape sequences: one in a run's name could hide other runs, or change the
    window's title.

    Args:
        value: what to show.
        longest: the most characters to show.
    """
    text = value if isinstance(value, str) else str(value)
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(key: str, value: Any) -> str:
    """Formats a value for a table: floats to five digits, times to the minute.

    Args:
        key: the value's name, as in `RunFolder.get`.
        value: the value.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return span(value) if key == "duration" and math.isfinite(value) else f"{value:.5g}"
    if key in ("started", "ended"):
        return printable(str(value)[:16].replace("T", " "))
    return printable(value, LONGEST)


def span(seconds: float) -> str:
    """A duration in its two largest units: `1h 02m`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
