"""What a run writes down: rows, through sinks, and `run.json`.

`JsonlSink` writes the run folder's own rows, `read_rows` reads them; your own sink is a subclass of
`Sink`. `Image`, `Histogram`, `Text` and `Table` are values for `log` that are no numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.log.media import Histogram, Image, Table, Text
    from paceline.log.sinks import JsonlSink, RunInfo, Sink, read_rows
    from paceline.log.tensorboard import TensorBoard
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Histogram": "paceline.log.media",
            "Image": "paceline.log.media",
            "Table": "paceline.log.media",
            "Text": "paceline.log.media",
            "JsonlSink": "paceline.log.sinks",
            "RunInfo": "paceline.log.sinks",
            "Sink": "paceline.log.sinks",
            "TensorBoard": "paceline.log.tensorboard",
            "read_rows": "paceline.log.sinks",
        },
    )

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
