"""What a run writes down: rows, through sinks, and `run.json`.

`JsonlSink` writes the run folder's own rows, `read_rows` reads them; your own sink is a subclass of
`Sink`. `Image`, `Histogram`, `Text` and `Table` are values for `log` that are no numbers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.log.media import Histogram, Image, Table, Text
    from paceline.log.sinks import JsonlSink, RunInfo, Sink, read_rows
    from paceline.log.tensorboard import TensorBoard

_WHERE = {
    "Histogram": "paceline.log.media",
    "Image": "paceline.log.media",
    "Table": "paceline.log.media",
    "Text": "paceline.log.media",
    "JsonlSink": "paceline.log.sinks",
    "RunInfo": "paceline.log.sinks",
    "Sink": "paceline.log.sinks",
    "TensorBoard": "paceline.log.tensorboard",
    "read_rows": "paceline.log.sinks",
}
__all__ = [
    "Histogram",
    "Image",
    "JsonlSink",
    "RunInfo",
    "Sink",
    "Table",
    "TensorBoard",
    "Text",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module 'paceline.log' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
