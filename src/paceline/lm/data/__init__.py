"""Data of language models: from rows of text to samples, packs and batches.

Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.lm.data.chat import check_template, encode_dialogue, encode_text, render
    from paceline.lm.data.factory import (
        CausalDataConfig,
        CausalDataFactory,
        LMDataConfig,
        LMDataFactory,
        SFTDataConfig,
        SFTDataFactory,
    )
    from paceline.lm.data.packing import (
        Collate,
        PackedDataset,
        PaddedDataset,
        chop,
        count_trained,
        plan_packs,
    )
    from paceline.lm.data.report import Report, report_on
    from paceline.lm.data.sample import Sample
    from paceline.lm.data.sources import RowsConfig, RowSource
    from paceline.lm.data.token_store import TokenStore, store_for
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CausalDataConfig": "paceline.lm.data.factory",
            "CausalDataFactory": "paceline.lm.data.factory",
            "Collate": "paceline.lm.data.packing",
            "LMDataConfig": "paceline.lm.data.factory",
            "LMDataFactory": "paceline.lm.data.factory",
            "PackedDataset": "paceline.lm.data.packing",
            "PaddedDataset": "paceline.lm.data.packing",
            "Report": "paceline.lm.data.report",
            "RowSource": "paceline.lm.data.sources",
            "RowsConfig": "paceline.lm.data.sources",
            "SFTDataConfig": "paceline.lm.data.factory",
            "SFTDataFactory": "paceline.lm.data.factory",
            "Sample": "paceline.lm.data.sample",
            "TokenStore": "paceline.lm.data.token_store",
            "check_template": "paceline.lm.data.chat",
            "chop": "paceline.lm.data.packing",
            "count_trained": "paceline.lm.data.packing",
            "encode_dialogue": "paceline.lm.data.chat",
            "encode_text": "paceline.lm.data.chat",
            "plan_packs": "paceline.lm.data.packing",
            "render": "paceline.lm.data.chat",
            "report_on": "paceline.lm.data.report",
            "store_for": "paceline.lm.data.token_store",
        },
    )

__all__ = [
    "CausalDataConfig",
    "CausalDataFactory",
    "Collate",
    "LMDataConfig",
    "LMDataFactory",
    "PackedDataset",
    "PaddedDataset",
    "Report",
    "RowSource",
    "RowsConfig",
    "SFTDataConfig",
    "SFTDataFactory",
    "Sample",
    "TokenStore",
    "check_template",
    "chop",
    "count_trained",
    "encode_dialogue",
    "encode_text",
    "plan_packs",
    "render",
    "report_on",
    "store_for",
]
