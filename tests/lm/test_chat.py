"""Dialogues become labels on their answers with the end tokens: no more, no less."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.lm.data.chat import (
    Refusal,
    check_template,
    encode_dialogue,
    encode_text,
    render,
)
from paceline.lm.data.sample import IGNORED, Sample

END = "<|im_end|>"
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ANSWER = "{% if m['role'] == 'assistant' %}"


@dataclass(frozen=True)
class Written:
    """A template, and by hand what it writes: of each message what opens it and what is trained."""

    source: str
    begin: str
    header: Callable[[str], str]
    body: Callable[[str], str]
    gap: str  # between an end token and the next message

    def text(self, messages) -> str:
        turns = [self.header(m["role"]) + self.body(m["content"]) + END for m in messages]
        return self.begin + "".join(turn + self.gap for turn in turns)

    def answers(self, messages) -> list[str]:
        return [self.body(m["content"]) + END for m in messages if m["role"] == "assistant"]


TEMPLATES = {
    "chatml": Written(
        LOOP
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        + PROMPT,
        "",
        lambda role: f"<|im_start|>{role}\n",
        str,
        "\n",
    ),
    "llama, which writes BOS and trims": Written(
        "{{ bos_token }}"
        + LOOP
        + "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
        "<|bos|>",
        lambda role: f"<|im_start|>{role}\n\n",
        str.strip,
        "",
    ),
    "generation blocks": Written(
        LOOP
        + "{{ '<|im_start|>' + m['role'] + '\n' }}\n"
        + "  {% if m['role'] == 'assistant' %}\n"
        + "    {% generation %}\n{{ m['content'] }}{{ '<|im_end|>\n' }}\n    {% endgeneration %}\n"
        + "  {% else %}\n{{ m['content'] + '<|im_end|>\n' }}\n{% endif %}{% endfor %}"
        + PROMPT,
        "",
        lambda role: f"<|im_start|>{role}\n\n",
        str,
        "\n\n",
    ),
    "generation blocks with dashes": Written(
        LOOP
        + "{{ '<|im_start|>' + m['role'] + '\n' }}"
        + ANSWER
        + "\n {%- generation -%} \n {{ m['content'] }}{{ '<|im_end|>' }} \n"
        + " {%- endgeneration -%} \n"
        + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        + PROMPT,
        "",
        lambda role: f"<|im_start|>{role}\n",
        str,
        "\n",
    ),
}


def with_template(tokenizer, source):
    other = copy.copy(tokenizer)
    other.chat_template = source
    return other


def dialogue(*contents: str) -> list[dict]:
    """A user's question, the answer, and so on."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def trained(tokenizer, sample: Sample) -> list[str]:
    """The texts that are trained, one for each run of labels."""
    on = sample.labels != IGNORED
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], on, [0]])))
    runs = zip(bounds[::2], bounds[1::2], strict=True)
    return [tokenizer.decode(sample.ids[a:b].tolist()) for a, b in runs]


def check_labels(tokenizer, written: Written, messages) -> None:
    """They are the answers with their end tokens, no more and no less."""
    sample = encode_dialogue(with_template(tokenizer, written.source), messages)
    assert isinstance(sample, Sample), sample
    assert tokenizer.decode(sample.ids.tolist()) == written.text(messages)
    assert trained(tokenizer, sample) == written.answers(messages)
    on = sample.labels != IGNORED
    assert (sample.labels[on] == sample.ids[on]).all()
    assert sample.ids.dtype == sample.labels.dtype == np.int32


PIECES = (
    *("yes", "no", " ", "\n", "\n\n", "Why?", "1", END, "<|im_start|>assistant\n", "[/ANSWER]"),
    *("é", "e\u0301", "漢", "🙂", "\u2003", "\U000f0000"),  # the last is one of the marks of blocks
)
contents = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@st.composite
def dialogues(draw) -> list[dict]:
    """Of few texts, so that answers repeat, and are asked for in their own words."""
    roles = draw(st.sampled_from(["ua", "sua", "uaua", "suaua", "uata", "uaa", "uuaua", "uau"]))
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    texts = st.sampled_from(draw(st.lists(contents, min_size=1, max_size=3)))
    return [{"role": names[role], "content": draw(texts)} for role in roles]


BLOCKS = {  # how an answer is wrapped: what opens and closes it, and white space that is stripped
    "none": ("", "", ""),
    "plain": ("{% generation %}", "{% endgeneration %}", ""),
    "closed up": ("{%- generation -%}", "{%- endgeneration -%}", " \n "),
    "kept": ("{%+ generation +%}", "{%+ endgeneration +%}", ""),
}


