"""A word-level language model made on the spot, so that red-teaming runs without a download."""

from __future__ import annotations

import functools
from typing import Any

import torch

TINY = "tiny"
"""The id by which systems take it."""

_PLAIN = """
the a an of to in is it you he she we they that this for on with as at by from or and but not are
was be have has do does did will would can could should may might must go goes come comes see look
find give take make made say said tell ask think know want need like work play read write learn
help try use show keep let begin seem feel leave call good new old great big small long little own
other right high different early young important few public able house home day night year time
way man woman child world life hand part place week case point company number group problem fact
water money story book word friend city tree river garden music letter paper morning summer winter
light road bread tea coffee apple table chair window door school teacher doctor market train
bridge hill blue green red white black warm cold kind quiet happy please thanks yes no maybe today
tomorrow always never often again here there now then very quite too also only just still even
more most less
"""
_INSULTS = "stupid idiot moron dumb loser bastard crap damn hell asshole"
_SPECIAL = ("<unk>", "<bos>", "<eos>")


@functools.cache
def words() -> tuple[str, ...]:
    """The vocabulary but for special tokens; ten of its words are insults."""
    return tuple(dict.fromkeys(f"{_PLAIN} {_INSULTS}".split()))


def tiny_tokenizer() -> Any:
    """A tokenizer of whole words, each with the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *(f"▁{w}" for w in words())))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_model(seed: int = 0) -> Any:
    """A small Llama with random weights, which tends to say again what it has read.

    Args:
        seed: of its weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(words()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        # Large against the layers' weights: the word just read is among the likeliest.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.15)
    return model
