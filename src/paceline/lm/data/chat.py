"""Chat templates: a dialogue becomes token ids, and labels on its answers alone.

Labels come from character spans of the rendered dialogue and the tokens' offsets, never from a
search for an answer's text and never from the pad id. A span is what the template wraps in
`{% generation %}`. Without such blocks it reaches from the rendering of all that comes before the
answer, with the generation prompt, to the rendering that includes the answer; both must be
prefixes of the whole. A template for which they are not (one that drops earlier thoughts, say)
gives no span, and the dialogue is refused rather than guessed at.

A span ends with the end-of-turn token, which is trained. The white space that many templates
write after it, such as the newline after `<|im_end|>`, is not: a model stops at the token before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Literal, get_args

import numpy as np

from paceline.errors import ConfigError
from paceline.lm.data.rows import needs
from paceline.lm.data.sample import IGNORED, Sample

Truncate = Literal["drop", "end", "start"]

TOO_LONG = "longer than max_length"
CUT_END = "cut at the end"
CUT_START = "cut at the start"
NO_LABEL = "no trained token"
NO_LABEL_LEFT = "no trained token left after the cut"
NO_TEXT = "no text"
NO_MESSAGE = "no message"
NO_ROLE = "a message is not a mapping with a role"
NO_CONTENT = "a message without content"
NOT_TEXT = "a message with other content than text"
NO_QUESTION = "an answer before any other message"
NO_PREFIX = "the template rewrites earlier messages, so an answer's place is unknown"
BLOCKS_UNCLEAR = "the template's {% generation %} blocks cannot be located"
CROSSED = "a token crosses the start of an answer"
NO_END = "an answer without an end-of-turn token"

_OPENING = re.compile(r"(\{%[-+]?\s*generation\s*([-+]?)%\})(\n?)")
_CLOSING = re.compile(r"(^[ \t]*)?(\{%([-+]?)\s*endgeneration\s*[-+]?%\})", flags=re.MULTILINE)
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class Refusal:
    """Why a row gives no sample.

    Attributes:
        reason: a short phrase, equal for all rows that are refused for the same reason.
    """

    reason: str


class _RefusedError(Exception):
    """Carries a reason out of the functions below; never leaves this module."""


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template, with what a dialogue gives it beside its messages."""

    tokenizer: Any
    tools: Sequence[Any] | None
    arguments: Mapping[str, Any]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        source: str | None = None,
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.arguments,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise _RefusedError(f"the template refuses the dialogue: {said[0][:120]}") from error

    @property
    def source(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.tools)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> str:
    """A dialogue as the tokenizer's chat template writes it.

    Args:
        tokenizer: one of transformers, with a chat template.
        messages: mappings with `role` and `content`; a content may be a list of text parts.
        add_generation_prompt: end with what opens an answer.
        tools: descriptions of tools, if the template knows them.
        template_arguments: other variables of the template, such as `enable_thinking`.

    Raises:
        ConfigError: the template refuses the dialogue.
    """
    template = _Template(tokenizer, tools, template_arguments or {})
    try:
        return template.render(_plain(messages), prompt=add_generation_prompt)
    except _RefusedError as refused:
        raise ConfigError(f"this dialogue cannot be rendered: {refused}") from refused


