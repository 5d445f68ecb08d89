"""Decoding: one token for every live completion at each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.parallel.ddp import unwrap
from paceline.rl.engine import Completion, Request, Sampling


def decode(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    tokenizer: Any = None,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
    version: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Completes prompts, all sampled alike, in one batch.

    A prompt that several requests share is read once. A completion that has ended leaves the
    batch.

    Args:
        model: as for `LocalEngine`, in eval mode.
        requests: what is wanted.
        sampling: how all of their tokens are chosen.
        tokenizer, end_ids, pad_id, version, check_stop: as for `LocalEngine`.

    Raises:
        ConfigError: a prompt is empty, or there is no room for its completion in the model's
            context.
    """
    _check(model, requests, sampling, tokenizer)
    device = next(model.parameters()).device
    places: dict[tuple[int, ...], int] = {}  # of each prompt, once
    of = [places.setdefault(tuple(map(int, one.ids)), len(places)) for one in requests]
    texts = list(places)
    ids, mask = _left_padded(texts, pad_id)
    ids, mask = ids.to(device), mask.to(device)
    step = _Steps(model)
    logits = step(ids, mask)

    live = list(range(len(requests)))
    if of != list(range(len(texts))):
        index = torch.tensor(of, device=device)
        logits, mask = logits[index], mask[index]
        step.select(index)
    noise = _noise(requests, sampling).to(device)
    tokens: list[list[int]] = [[] for _ in requests]
    logps: list[list[float]] = [[] for _ in requests]
    ended: list[Any] = ["length"] * len(requests)
    for t in range(sampling.max_new_tokens):
        check_stop()
        scaled = logits.float()
        if sampling.temperature:
            scaled = scaled / sampling.temperature
        logprobs = scaled.log_softmax(-1)
        chosen = _choose(logprobs, noise[:, t] if sampling.temperature else None, sampling)
        of_chosen = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        still = []
        for row, (i, token) in enumerate(zip(live, chosen.tolist(), strict=True)):
            if not np.isfinite(of_chosen[row]):
                raise ConfigError(
                    f"the model's logits after {len(requests[i].ids) + t} tokens are not finite: "
                    "nothing can be sampled from them."
                )
            tokens[i].append(token)
            logps[i].append(of_chosen[row])
            if token in end_ids:
                ended[i] = "end"
            elif sampling.stop and _stops(tokenizer, tokens[i], sampling.stop):
                ended[i] = "stop"
            else:
                still.append(row)
        if not still or t + 1 == sampling.max_new_tokens:
            break
        if len(still) < len(live):
            live = [live[row] for row in still]
            index = torch.tensor(still, device=device)
            chosen, mask, noise = chosen[index], mask[index], noise[index]
            step.select(index)
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        logits = step(chosen[:, None], mask)
    return [
        Completion(np.array(t, np.int32), np.array(p, np.float32), e, version)
        for t, p, e in zip(tokens, logps, ended, strict=True)
    ]


def _left_padded(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and where there are some, [texts, longest]: all texts end at the right."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, longest - len(text) :] = torch.tensor(text)
        mask[i, longest - len(text) :] = 1
    return ids, mask


class _Steps:
    """A model that reads its texts on, keeping keys and values."""

    def __init__(self, model: Any) -> None:
        named = inspect.signature(model.forward).parameters
        self._model = model
        self._name = "cache" if "cache" in named else "past_key_values"
        self._settings = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        self._cache: Any = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The logits after the last of new tokens, [texts, words].

        Args:
            ids: new tokens, [texts, tokens].
            mask: which tokens there are, of those before too, [texts, all tokens].
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._name: self._cache},
            **self._settings,
        )
        self._cache = getattr(out, self._name)
        return out.logits[:, -1]

    def select(self, index: torch.Tensor) -> None:
        """Goes on with some of the texts, or with several copies of one.

        Args:
            index: which, [texts].
        """
        self._cache.batch_select_indices(index)


def _noise(requests: Sequence[Request], sampling: Sampling) -> torch.Tensor:
    """One uniform number for each token of each completion, from its own seed."""
    drawn = [
        torch.rand(
            sampling.max_new_tokens,
            generator=torch.Generator().manual_seed(request.seed & (2**64 - 1)),
            dtype=torch.float64,
        )
        for request in requests
    ]
    return torch.stack(drawn)


def _choose(
    logprobs: torch.Tensor, uniform: torch.Tensor | None, sampling: Sampling
) -> torch.Tensor:
    """The next token of each completion, [completions]."""
    if uniform is None:
        return logprobs.argmax(-1)
    words = logprobs.shape[-1]
    if 0 < sampling.top_k < words:
        least = logprobs.topk(sampling.top_k, -1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    probs = logprobs.double().softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        left_out = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), 0.0)
    below = probs.cumsum(-1)
    total = below[:, -1:].contiguous()
    found = torch.searchsorted(below, uniform[:, None] * total, right=True)
    last = torch.searchsorted(below, total)  # where rounding reaches the sum: no word of 0
    return torch.minimum(found, last)[:, 0].clamp(max=words - 1)  # where all is NaN


def _stops(tokenizer: Any, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether the text of a completion has come to one that ends it."""
    # A token has at least a byte, so that no stop text is made of more tokens than bytes.
    tail = ids[-max(len(text.encode()) for text in stop) - 8 :]
    text = tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(ending in text for ending in stop)


def _check(model: Any, requests: Sequence[Request], sampling: Sampling, tokenizer: Any) -> None:
    if sampling.stop and tokenizer is None:
        raise ConfigError("engine: stop texts need a tokenizer to decode what is sampled.")
    context = context_length(model)
    for request in requests:
        length = len(request.ids)
        if length == 0:
            raise ConfigError(
                "engine: a prompt has no tokens: begin it with the tokenizer's BOS token."
            )
        if context is not None and length + sampling.max_new_tokens > context:
            raise ConfigError(
                f"engine: a prompt of {length} tokens and max_new_tokens="
                f"{sampling.max_new_tokens} exceed the model's context of {context}: ask for fewer "
                "tokens, or keep the end of the prompt (cut_to_context)."
            )


def context_length(model: Any) -> int | None:
    """The most tokens that a model takes; None where it does not say.

    Args:
        model: of transformers.
    """
    return getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)


def cut_to_context(ids: Any, model: Any, max_new_tokens: int) -> Any:
    """The last tokens of a prompt, as many as leave room for a completion; all if they do.

    Args:
        ids: of the prompt, [length].
        model: whose context it is.
        max_new_tokens: of the completion.

    Raises:
        ConfigError: the completion alone fills the context.
    """
    context = context_length(model)
    if context is None:
        return ids
    if max_new_tokens >= context:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: the model's context of {context} tokens has no room "
            "for a prompt beside them."
        )
    return ids[-(context - max_new_tokens) :]
