"""Log-probabilities and entropies of tokens from logits, without a copy of the logits.

Logits are the largest tensors of a step. They are read in chunks of positions, each of which is
cast and normalised again in the backward pass, so that no copy of all of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    counts = mask.bool()
    chosen = labels.long().masked_fill(~counts, 0)

    def of_chosen(logps: Tensor, chosen: Tensor) -> Tensor:
        return logps.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)

    return _computed("token_logps", of_chosen, temperature, logits, counts, chosen)


def token_entropy(logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropies of the distributions over words, in nats, in the shape of `mask`; 0 outside it.

    Args:
        logits: [..., length, words].
        mask: [..., length]; true, or not 0, where a token counts.
        temperature: by which the sampler divided the logits.
    """

    def entropy(logps: Tensor) -> Tensor:
        # A word that cannot be sampled, at a logit of minus infinity, adds nothing.
        return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)

    return _computed("token_entropy", entropy, temperature, logits, mask.bool())


def _computed(
    call: str,
    of_logps: Callable[..., Tensor],
    temperature: float,
    logits: Tensor,
    counts: Tensor,
    *others: Tensor,
) -> Tensor:
    """What `of_logps` makes of the log-probabilities of all words, at each position."""
    if logits.ndim < 2 or logits.shape[:-1] != counts.shape:
        raise ConfigError(
            f"{call}: logits have shape {list(logits.shape)}, mask {list(counts.shape)}: give "
            "logits [..., length, words] and a mask [..., length], both shifted alike."
        )
    if not temperature > 0:
        raise ConfigError(
            f"{call}: temperature={temperature}; it is above 0, 1.0 for the logits as they are."
        )

    def compute(logits: Tensor, counts: Tensor, *others: Tensor) -> Tensor:
        scaled = exact(logits)
        scaled = scaled if temperature == 1.0 else scaled / temperature
        return only(of_logps(scaled.log_softmax(-1), *others), counts)

    return _InChunks.apply(compute, logits, counts, *others)  # pyright: ignore[reportReturnType]


class _InChunks(torch.autograd.Function):
    """A function of the logits at each position, whose backward pass computes it again."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Tensor], logits: Tensor, counts: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(logits, counts, *others)
        return torch.cat([compute(*part) for part in _parts(logits, counts, *others)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, counts, *others = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for into, of_result, part, *rest in _parts(gradient, grad, logits, counts, *others):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                result = ctx.compute(leaf, *rest)
            (of_part,) = torch.autograd.grad(result, leaf, of_result)
            into.copy_(of_part)
        # What is not finite outside the mask times 0 would be no number.
        gradient.masked_fill_(~counts.unsqueeze(-1), 0.0)
        return None, gradient, *[None] * (1 + len(others))


def _parts(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors along the length, which all have; of shifted logits there are such too.

    Those of [..., length, words] have one dimension more than the others.
    """
    positions = max(1, CHUNK // max(1, first[..., :1, :].numel()))
    dim = first.ndim - 2
    return zip(*(t.split(positions, dim) for t in (first, *others)), strict=True)
