"""Language models: their data, attention by document, training and export.

Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.lm.attention import attend_by_document, check_packing, packed_inputs
    from paceline.lm.export import export_huggingface
    from paceline.lm.hf_engine import HFCheckpointEngine
    from paceline.lm.models import (
        HFModelConfig,
        HFModelFactory,
        HFTokenizerConfig,
        HFTokenizerFactory,
    )
    from paceline.lm.samples import GenerateSamples, SamplesConfig
    from paceline.lm.throughput import TokenThroughput
    from paceline.lm.trainers import (
        CausalTrainer,
        LMTrainer,
        LMTrainerConfig,
        SFTTrainer,
        next_token_loss,
    )
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CausalTrainer": "paceline.lm.trainers",
            "GenerateSamples": "paceline.lm.samples",
            "HFCheckpointEngine": "paceline.lm.hf_engine",
            "HFModelConfig": "paceline.lm.models",
            "HFModelFactory": "paceline.lm.models",
            "HFTokenizerConfig": "paceline.lm.models",
            "HFTokenizerFactory": "paceline.lm.models",
            "LMTrainer": "paceline.lm.trainers",
            "LMTrainerConfig": "paceline.lm.trainers",
            "SFTTrainer": "paceline.lm.trainers",
            "SamplesConfig": "paceline.lm.samples",
            "TokenThroughput": "paceline.lm.throughput",
            "attend_by_document": "paceline.lm.attention",
            "check_packing": "paceline.lm.attention",
            "export_huggingface": "paceline.lm.export",
            "next_token_loss": "paceline.lm.trainers",
            "packed_inputs": "paceline.lm.attention",
        },
    )

__all__ = [
    "CausalTrainer",
    "GenerateSamples",
    "HFCheckpointEngine",
    "HFModelConfig",
    "HFModelFactory",
    "HFTokenizerConfig",
    "HFTokenizerFactory",
    "LMTrainer",
    "LMTrainerConfig",
    "SFTTrainer",
    "SamplesConfig",
    "TokenThroughput",
    "attend_by_document",
    "check_packing",
    "export_huggingface",
    "next_token_loss",
    "packed_inputs",
]