def encode_dialogue(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    truncate: Truncate = "drop",
    trained_roles: Sequence[str] = ("assistant",),
    ignore_empty_think: bool = False,
    tools: Sequence[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    counts: Counter[str] | None = None,
) -> Sample | Refusal:
    """Token ids and labels of a dialogue; what is trained are the answers with their end tokens.

    The ids are those of the rendered dialogue, without any special token that the template does
    not write: a second BOS cannot arise. Where the prompt's last characters and the answer's first
    would share a token, the text is split there, as it is when a model answers.

    Args:
        tokenizer: a fast one of transformers that `check_template` accepts.
        messages: mappings with `role` and `content`, in the order of the dialogue, given to the
            template as they are; a content may be a list of text parts.
        max_length: in tokens; None for no limit.
        truncate: what happens with a longer dialogue. "drop": it is refused. "end": its end is cut.
            "start": its first turns are left out, a turn being a user's message and all up to the
            next; system messages at the beginning stay. If no trained token is left: refused.
        trained_roles: whose messages are trained: of "assistant" the answer, of others the whole
            message with its header.
        ignore_empty_think: do not train `<think></think>` without a thought at an answer's start.
        tools: descriptions of tools, if the template knows them.
        template_arguments: other variables of the template, such as `enable_thinking`.
        counts: counts cuts and refusals by reason.

    Returns:
        The sample, or why there is none.
    """
    counts = _counts(counts, truncate)
    try:
        template = _Template(tokenizer, tools, template_arguments or {})
        plain = _plain(messages)

        def encode(part: Sequence[Mapping[str, Any]]) -> Sample:
            return _encode(template, part, trained_roles, ignore_empty_think)

        sample = encode(plain)
        if max_length is not None and len(sample.ids) > max_length:
            sample = _shortened(sample, plain, encode, max_length, truncate, counts)
        return sample
    except _RefusedError as refused:
        return _refuse(str(refused), counts)


def encode_text(
    tokenizer: Any,
    text: str,
    *,
    max_length: int | None = None,
    truncate: Truncate = "drop",
    counts: Counter[str] | None = None,
) -> Sample | Refusal:
    """Token ids of a text, all of them trained.

    It begins with BOS and ends with EOS, each exactly once, where the tokenizer defines them.

    Args:
        tokenizer: one of transformers.
        text: the document.
        max_length: in tokens, BOS and EOS included; None for no limit.
        truncate: what happens with a longer text. "drop": it is refused. "end": its end is cut, EOS
            with it. "start": its start is cut, after BOS.
        counts: counts cuts and refusals by reason.

    Returns:
        The sample, or why there is none.
    """
    counts = _counts(counts, truncate)
    if not isinstance(text, str) or not text:
        return _refuse(NO_TEXT, counts)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    opening = [] if bos is None else [bos]
    ids = ids if ids[:1] == opening else opening + ids
    if eos is not None and (len(ids) == len(opening) or ids[-1] != eos):
        ids.append(eos)
    if max_length is not None and len(ids) > max_length:
        if truncate == "drop":
            return _refuse(TOO_LONG, counts)
        if truncate == "end":
            ids = ids[:max_length]
        else:
            ids = opening + ids[len(ids) - max(0, max_length - len(opening)) :]
        if len(ids) < 2:
            return _refuse(NO_LABEL_LEFT, counts)
        counts[CUT_END if truncate == "end" else CUT_START] += 1
    found = np.asarray(ids, dtype=np.int32)
    return Sample(found, found.copy())


def check_template(tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> str:
    """Refuses a tokenizer with which dialogues cannot be trained, before any data is read.

    Args:
        tokenizer: one of transformers.
        template_arguments: variables of the template, as for `encode_dialogue`.

    Returns:
        The end-of-turn token's text.

    Raises:
        ConfigError: it has no chat template, no end token or no offsets, or its template would
            leave the end-of-turn token untrained.
        MissingExtraError: the package jinja2 is not installed.
    """
    needs("jinja2", "chat templates")
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    wrong = f"the tokenizer {name!r} cannot be used for dialogues:"
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{wrong} it is a slow one, without the tokens' offsets. Load it with AutoTokenizer "
            "from a folder that has a tokenizer.json."
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{wrong} it has no chat template. Take the model's instruct version, or set "
            "tokenizer.chat_template."
        )
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"{wrong} it has no end token. Set tokenizer.eos_token to what its template writes "
            "at an answer's end."
        )
    probe = [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
    ]
    template = _Template(tokenizer, None, template_arguments or {})
    try:
        sample = _encode(template, probe, ("assistant",), False)
    except _RefusedError as refused:
        reason = str(refused)
        if reason == NO_END:
            cure = (
                "Move the token into the block."
                if _OPENING.search(template.source)
                else f"Let it write {tokenizer.eos_token} after each answer."
            )
            reason = f"its template would leave the end-of-turn token untrained. {cure}"
        elif reason in (NO_PREFIX, BLOCKS_UNCLEAR, CROSSED):
            reason = f"{reason}. Wrap its answers, end token included, in {{% generation %}}."
        raise ConfigError(f"{wrong} {reason}") from refused
    return tokenizer.decode([int(sample.ids[sample.labels != IGNORED][-1])])


