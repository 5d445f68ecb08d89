"""Rows of any shape become rows with `messages`, or with `text`; known instruct sets by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ConfigError, DataError, nearest
from paceline.lm.data.rows import Mapped, Row, Rows

ROLES = ("system", "user", "assistant")  # in the order of a dialogue made of columns
ALIASES = {"human": "user", "gpt": "assistant"}
_ARRAYS = ("messages", "conversations", "conversation")
_CONTENTS = ("content", "text", "message", "value")
_FIELDS = ("role", "from")
_PATH = re.compile(r"[^.]+\.[^.]+\.[^.]+")


@dataclass(frozen=True)
class KnownSet:
    """A public instruct set: what its columns are, and what its splits are called.

    Attributes:
        columns: for `as_dialogues`.
        splits: its names for "train" and "eval", where they differ.
        verify: whether the sizes that it declares are right.
    """

    columns: Mapping[str, str] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True


KNOWN = {
    "HuggingFaceH4/ultrachat_200k": KnownSet(
        {"messages": "messages"}, {"train": "train_sft", "eval": "test_sft"}
    ),
    "HuggingFaceH4/ultrafeedback_binarized": KnownSet(
        None, {"train": "train_prefs", "eval": "test_prefs"}
    ),
    "Open-Orca/OpenOrca": KnownSet(
        {"system": "system_prompt", "user": "question", "assistant": "response"}
    ),
    "Open-Orca/SlimOrca": KnownSet({"messages": "conversations"}),
    "THUDM/LongAlign-10k": KnownSet({"messages": "messages"}),
    "Yukang/LongAlpaca-12k": KnownSet({"user": "instruction", "assistant": "output"}),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": KnownSet({"user": "problem", "assistant": "solution"}),
    "lmsys/lmsys-chat-1m": KnownSet({"messages": "conversation"}),
    "meta-math/MetaMathQA": KnownSet({"user": "query", "assistant": "response"}),
    "nvidia/AceMath-Instruct-Training-Data": KnownSet(
        {"messages": "messages"}, {"train": "general_sft_stage2"}, verify=False
    ),
}


def split_of(source: str, split: str = "train") -> tuple[str, str]:
    """The name and the split that a short form such as "org/set:train[:20]" means.

    Args:
        source: a dataset's name, maybe with a colon and a split, maybe with a slice.
        split: the split if it names none.

    Returns:
        The name, and the split as that dataset calls it.
    """
    name, colon, given = source.partition(":")
    base, bracket, cut = (given if colon else split).partition("[")
    splits = KNOWN[name].splits if name in KNOWN else {}
    return name, splits.get(base or split, base or split) + bracket + cut


def rename(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rows whose columns have other names; columns that are not named stay.

    Args:
        rows: from a reader.
        columns: the old name by the new one, such as `{"prompt": "question"}`.

    Raises:
        ConfigError: there is no such column.
    """
    if not columns:
        return rows
    _require(rows, [*columns.values()])

    def change(row: Row, index: int) -> Row:
        others = {name: value for name, value in row.items() if name not in columns.values()}
        return {**others, **{new: _get(row, old, index) for new, old in columns.items()}}

    return Mapped(rows, change, ["rename", dict(columns)])


def as_texts(rows: Rows, column: str | None = None) -> Rows:
    """Rows with a column `text`.

    Args:
        rows: from a reader.
        column: which one holds the text; None for `text`, or for the only one there is.

    Raises:
        ConfigError: there is no such column.
    """
    if not len(rows):
        return rows
    if column is None:
        names = list(rows[0])
        column = names[0] if len(names) == 1 else "text"
    return rename(rows, {"text": column})


