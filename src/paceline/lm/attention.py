"""Attention by document, for rows that hold several: one causal call for each document.

It is registered with transformers, so that any of its models that looks its attention up there can
be packed:

    attend_by_document(model)
    check_packing(model, capacity=2048)
    logits = model(**packed_inputs(batch)).logits

The documents' lengths come with each batch, as numbers, and reach the attention as a keyword that
models hand down to their layers. A layer that is computed again in a backward pass is given the
same keyword, so recomputing changes nothing. No mask of [length, length] is made, and nothing is
read from the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from paceline.errors import ConfigError, MissingExtraError, counted, some
from paceline.world.seeding import random_state_kept

NAME = "paceline_documents"
"""Of the implementation, for `attn_implementation=` of transformers."""
VARLEN = "paceline_documents_varlen"
"""Of the same by one call of torch's varlen kernel, on CUDA and in half precision."""

_BLOCK = 512  # queries of a windowed document that share a call
# What models hand down to their attention beside what it computes, and it can do without.
_WITHOUT_EFFECT = {
    *("position_ids", "position_embeddings", "cache_position", "logits_to_keep", "return_dict"),
    *("output_hidden_states", "output_router_logits", "num_items_in_batch"),
}
_INSTEAD = "set pack: false, so that each row holds one document"
# Of the largest logit: far above what another order of sums changes, far below what a neighbour's
# tokens do.
_ALLOWED = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ALLOWED_FP32, _ALLOWED_TF32 = 1e-5, 5e-3


class Documents:
    """The lengths of each row's documents, as a model is given them.

    It is an object, and no list, since torch.compile compiles a model anew for lists of another
    length.

    Args:
        rows: lengths of the documents of each row, in order, which sum to the row's length.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows


def register() -> None:
    """Registers both implementations with transformers; a second time changes nothing.

    No mask is registered under their names: transformers would look for documents in the position
    ids first, which waits for the device.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(
            'packing needs the package transformers: pip install "paceline[lm]".'
        )
    _register()


@functools.cache
def _register() -> None:
    from transformers import (  # pyright: ignore[reportMissingImports] - an extra
        AttentionInterface,
    )

    # Compiled, it would be compiled anew for each combination of lengths.
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))
    AttentionInterface.register(VARLEN, torch.compiler.disable(_attend_varlen))


def attend_by_document(model: Any, *, varlen: bool = False) -> None:
    """Has a model of transformers attend by document.

    From then on its calls need `documents` and take neither mask nor cache: see `packed_inputs`. To
    generate with it, give it its own back: `model.set_attn_implementation("sdpa")`.

    Args:
        model: the model itself, in no wrapper.
        varlen: one call of torch's varlen kernel for all documents, on CUDA and in half precision.

    Raises:
        ConfigError: it does not look its attention up with transformers.
        MissingExtraError: transformers is not installed.
    """
    register()
    name = VARLEN if varlen else NAME
    if not hasattr(model, "set_attn_implementation"):
        raise ConfigError(
            f"{type(model).__name__} is no model of transformers, whose attention can be set: "
            f"{_INSTEAD}."
        )
    _set(model, name)
    if model.config._attn_implementation != name:
        raise ConfigError(
            f"{type(model).__name__} has an attention of its own, which cannot be set: {_INSTEAD}."
        )


def packed_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model that attends by document is called with.

    Args:
        batch: that `Collate` made.
    """
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "documents": Documents(batch["documents"]),
        "use_cache": False,
    }


def _set(model: Any, name: str) -> None:
    """Sets a model's attention, without transformers' warning where it cannot."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)


