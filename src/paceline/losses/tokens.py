"""Log-probabilities and entropies of tokens from logits, without a copy of the logits.

Logits are the largest tensors of a step. They are read in chunks of positions, each of which is
cast and normalised again in the backward pass, so that no copy of all of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paceline.errors import ConfigError
from paceline.losses.masked import check_shapes, exact, only

CHUNK = 2**24  # logits in a chunk, 64 MiB in float32


def token_logps(
    logits: Tensor, labels: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of tokens, in the shape of `labels`; 0 outside the mask.

    Args:
        logits: [..., length, words]: those from which each label was, or could have been, sampled.
            A causal model's are shifted: `token_logps(logits[:, :-1], ids[:, 1:], mask[:, 1:])`.
        labels: token ids, [..., length]; anything outside the mask, such as -100.
        mask: [..., length]; true, or not 0, where a token counts.
        temperature: by which the sampler divided the logits.
    """
    check_shapes("token_logps", labels=labels, mask=mask)

    def compute(logits: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
        scaled = _scaled(logits, counts, temperature)
        chosen = labels.long().masked_fill(~counts, 0).unsqueeze(-1)
        return only(scaled.gather(-1, chosen).squeeze(-1) - scaled.logsumexp(-1), counts)

    return _in_chunks("token_logps", compute, temperature, logits, mask, labels)


def token_entropy(logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropies of the distributions over words, in nats, in the shape of `mask`; 0 outside it.

    Args:
        logits: [..., length, words].
        mask: [..., length]; true, or not 0, where a token counts.
        temperature: by which the sampler divided the logits.
    """

    def compute(logits: Tensor, counts: Tensor) -> Tensor:
        logps = _scaled(logits, counts, temperature).log_softmax(-1)
        # A word that cannot be sampled, at a logit of minus infinity, adds nothing.
        entropy = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)
        return only(entropy, counts)

    return _in_chunks("token_entropy", compute, temperature, logits, mask)


def _scaled(logits: Tensor, counts: Tensor, temperature: float) -> Tensor:
    scaled = exact(logits).masked_fill(~counts.unsqueeze(-1), 0.0)
    return scaled if temperature == 1.0 else scaled / temperature


def _in_chunks(
    call: str,
    compute: Callable[..., Tensor],
    temperature: float,
    logits: Tensor,
    mask: Tensor,
    *others: Tensor,
) -> Tensor:
    if logits.ndim < 2 or logits.shape[:-1] != mask.shape:
        raise ConfigError(
            f"{call}: logits have shape {list(logits.shape)}, mask {list(mask.shape)}: give logits "
            "[..., length, words] and a mask [..., length], both shifted alike."
        )
    if not temperature > 0:
        raise ConfigError(
            f"{call}: temperature={temperature}; it is above 0, 1.0 for the logits as they are."
        )
    # Along the length, where parts are views of logits that were shifted.
    positions = max(1, CHUNK // max(1, logits[..., :1, :].numel()))
    of_tokens = (t.split(positions, dim=-1) for t in (mask.bool(), *others))
    parts = zip(logits.split(positions, dim=-2), *of_tokens, strict=True)
    computed = [
        checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.cat(computed, -1)  # pyright: ignore[reportArgumentType]