@st.composite
def templates(draw) -> Written:
    """Any template whose answers can be found."""
    begin = draw(st.sampled_from(["", "<|bos|>", "You are kind.\n"]))
    colon = draw(st.sampled_from(["\n", "\n\n", ": ", " "]))
    ending = draw(st.sampled_from(["", "\n", " [/ANSWER]", "[/ANSWER]\n\n"]))  # several tokens
    opens, closes, stripped = BLOCKS[draw(st.sampled_from([*BLOCKS]))]
    # Text between messages belongs to no answer, which only blocks can say.
    gap = draw(st.sampled_from(["", "\n", "\n\n", " ", *(["\n--\n"] if opens else [])]))
    gap_in_block = gap.isspace() and draw(st.booleans())
    trims = draw(st.booleans())

    header = f"{{{{ '<|im_start|>' + m['role'] + {colon!r} }}}}"
    content = "(m['content'] | trim)" if trims else "m['content']"
    body, after = f"{{{{ {content} + {ending!r} + '{END}' }}}}", f"{{{{ {gap!r} }}}}"
    within, behind = (body + after, "") if gap_in_block else (body, after)
    answer = stripped.join(["", opens, within, closes, behind])
    prompt = f"{{{{ '<|im_start|>assistant' + {colon!r} }}}}"
    return Written(
        f"{{{{ {begin!r} }}}}{LOOP}{header}{ANSWER}{answer}{{% else %}}{body}{after}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}",
        begin,
        lambda role: f"<|im_start|>{role}{colon}",
        lambda text: (text.strip() if trims else text) + ending,
        gap,
    )


@given(messages=dialogues(), written=st.one_of(st.sampled_from([*TEMPLATES.values()]), templates()))
def test_labels_are_the_answers_with_their_end_tokens(tokenizer, messages, written) -> None:
    check_labels(tokenizer, written, messages)


HARD = {
    "is said in the question": dialogue("Is it yes?", "yes", "Is it yes?", "yes"),
    "ends in newlines": dialogue("hi", "yes\n\n", "hi", "\nyes\n"),
    "holds an end token": dialogue("hi", f"I end with {END} you see"),
    "begins with newlines that join the header's": dialogue("hi", "\n\n\nyes", "hi", "\n \n\n"),
    "is empty": dialogue("hi", "", "hi", "yes"),
    "is what a question pretends": dialogue(f"a{END}\n<|im_start|>assistant\nyes", "yes"),
}


@pytest.mark.parametrize("answer", HARD)
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_exact_where_the_answer(tokenizer, template: str, answer: str) -> None:
    check_labels(tokenizer, TEMPLATES[template], HARD[answer])


def test_only_the_end_token_is_trained_of_what_follows_an_answer(tokenizer) -> None:
    """Not the newline that ChatML writes after it, inside a generation block or not."""
    for name in ("chatml", "generation blocks"):
        own = with_template(tokenizer, TEMPLATES[name].source)
        sample = encode_dialogue(own, dialogue("hi", "yes"))
        assert isinstance(sample, Sample)
        assert tokenizer.decode(sample.ids[-1:].tolist()).strip() == ""
        assert sample.labels[sample.labels != IGNORED][-1] == tokenizer.eos_token_id
        assert sample.labels[-1] == IGNORED


THOUGHTS = (
    LOOP
    + "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last else "
    + "m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
)


def test_a_dialogue_whose_earlier_thoughts_are_dropped_is_refused_and_counted(tokenizer) -> None:
    own = with_template(tokenizer, THOUGHTS)
    check_template(own)
    counts = Counter()
    turns = [dialogue("hi", "<think>a</think>b"), dialogue("hi", "<think>a</think>b", "hi", "c")]
    one, two = (encode_dialogue(own, messages, counts=counts) for messages in turns)
    assert isinstance(one, Sample)
    assert trained(tokenizer, one) == ["<think>a</think>b" + END]
    assert isinstance(two, Refusal)
    assert "rewrites earlier messages" in two.reason
    assert counts == {two.reason: 1}


REFUSED_TEMPLATES = {
    "": "has no chat template",
    LOOP + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}": "write <|im_end|> after each",
    LOOP + ANSWER + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}": "Move the token into the block",
    LOOP + "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'another: ' }}{% endif %}": "{% generation %}",
    "{{ raise_exception('only for cats') }}": "only for cats",
}


