"""Floating-point operations that a language model needs for documents of known lengths.

As in appendix B of PaLM (Chowdhery et al., 2022), a forward pass takes 2 operations for each weight
that a token is multiplied with, and a backward pass twice the forward. Attention is added for each
pair of a token and one that it sees, so by document and window, where PaLM has a row's length
squared. What is computed again in a backward pass (activation checkpointing) is not counted: these
are the operations that the mathematics needs, not those that a run performs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Of the config: how many experts there are.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def pairs(length: int, window: int | None = None) -> int:
    """Pairs of a token and one that it sees, itself included, in causal attention.

    Args:
        length: tokens of the document.
        window: how many tokens a token sees at most, itself included; None for all before it.
    """
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


@dataclass(frozen=True)
class ModelFlops:
    """The operations of a model's forward pass.

    Attributes:
        per_token: of all matrix products with weights, for a token.
        per_pair: of attention, for a pair of tokens, summed over the layers of each window; None is
            the window of layers that see the whole document.
    """

    per_token: int
    per_pair: Mapping[int | None, int] = field(default_factory=dict)

    def forward(self, documents: Iterable[int]) -> int:
        """The operations of a forward pass.

        Args:
            documents: tokens of each document.
        """
        lengths = Counter(documents)
        total = self.per_token * sum(length * count for length, count in lengths.items())
        for window, cost in self.per_pair.items():
            total += cost * sum(pairs(n, window) * count for n, count in lengths.items())
        return total

    def training(self, documents: Iterable[int]) -> int:
        """The operations of a forward and a backward pass, the latter twice the former.

        Args:
            documents: tokens of each document.
        """
        return 3 * self.forward(documents)


def flops_of(model: Any) -> ModelFlops | str:
    """The operations of a causal language model of transformers.

    Weights are those of two or more dimensions that are no embedding: a look-up costs nothing, and
    an embedding that is the output layer too counts as that. Of experts a token takes its share.
    Weights that are not trained count like the others.

    Args:
        model: placed or not, sharded or not.

    Returns:
        The operations, or why they cannot be told.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        return "the model has no config of transformers with num_attention_heads"
    if hasattr(config, "kv_lora_rank"):
        return "its attention compresses keys and values"
    weights = _weights(model, config)
    if weights is None:
        return "its config does not say how many of its experts a token takes"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer = 2 * 2 * config.num_attention_heads * head  # scores, and their product with values
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    default = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    if unknown := set(kinds) - set(windows):
        return f"its layers are of the kind {', '.join(sorted(unknown))}"
    per_pair: Counter[int | None] = Counter()
    for kind in kinds:
        per_pair[windows[kind]] += per_layer
    return ModelFlops(2 * weights, dict(per_pair))


def _weights(model: torch.nn.Module, config: Any) -> int | None:
    """The weights that a token is multiplied with; None if nobody knows how many."""
    shared = experts = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        own = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if "experts" in name.split("."):
            experts += own
        else:
            shared += own
    if not experts:
        return shared
    taken = getattr(config, "num_experts_per_tok", None)
    there = next((n for key in _EXPERTS if (n := getattr(config, key, None))), None)
    if taken is None or there is None:
        return None
    return shared + experts * taken // there
