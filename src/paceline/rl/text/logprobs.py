"""Log-probabilities of completions under a model, with gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.losses.tokens import token_entropy, token_logps
from paceline.parallel.ddp import unwrap
from paceline.rl.text.value_head import values_seen


@dataclass(frozen=True)
class Scored:
    """How likely completions are, padded at the right to the longest.

    Attributes:
        logps: log-probability of each token in nats, [completions, tokens] float32; 0 outside
            `mask`.
        mask: where a completion has a token, [completions, tokens] bool.
        entropy: of the distribution of each token in nats, as `logps`; None if not asked for.
        values: before each token, as `logps`; None if not asked for.
    """

    logps: torch.Tensor
    mask: torch.Tensor
    entropy: torch.Tensor | None = None
    values: torch.Tensor | None = None


def completion_logps(
    model: Any,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    values: bool = False,
) -> Scored:
    """How likely a causal model finds completions of prompts; gradients flow.

    Prompts and completions are token ids, joined as they are: nothing is tokenised again. What is
    padding follows from lengths, never from ids.

    Args:
        model: of transformers, or one that is called alike.
        prompts: token ids, each at least one, [length] integers.
        completions: token ids, one completion for each prompt, [length] integers.
        temperature: by which the logits are divided: the sampler's, where the result is compared
            with what it recorded.
        entropy: whether to give entropies too.
        values: whether to give those of the model's value head too.

    Raises:
        ConfigError: a prompt is empty, or there are not as many completions as prompts.
    """
    if len(prompts) != len(completions):
        raise ConfigError(
            f"completion_logps: {len(prompts)} prompts and {len(completions)} completions: give "
            "one completion for each prompt."
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError(
            "completion_logps: a prompt has no tokens, so that nothing predicts the first token "
            "of its completion: begin it with the tokenizer's BOS token."
        )
    device = next(model.parameters()).device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(completion) for completion in completions], device=device)
    longest = max((len(completion) for completion in completions), default=0)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    if longest == 0:
        empty = torch.zeros(mask.shape, device=device)
        return Scored(empty, mask, empty if entropy else None, empty if values else None)

    texts = [
        [*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.as_tensor(text)
    ids = ids.to(device)
    place = torch.arange(ids.shape[1], device=device)
    attended = place < (starts + lengths)[:, None]
    keep = ids.shape[1] - min(map(len, prompts)) + 1  # logits from before the first completion on
    named = inspect.signature(unwrap(model).forward).parameters
    settings = {"logits_to_keep": keep} if "logits_to_keep" in named else {}
    with values_seen(model) if values else nullcontext([]) as seen:
        logits = model(
            input_ids=ids,
            attention_mask=attended.long(),
            position_ids=(attended.cumsum(1) - 1).clamp(min=0),
            **settings,
        ).logits
    logits = logits[:, -keep:-1]
    labels, at = ids[:, 1 - keep :], place[1 - keep :]
    sampled = (at >= starts[:, None]) & attended[:, 1 - keep :]
    # From places in the text to places in the completion.
    index = starts[:, None] - at[0] + torch.arange(longest, device=device)
    index = index.clamp(max=len(at) - 1)

    def of_completion(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index).masked_fill(~mask, 0.0).float()

    logps = token_logps(logits, labels, sampled, temperature=temperature)
    entropies = token_entropy(logits, sampled, temperature=temperature) if entropy else None
    return Scored(
        of_completion(logps),
        mask,
        None if entropies is None else of_completion(entropies),
        of_completion(seen[0][:, -keep:-1]) if values else None,
    )


def mismatch(
    logps_trainer: torch.Tensor, logps_sampler: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """How far the trainer's log-probabilities of sampled tokens are from the sampler's.

    Both are of the same weights: what differs comes from kernels, precision, or a mistake.

    Args:
        logps_trainer: of each token, [completions, tokens], from `completion_logps`.
        logps_sampler: of the same tokens, as `Completion.logprobs` records them.
        mask: where there is a token, [completions, tokens].

    Returns:
        By the names of an experience's row: the mean and the largest absolute difference, and an
        estimate of KL(sampler || trainer) in nats a token, the mean of r - 1 - log r for the ratio
        r of trainer to sampler. Nothing if there is no token.
    """
    counts = mask.bool()
    if not counts.any():
        return {}
    difference = (logps_trainer.detach().double() - logps_sampler.double())[counts]
    return {
        "rollout/logprob_difference/mean": float(difference.abs().mean()),
        "rollout/logprob_difference/max": float(difference.abs().max()),
        "rollout/logprob_kl": float((difference.expm1() - difference).mean()),
    }