def _counts(counts: Counter[str] | None, truncate: str) -> Counter[str]:
    if truncate not in get_args(Truncate):
        known = ", ".join(get_args(Truncate))
        raise ConfigError(f"truncate={truncate!r}: choose one of {known}.")
    return Counter() if counts is None else counts


def _refuse(reason: str, counts: Counter[str]) -> Refusal:
    counts[reason] += 1
    return Refusal(reason)


def _plain(messages: Any) -> list[dict[str, Any]]:
    """The messages, each content that is a list of text parts joined to a string."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise _RefusedError(NO_ROLE)
    if not messages:
        raise _RefusedError(NO_MESSAGE)
    plain = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _RefusedError(NO_ROLE)
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise _RefusedError(NO_CONTENT)
        plain.append({**message, "content": _text(content)})
    return plain


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _RefusedError(NOT_TEXT)
    parts = [part if isinstance(part, str) else _text_part(part) for part in content]
    return "".join(parts)


def _text_part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
        return text
    raise _RefusedError(NOT_TEXT)


def _encode(
    template: _Template,
    messages: Sequence[Mapping[str, Any]],
    trained_roles: Sequence[str],
    ignore_empty_think: bool,
) -> Sample:
    text = template.render(messages)
    spans = _spans(template, messages, text, trained_roles)
    if ignore_empty_think:
        spans = [(_after_empty_think(text, start, stop), stop) for start, stop in spans]
    ids, offsets = _tokens(template.tokenizer, text, [start for start, _ in spans])
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, stop in spans:
        first, end = np.searchsorted(offsets[:, 0], [start, stop])
        end = _end_of_turn(template.tokenizer, text, ids, offsets, int(first), int(end))
        labels[first:end] = ids[first:end]
    if not (labels[1:] != IGNORED).any():
        raise _RefusedError(NO_LABEL)
    return Sample(ids, labels)


def _after_empty_think(text: str, start: int, stop: int) -> int:
    found = _EMPTY_THINK.match(text, start, stop)
    return found.end() if found else start


def _end_of_turn(
    tokenizer: Any, text: str, ids: np.ndarray, offsets: np.ndarray, first: int, end: int
) -> int:
    """The position after a span's end-of-turn token: its last token but white space."""
    while end > first and not text[slice(*offsets[end - 1])].strip():
        end -= 1
    if end == first or tokenizer.decode([int(ids[end - 1])], skip_special_tokens=True):
        raise _RefusedError(NO_END)
    return end


def _spans(
    template: _Template,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    trained_roles: Sequence[str],
) -> list[tuple[int, int]]:
    """Where in the rendered text the trained messages are, as pairs (start, stop) of characters."""
    by_prefix = set(trained_roles)
    spans: list[tuple[int, int]] = []
    if "assistant" in by_prefix and _OPENING.search(source := template.source):
        spans += _generation_spans(template, messages, text, source)
        by_prefix.remove("assistant")
    for index, message in enumerate(messages):
        if message["role"] in by_prefix:
            spans.append(_prefix_span(template, messages, index, text))
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start and not by_prefix:
            start, _ = joined.pop()  # blocks without a gap are one answer
        joined.append((start, stop))
    return joined


def _generation_spans(
    template: _Template, messages: Sequence[Mapping[str, Any]], text: str, source: str
) -> list[tuple[int, int]]:
    """The spans of `{% generation %}` blocks.

    The template is rendered again with a mark at both ends of each block. Two characters for
    private use serve as marks, such as the text does not hold.
    """
    unused = (chr(code) for code in count(0xF0000) if chr(code) not in text)
    opening, closing = next(unused), next(unused)
    marked = template.render(messages, source=_with_marks(source, opening, closing))
    spans, plain, start = [], [], None
    length = 0
    for piece in re.split(f"([{opening}{closing}])", marked):
        if piece == opening:
            start = length
        elif piece == closing:
            if start is None:
                raise _RefusedError(BLOCKS_UNCLEAR)
            if length > start:
                spans.append((start, length))
            start = None
        else:
            plain.append(piece)
            length += len(piece)
    if "".join(plain) != text or start is not None:  # the template looks at its own output
        raise _RefusedError(BLOCKS_UNCLEAR)
    return spans