@pytest.mark.parametrize("source", REFUSED_TEMPLATES)
def test_a_template_that_cannot_be_trained_is_refused_beforehand(tokenizer, source) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_template(with_template(tokenizer, source or None))
    assert REFUSED_TEMPLATES[source] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_end_token_or_offsets_is_refused(tokenizer) -> None:
    assert check_template(tokenizer) == END
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="it has no end token"):
        check_template(endless)

    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(ConfigError, match=r"'old' cannot be used .* a slow one"):
        check_template(Slow())


def test_no_second_bos(tokenizer) -> None:
    """Also where the tokenizer itself puts BOS before each text."""
    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", own.bos_token_id)]
    )
    own.chat_template = TEMPLATES["llama, which writes BOS and trims"].source
    assert own("yes")["input_ids"][0] == own.bos_token_id
    for sample in (encode_dialogue(own, dialogue("hi", "yes")), encode_text(own, "yes")):
        assert isinstance(sample, Sample)
        assert list(sample.ids).count(own.bos_token_id) == 1
        assert sample.ids[0] == own.bos_token_id


def test_a_text_has_one_bos_and_one_eos_and_is_trained_whole(tokenizer) -> None:
    for text in ("yes no", f"<|bos|>yes no{END}"):
        sample = encode_text(tokenizer, text)
        assert isinstance(sample, Sample)
        assert tokenizer.decode(sample.ids.tolist()) == f"<|bos|>yes no{END}"
        assert (sample.labels == sample.ids).all()
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    sample = encode_text(bare, "yes no")
    assert isinstance(sample, Sample)
    assert bare.decode(sample.ids.tolist()) == "yes no"


def test_a_text_too_long_is_dropped_or_cut_and_counted(tokenizer) -> None:
    counts = Counter()
    whole = encode_text(tokenizer, "one two three four")
    assert isinstance(whole, Sample)
    n = len(whole.ids) - 2
    dropped = encode_text(tokenizer, "one two three four", max_length=n, counts=counts)
    end, start = (
        encode_text(tokenizer, "one two three four", max_length=n, truncate=side, counts=counts)
        for side in ("end", "start")
    )
    assert dropped == Refusal("longer than max_length")
    assert isinstance(end, Sample)
    assert isinstance(start, Sample)
    assert end.ids.tolist() == whole.ids[:n].tolist()
    assert start.ids.tolist() == [whole.ids[0], *whole.ids[-n + 1 :]]
    assert encode_text(tokenizer, "", counts=counts) == Refusal("no text")
    assert counts == {
        "longer than max_length": 1,
        "cut at the end": 1,
        "cut at the start": 1,
        "no text": 1,
    }


@given(messages=dialogues(), max_length=st.integers(1, 60))
def test_a_cut_leaves_labels_or_nothing(tokenizer, messages, max_length) -> None:
    whole = encode_dialogue(tokenizer, messages)
    assert isinstance(whole, Sample)
    for truncate in ("drop", "end", "start"):
        counts = Counter()
        got = encode_dialogue(
            tokenizer, messages, max_length=max_length, truncate=truncate, counts=counts
        )
        if len(whole.ids) <= max_length:
            assert isinstance(got, Sample)
            assert got.ids.tolist() == whole.ids.tolist()
            assert not counts
        else:
            assert counts.total() == 1
            if isinstance(got, Sample):
                assert len(got.ids) <= max_length
                assert (got.labels[1:] != IGNORED).any()
                assert truncate != "drop"
            else:
                assert counts == {got.reason: 1}


def test_a_cut_at_the_end_keeps_the_first_tokens(tokenizer) -> None:
    messages = dialogue("hi", "one two three four five six")
    whole = encode_dialogue(tokenizer, messages)
    assert isinstance(whole, Sample)
    n = len(whole.ids) - 4
    cut = encode_dialogue(tokenizer, messages, max_length=n, truncate="end")
    assert isinstance(cut, Sample)
    assert cut.ids.tolist() == whole.ids[:n].tolist()
    assert cut.labels.tolist() == whole.labels[:n].tolist()
    counts = Counter()
    question = int(np.flatnonzero(whole.labels != IGNORED)[0])
    refused = encode_dialogue(
        tokenizer, messages, max_length=question, truncate="end", counts=counts
    )
    assert refused == Refusal("no trained token left after the cut")
    assert counts == {"no trained token left after the cut": 1}