# The attention itself


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, as transformers calls it.

    Args:
        module: the model's layer.
        query: [rows, heads, length, size].
        key, value: [rows, heads or a part of them, length, size].
        attention_mask: refused.
        scaling: of the scores.
        dropout: the part of the weights that is dropped.
        sliding_window: how many tokens a token sees, itself included; None for all before it.
        documents: of each row.
        others: refused if they may have an effect.

    Returns:
        [rows, length, heads, size], and no weights.
    """
    rows = _checked(module, query, key, attention_mask, documents, others)
    if all(row == rows[0] for row in rows):
        parts = [(query, key, value)]
        rows = rows[:1]
    else:
        parts = zip(*(each.split(1) for each in (query, key, value)), strict=True)
    found = []
    for lengths, tensors in zip(rows, parts, strict=True):
        split = (each.split(lengths, dim=2) for each in tensors)
        attended = [
            _causal(q, k, v, scaling, dropout, sliding_window)
            for q, k, v in zip(*split, strict=True)
        ]
        found.append(torch.cat(attended, dim=2))
    return torch.cat(found).transpose(1, 2).contiguous(), None


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within one document, [rows, heads, length, size].

    With a window that is shorter it goes by blocks of queries, each with the keys that its window
    reaches, so that work and memory grow with length times window.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout}
    if window is None or length <= window:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=groups > 1, **options
        )
    if groups > 1:  # kernels that take a mask want as many heads of each
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    found = []
    mask = None
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first = max(0, start - window + 1)
        shape = (stop - start, stop - first)
        if mask is None or mask.shape != shape:
            mask = torch.ones(shape, dtype=torch.bool, device=query.device)
            mask = mask.tril(start - first).triu(start - first - window + 1)
        found.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=mask,
                **options,
            )
        )
    return torch.cat(found, dim=2)


def _attend_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As `_attend`, by one call of torch's varlen kernel."""
    rows = _checked(module, query, key, attention_mask, documents, others)
    name = type(module).__name__
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"{name} attends in {query.dtype} on {query.device.type}: varlen attention is for CUDA "
            "and half precision. Leave varlen off."
        )
    if dropout:
        raise ConfigError(
            f"{name} has an attention dropout of {dropout}, which varlen attention does not have: "
            "set it to 0, or leave varlen off."
        )
    from torch.nn.attention.varlen import varlen_attn

    lengths = tuple(length for row in rows for length in row)
    ends = _ends(lengths, query.device)
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    longest = max(lengths)
    attended = varlen_attn(
        *(q, k, v, ends, ends, longest, longest),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, torch.Tensor)  # nothing else was asked for
    return attended.unflatten(0, (query.shape[0], query.shape[2])), None


@functools.lru_cache(maxsize=4)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where documents end, 0 before the first: made once for all layers, [documents + 1] int32."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True)


def _checked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    documents: Documents | None,
    others: Mapping[str, Any],
) -> list[list[int]]:
    """The lengths of each row's documents.

    Raises:
        ConfigError: they are not there or do not fit, or the model asks for what is not computed.
    """
    name = type(module).__name__
    if not isinstance(documents, Documents):
        raise ConfigError(
            f"{name} attends by document and was given none: call the model with "
            "packed_inputs(batch). If you did, it does not hand keywords down to its attention: "
            f"{_INSTEAD}. To generate, first call model.set_attn_implementation('sdpa')."
        )
    asked = [
        key
        for key, value in others.items()
        if not (value is None or value is False or key in _WITHOUT_EFFECT)
        and (key, value) != ("is_causal", True)
    ]
    if mask is not None:
        asked.append("attention_mask")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        asked.append("attention to later tokens")
    if asked:
        raise ConfigError(
            f"{name} asks for {', '.join(asked)}, which attention by document does not compute: "
            f"{_INSTEAD}."
        )
    count, _, length, _ = query.shape
    if key.shape[2] != length:
        raise ConfigError(
            f"{name} has {length} queries and {key.shape[2]} keys: attention by document takes no "
            "cache. Call the model with use_cache=False."
        )
    rows = documents.rows
    if len(rows) != count or any(sum(row) != length for row in rows):
        sums = some((sum(row) for row in rows), 4)
        raise ConfigError(
            f"{name} has {counted(count, 'row')} of {length} tokens, and is given documents of "
            f"{counted(len(rows), 'row')} with {sums} tokens. The documents of a row sum to its "
            "length; packed rows cannot be split by parallel.context or parallel.pipeline yet."
        )
    return rows


# The check