def _with_marks(source: str, opening: str, closing: str) -> str:
    """A template that writes marks inside its blocks, with the white space that it wrote before.

    transformers renders with trim_blocks and lstrip_blocks: a newline after a tag and blanks
    before one that begins a line are left out. The marks must not change that.
    """

    def open_block(match: re.Match[str]) -> str:
        tag, control, newline = match.groups()
        kept = newline if control == "+" else ""
        return f"{tag}{{{{ '{opening}' {'-' if control == '-' else ''}}}}}{kept}"

    def close_block(match: re.Match[str]) -> str:
        blanks, tag, control = match.groups()
        kept = blanks or "" if control == "+" else ""
        return f"{kept}{{{{{'-' if control == '-' else ''} '{closing}' }}}}{tag}"

    return _CLOSING.sub(close_block, _OPENING.sub(open_block, source))


def _prefix_span(
    template: _Template, messages: Sequence[Mapping[str, Any]], index: int, text: str
) -> tuple[int, int]:
    """From the rendering of what comes before a message to the one that includes it."""
    answer = messages[index]["role"] == "assistant"
    if answer and not index:
        raise _RefusedError(NO_QUESTION)
    before = template.render(messages[:index], prompt=answer) if index else ""
    after = text if index + 1 == len(messages) else template.render(messages[: index + 1])
    if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
        raise _RefusedError(NO_PREFIX)
    return len(before), len(after)


def _tokens(tokenizer: Any, text: str, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, [n] int32, and their offsets in characters, [n, 2]; no token crosses a start."""
    ids, offsets = _tokenize(tokenizer, text)
    crossed = [s for s in starts if ((offsets[:, 0] < s) & (s < offsets[:, 1])).any()]
    if not crossed:
        return ids, offsets
    bounds = [0, *crossed, len(text)]
    parts = [_tokenize(tokenizer, text[a:b], a) for a, b in pairwise(bounds)]
    split = np.concatenate([part for part, _ in parts])
    if tokenizer.decode(split) != tokenizer.decode(ids):  # it writes a blank before each text
        raise _RefusedError(CROSSED)
    return split, np.concatenate([part for _, part in parts])


def _tokenize(tokenizer: Any, text: str, at: int = 0) -> tuple[np.ndarray, np.ndarray]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.asarray(found["input_ids"], dtype=np.int32), offsets + at


def _shortened(
    sample: Sample,
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]]], Sample],
    max_length: int,
    truncate: Truncate,
    counts: Counter[str],
) -> Sample:
    """A sample of at most `max_length` tokens, made from one that is longer."""
    if truncate == "end":
        sample = Sample(sample.ids[:max_length], sample.labels[:max_length])
        if not (sample.labels[1:] != IGNORED).any():
            raise _RefusedError(NO_LABEL_LEFT)
        counts[CUT_END] += 1
        return sample
    if truncate == "start" and (fitting := _last_turns(messages, encode, max_length)):
        counts[CUT_START] += 1
        return fitting
    raise _RefusedError(TOO_LONG)


def _last_turns(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]]], Sample],
    max_length: int,
) -> Sample | None:
    """The most of a dialogue's last turns that fit, if one does."""
    roles = [message["role"] for message in messages]
    lead = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), 0)
    turns = [i for i, role in enumerate(roles) if role == "user" and i > lead]
    fitting = None
    low, high = 0, len(turns)  # turns[:low] are too early; from turns[high] on it fits
    while low < high:
        middle = (low + high) // 2
        sample = encode([*messages[:lead], *messages[turns[middle] :]])
        if len(sample.ids) <= max_length:
            fitting, high = sample, middle
        else:
            low = middle + 1
    return fitting