def as_dialogues(
    rows: Rows,
    columns: Mapping[str, str] | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    content: str | None = None,
) -> Rows:
    """Rows with a column `messages`: mappings with `role` and `content`, in the dialogue's order.

    Args:
        rows: from a reader.
        columns: where the messages are, in one of three forms.
            `{"messages": "conversations"}`: the column that holds the array of turns;
            `{"user": "question", "assistant": "answer"}`: one column a message, in the order
            system, user, assistant, where an empty system message is left out;
            `{"user": "conversations.from.human", "assistant": "conversations.from.gpt"}`: an
            array, the field of a turn that says who speaks, and its value for that role. Turns of
            others keep their own role. None for a column `messages` or `conversations`.
        roles: the role by a turn's own word for it; `human` and `gpt` are known.
        content: the field of a turn that holds its text; None for the first of content, text,
            message, value.

    Raises:
        ConfigError: the rows have no such columns; the message lists those that there are.
        DataError: an array of turns is none; the message gives the row's number.
    """
    if not len(rows):
        return rows
    columns = dict(columns or _found_array(rows))
    paths = {role: path.split(".") for role, path in columns.items() if _PATH.fullmatch(path)}
    others = {new: old for new, old in columns.items() if new not in (*ROLES, "messages")}
    asked = {new: old for new, old in columns.items() if new not in others}
    known = {**ALIASES, **(roles or {})}
    speaker: str | None = None
    if paths and not paths.keys() >= asked.keys():
        raise ConfigError(f"columns {columns}: either all roles are array.field.value, or none is.")
    if paths:
        arrays = {(array, speaks) for array, speaks, _ in paths.values()}
        if len(arrays) > 1:
            raise ConfigError(f"columns {columns}: all roles have to be in one array and field.")
        array, speaker = arrays.pop()
        known |= {value: role for role, (_, _, value) in paths.items()}
    elif "messages" in asked:
        if len(asked) > 1:
            raise ConfigError(f"columns {columns}: either messages, or a column for each role.")
        array = asked["messages"]
    else:
        return _from_columns(rows, asked, others)
    _require(rows, [array, *others.values()])

    def change(row: Row, index: int) -> Row:
        turns = _get(row, array, index)
        if not isinstance(turns, list | tuple):
            raise DataError(
                f"row {index + 1}: {array} is {type(turns).__name__}, not a list of turns"
            )
        messages = [_message(turn, known, speaker, content, index) for turn in turns]
        kept = {name: value for name, value in row.items() if name != array}
        return {**kept, **{n: _get(row, o, index) for n, o in others.items()}, "messages": messages}

    return Mapped(rows, change, ["dialogues", columns, known, content])


def _from_columns(rows: Rows, asked: Mapping[str, str], others: Mapping[str, str]) -> Rows:
    if not asked:
        raise ConfigError(f"columns {dict(others)}: none of {', '.join(ROLES)} or messages in it.")
    _require(rows, [*asked.values(), *others.values()])
    order = [(role, asked[role]) for role in ROLES if role in asked]

    def change(row: Row, index: int) -> Row:
        messages = [{"role": role, "content": _get(row, name, index)} for role, name in order]
        if order[0][0] == "system" and not messages[0]["content"]:
            del messages[0]
        kept = {name: value for name, value in row.items() if name not in asked.values()}
        return {**kept, **{n: _get(row, o, index) for n, o in others.items()}, "messages": messages}

    return Mapped(rows, change, ["columns", dict(asked), dict(others)])


def _message(
    turn: Any, roles: Mapping[str, str], speaker: str | None, content: str | None, index: int
) -> Row:
    """A turn as a message; its other fields, such as tool calls, are kept."""
    if not isinstance(turn, Mapping):
        raise DataError(f"row {index + 1}: a turn is {type(turn).__name__}, not a mapping")
    who = speaker or next((name for name in _FIELDS if name in turn), "role")
    text = content or next((name for name in _CONTENTS if name in turn), "content")
    for name in (who, *([content] if content else [])):
        if name not in turn:
            known = ", ".join(turn)
            raise DataError(f"row {index + 1}: a turn has no field {name!r}; it has {known}")
    rest = {name: value for name, value in turn.items() if name not in (who, text)}
    role = turn[who]
    return {**rest, "role": roles.get(role, role), "content": turn.get(text)}


def _found_array(rows: Rows) -> dict[str, str]:
    for name in _ARRAYS:
        if name in rows[0]:
            return {"messages": name}
    columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in rows[0].items())
    raise ConfigError(
        f"the rows have no column messages. They have: {columns}. Say where the dialogue is, such "
        "as columns: {user: question, assistant: answer}."
    )


def _require(rows: Rows, names: list[str]) -> None:
    """Columns that the first row lacks are a mistake of whoever named them."""
    for name in names:
        if len(rows) and name not in rows[0]:
            known = list(rows[0])
            guess = nearest(name, known)
            raise ConfigError(
                f"the rows have no column {name!r}{guess}. They have: {', '.join(known)}."
            )


def _get(row: Row, name: str, index: int) -> Any:
    if name not in row:
        raise DataError(f"row {index + 1} has no column {name!r}")
    return row[name]