def check_packing(model: Any, *, capacity: int, seed: int = 0) -> float:
    """Compares the logits of packed documents with those of each document alone.

    The latter are computed by the model's usual attention. Some documents are short, and where the
    model attends within a window that a pack may exceed, one is longer than it. Weights, gradients,
    modes and random generators stay as they are.

    Args:
        model: one that attends by document.
        capacity: tokens that a pack holds: no document is longer.
        seed: of the documents' tokens.

    Returns:
        The largest difference, as a part of the largest logit.

    Raises:
        ConfigError: the logits differ, or the model cannot be called with packed documents.
    """
    used = model.config._attn_implementation
    name = type(model).__name__
    if used not in (NAME, VARLEN):
        raise ConfigError(f"{name} attends by {used!r}: call attend_by_document(model) first.")
    generator = torch.Generator().manual_seed(seed)
    window = _window(model, capacity)
    batches = [[[5, 9, 3], [8, 9]]]
    if window is not None:
        batches.append([[3, window + 5, 2]])
    worst = (0.0, 1.0, 0)
    with _as_in_evaluation(model), random_state_kept():
        for documents in batches:
            difference, largest, length = _compared(model, documents, used, generator)
            if not difference / largest <= worst[0] / worst[1]:  # also if it is no number
                worst = difference, largest, length
    difference, largest, length = worst
    allowed = _allowed(model)
    if not difference / largest <= allowed:
        raise ConfigError(
            f"{name}: the logits of a document of {length} tokens differ by {difference:.2g} when "
            f"it is packed with others (the largest logit is {largest:.2g}; allowed is "
            f"{allowed:.0e} of it). So packing is not exact with this model: {_INSTEAD}."
        )
    return difference / largest


def _compared(
    model: Any, documents: list[list[int]], used: str, generator: torch.Generator
) -> tuple[float, float, int]:
    """The largest difference of packed logits, the largest logit, and the document's length."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    shape = (len(documents), sum(documents[0]))
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    positions = [torch.cat([torch.arange(length) for length in row]) for row in documents]
    batch = {"input_ids": ids, "position_ids": torch.stack(positions).to(device)}
    packed = _logits(model, packed_inputs({**batch, "documents": documents}))
    if not packed.any():
        raise ConfigError(
            f"{type(model).__name__} gives only logits of 0, so that packed documents cannot be "
            f"compared with each alone: initialise its last layer otherwise, or {_INSTEAD}."
        )
    worst = (0.0, 0)
    largest = packed.abs().max().item()
    _set_usual(model)
    try:
        for row, lengths in enumerate(documents):
            parts = (each[row].split(lengths) for each in (ids, packed))
            for one, together in zip(*parts, strict=True):
                alone = _logits(model, {"input_ids": one[None], "use_cache": False})[0]
                difference = (together - alone).abs().max().item()
                if not difference <= worst[0]:
                    worst = difference, len(one)
    finally:
        _set(model, used)
    return worst[0], largest, worst[1]


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    try:
        return model(**inputs).logits.float()
    except (ConfigError, TypeError) as error:
        what = str(error)
        if isinstance(error, TypeError):  # it has no such keyword, say
            what += f". So {_INSTEAD}."
        raise ConfigError(f"{type(model).__name__} cannot be packed: {what}") from error


def _set_usual(model: Any) -> None:
    """Has a model attend as transformers would have it without us."""
    try:
        _set(model, "sdpa")
    except ValueError:  # it has none
        _set(model, "eager")


def _window(model: Any, capacity: int) -> int | None:
    """The widest window of a model's attention that a document in a pack can be longer than.

    Models name theirs differently; a number that is something else makes a document longer than
    needed.
    """
    found = [
        value
        for key, value in model.config.get_text_config().to_dict().items()
        if any(word in key for word in ("window", "chunk", "local")) and type(value) is int
    ]
    return max((size for size in found if 0 < size < capacity), default=None)


def _allowed(model: Any) -> float:
    """The difference that another order of sums can make, as a part of the largest logit."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    exact = torch.get_float32_matmul_precision() == "highest"
    return _ALLOWED.get(dtype, _ALLOWED_FP32 if exact else _ALLOWED_TF32)


@contextmanager
def _as_in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Within, nothing drops out and no gradient is taken; each module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