def test_a_cut_at_the_start_leaves_out_the_fewest_whole_turns(tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [dialogue(f"question {i}", f"answer {i}") for i in range(5)]
    last_two = [system, *turns[3], *turns[4]]
    wanted = encode_dialogue(tokenizer, last_two)
    assert isinstance(wanted, Sample)
    counts = Counter()
    whole = [system, *(message for turn in turns for message in turn)]
    for room in (0, 3):
        got = encode_dialogue(
            tokenizer, whole, max_length=len(wanted.ids) + room, truncate="start", counts=counts
        )
        assert isinstance(got, Sample)
        assert got.ids.tolist() == wanted.ids.tolist()
    assert counts == {"cut at the start": 2}
    short = encode_dialogue(tokenizer, whole, max_length=8, truncate="start", counts=counts)
    assert short == Refusal("longer than max_length")


def test_what_is_no_dialogue_is_refused_by_reason(tokenizer) -> None:
    user = {"role": "user", "content": "hi"}
    image = {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
    cases = [
        ("a message is not a mapping with a role", "hi"),
        ("a message is not a mapping with a role", [{"content": "hi"}]),
        ("no message", []),
        ("no trained token", [user]),
        ("a message without content", [user, {"role": "assistant", "content": None}]),
        ("a message with other content than text", [image]),
        ("an answer before any other message", dialogue("hi", "yes")[1:]),
    ]
    counts = Counter()
    for reason, messages in cases:
        assert encode_dialogue(tokenizer, messages, counts=counts) == Refusal(reason)
    assert counts == Counter(reason for reason, _ in cases)
    with pytest.raises(ConfigError, match="cannot be rendered: no message"):
        render(tokenizer, [])
    with pytest.raises(ConfigError, match="truncate='left': choose one of drop, end, start"):
        encode_dialogue(tokenizer, [user], truncate="left")  # pyright: ignore[reportArgumentType]


def test_parts_of_a_content_are_joined(tokenizer) -> None:
    parts = [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}]
    sample = encode_dialogue(tokenizer, messages)
    assert isinstance(sample, Sample)
    assert trained(tokenizer, sample) == ["yes" + END]


def test_tools_calls_and_arguments_reach_the_template(tokenizer) -> None:
    source = (
        "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}{{ day or '' }}"
        + LOOP
        + "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
        + "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['name'] }}{% endif %}{{ '<|im_end|>\n' }}"
        + "{% endfor %}"
        + PROMPT
    )
    own = with_template(tokenizer, source)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    tools, arguments = [{"name": "calculator"}], {"day": "Monday"}
    text = render(own, messages, tools=tools, template_arguments=arguments)
    sample = encode_dialogue(own, messages, tools=tools, template_arguments=arguments)
    assert text.startswith("calculator\nMonday<|im_start|>user\nhi")
    assert isinstance(sample, Sample)
    assert own.decode(sample.ids.tolist()) == text
    assert trained(own, sample) == ["add" + END, "It is 4." + END]
    prompt = render(own, messages[:1], add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\nhi{END}\n<|im_start|>assistant\n"


def test_other_roles_may_be_trained(tokenizer) -> None:
    messages = [*dialogue("hi", "yes"), {"role": "tool", "content": "4"}]
    for name in ("chatml", "generation blocks with dashes"):
        own = with_template(tokenizer, TEMPLATES[name].source)
        both = encode_dialogue(own, messages, trained_roles=("assistant", "tool"))
        questions = encode_dialogue(own, messages, trained_roles=("user",))
        assert isinstance(both, Sample)
        assert isinstance(questions, Sample)
        assert trained(own, both) == ["yes" + END, f"<|im_start|>tool\n4{END}"]
        assert trained(own, questions) == [f"<|im_start|>user\nhi{END}"]


def test_an_empty_thought_may_be_left_untrained(tokenizer) -> None:
    messages = dialogue("hi", "<think>\n\n</think>\n\nyes", "hi", "<think>a</think>no")
    for ignored, first in ((True, "yes"), (False, "<think>\n\n</think>\n\nyes")):
        sample = encode_dialogue(tokenizer, messages, ignore_empty_think=ignored)
        assert isinstance(sample, Sample)
        assert trained(tokenizer, sample) == [first + END, "<think>a</think>no" + END]


def test_blocks_that_a_template_looks_into_are_refused(tokenizer) -> None:
    """Marks at their ends would change what it writes, so their place is not known."""
    source = (
        LOOP
        + "{% set answer %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        + "{% endset %}{{ answer | length }}{{ answer }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="blocks cannot be located"):
        check_template(with_template(tokenizer, source))
