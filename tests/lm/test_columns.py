"""Rows of other shapes become dialogues, with every turn in its place."""

from __future__ import annotations

import pytest

from paceline.errors import ConfigError, DataError
from paceline.lm.data.columns import KNOWN, as_dialogues, as_texts, rename, split_of
from paceline.lm.data.rows import fingerprint


def turns(*pairs: str, speaker="from", text="value") -> list[dict]:
    return [{speaker: who, text: what} for who, _, what in (p.partition(":") for p in pairs)]


def said(rows) -> list[str]:
    return [f"{m['role']}:{m['content']}" for m in rows[0]["messages"]]


LONG = turns("system:be brief", "human:a", "gpt:b", "human:c", "human:d", "gpt:e")
SAME = ["system:be brief", "user:a", "assistant:b", "user:c", "user:d", "assistant:e"]


@pytest.mark.parametrize(
    ("row", "columns", "settings", "messages"),
    [
        ({"question": "a", "answer": "b"}, {"assistant": "answer", "user": "question"}, {}, None),
        (
            {"messages": turns("user:a", "assistant:b", speaker="role", text="content")},
            {"user": "messages.role.user", "assistant": "messages.role.assistant"},
            {},
            None,
        ),
        (
            {"conversations": LONG},
            {"user": "conversations.from.human", "assistant": "conversations.from.gpt"},
            {},
            SAME,
        ),
        (
            {"chat": turns("q:a", "bot:b", speaker="who", text="body")},
            {"user": "chat.who.q", "assistant": "chat.who.bot"},
            {"content": "body"},
            None,
        ),
        (
            {"system_prompt": "be brief", "question": "a", "response": "b"},
            {"system": "system_prompt", "user": "question", "assistant": "response"},
            {},
            ["system:be brief", "user:a", "assistant:b"],
        ),
    ],
    ids=["columns", "array", "array with every turn", "content field", "system column"],
)
def test_a_mapping_of_roles_gives_the_dialogue(row, columns, settings, messages) -> None:
    assert said(as_dialogues([row], columns, **settings)) == (messages or ["user:a", "assistant:b"])


def test_an_array_of_turns_is_found_and_its_words_for_roles_are_known() -> None:
    assert said(as_dialogues([{"conversations": LONG}])) == SAME
    assert said(as_dialogues([{"chat": LONG}], {"messages": "chat"})) == SAME
    own = [{"messages": turns("Q:a", "tool:t", "A:b")}]
    assert said(as_dialogues(own, roles={"Q": "user", "A": "assistant"})) == [
        "user:a",
        "tool:t",
        "assistant:b",
    ]


def test_what_else_a_turn_or_a_row_has_is_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    rows = as_dialogues(
        [{"messages": [call], "id": 3, "functions": []}],
        {
            "messages": "messages",
            "tools": "functions",
        },
    )
    assert rows[0]["messages"] == [call]
    assert rows[0]["id"] == 3
    assert rows[0]["tools"] == []


def test_an_empty_system_message_is_left_out_and_an_empty_answer_is_not() -> None:
    row = {"system_prompt": "", "question": "a", "response": ""}
    columns = {"system": "system_prompt", "user": "question", "assistant": "response"}
    assert said(as_dialogues([row], columns)) == ["user:a", "assistant:"]


def test_columns_that_are_not_there_are_named_with_those_that_are() -> None:
    row = {"question": "a", "answer": "b"}
    cases = [
        (None, r"They have: question \(str\), answer \(str\)\. Say where"),
        ({"user": "questoin", "assistant": "answer"}, "'questoin'; did you mean 'question'"),
        ({"messages": "chat"}, "no column 'chat'. They have: question, answer"),
        ({"user": "question", "assistant": "a.from.b"}, "either all roles are array.field.value"),
        ({"user": "a.from.b", "assistant": "c.from.d"}, "in one array and field"),
        ({"messages": "question", "user": "answer"}, "either messages, or a column"),
        ({"prompt": "question"}, "none of system, user, assistant or messages"),
    ]
    for columns, message in cases:
        with pytest.raises(ConfigError, match=message):
            as_dialogues([row], columns)
    with pytest.raises(DataError, match="row 1: question is str, not a list of turns"):
        as_dialogues([row], {"messages": "question"})[0]
    with pytest.raises(DataError, match="row 2: a turn has no field 'role'; it has who"):
        list(as_dialogues([{"messages": []}, {"messages": [{"who": "a"}]}]))
    with pytest.raises(DataError, match="row 2 has no column 'answer'"):
        list(as_dialogues([row, {"question": "a"}], {"user": "question", "assistant": "answer"}))
    assert as_dialogues([]) == []


def test_texts_and_other_columns_are_renamed() -> None:
    assert as_texts([{"body": "a"}])[0] == {"text": "a"}
    assert as_texts([{"text": "a", "id": 1}])[0]["text"] == "a"
    assert as_texts([{"body": "a", "id": 1}], "body")[0] == {"text": "a", "id": 1}
    with pytest.raises(ConfigError, match=r"no column 'text'. They have: body, id"):
        as_texts([{"body": "a", "id": 1}])
    pair = rename([{"q": "a", "chosen": "b"}], {"prompt": "q"})
    assert list(pair) == [{"chosen": "b", "prompt": "a"}]
    rows = [{"a": 1, "b": 2}]
    assert fingerprint(rename(rows, {"c": "a"})) != fingerprint(rename(rows, {"c": "b"}))


def test_known_sets_have_their_columns_and_splits() -> None:
    name, split = split_of("HuggingFaceH4/ultrachat_200k:train[:20]")
    assert (name, split) == ("HuggingFaceH4/ultrachat_200k", "train_sft[:20]")
    assert split_of(name, "eval") == (name, "test_sft")
    assert split_of("own/set:dev") == ("own/set", "dev")
    assert split_of("own/set:[10:20]") == ("own/set", "train[10:20]")
    row = {"conversations": LONG}
    assert said(as_dialogues([row], KNOWN["Open-Orca/SlimOrca"].columns)) == SAME
    assert sum(known.columns is not None for known in KNOWN.values()) == 9
