"""Tiny models of transformers in folders, and a trainer that takes them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from paceline.factories import FactoryTrainer, get_config
from paceline.lm.models import HFModelFactory, HFTokenizerFactory

TOKENS = 600  # of the tokenizer of these tests
IDS = torch.arange(8 * 6).reshape(8, 6) * 7 % 300


def model(kind: str = "llama", *, tied: bool = False, vocabulary: int = TOKENS) -> Any:
    import transformers

    torch.manual_seed(5)
    sizes = {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **sizes,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def saved(folder: Path, tokenizer: Any = None, **form: Any) -> Path:
    model(**form).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


class Tiny(FactoryTrainer):
    """Predicts the next token of each row."""

    name = "tiny_lm"
    model_factory_type = HFModelFactory
    tokenizer_factory_type = HFTokenizerFactory

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


def trainer(run_dir: Path | None, sections: dict[str, Any], *callbacks: Any, **more: Any) -> Tiny:
    """Two SGD steps, of which the last is saved."""
    recipe = {"trainer": {"type": "tiny_lm"}, "optimizer": {"type": "sgd", "lr": 0.1}, **sections}
    settings: dict[str, Any] = {
        "train_dataloader": DataLoader(IDS, batch_size=4),  # pyright: ignore
        "max_steps": 2,
        "progress": False,
        "run_dir": run_dir,
        "callbacks": [*callbacks],
        **more,
    }
    return Tiny(get_config(recipe), **settings)
