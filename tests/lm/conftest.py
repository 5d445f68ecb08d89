"""A tokenizer trained here, and chat templates of several kinds: nothing is downloaded."""

from __future__ import annotations

import os
import pydoc_data.topics

import pytest

from paceline.testing import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
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


@pytest.fixture(scope="session")
def ranks_with_models():
    """As `ranks`, from a helper that has imported transformers."""
    ranks = Ranks(preload=["preloaded", "preloaded_models"])
    yield ranks
    ranks.close()
