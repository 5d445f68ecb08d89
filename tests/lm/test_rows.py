"""Rows come from each source in order, and what is wrong in one is named with its place."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import pytest

from paceline.errors import ConfigError, DataError, MissingExtraError
from paceline.lm.data.rows import (
    Selected,
    fingerprint,
    python_manual,
    read_callable,
    read_csv,
    read_files,
    read_huggingface,
    read_json,
    read_jsonl,
    read_parquet,
    read_text,
)

ROWS = [{"text": f"row {i}", "n": i} for i in range(5)]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_each_format_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    written(tmp_path / "a.jsonl", "\n" + lines(ROWS).replace("\n", "\r\n") + "\n")
    written(tmp_path / "a.json", json.dumps(ROWS))
    written(tmp_path / "b.json", json.dumps({"version": 1, "data": {"rows": ROWS}}))
    for rows in (
        read_files(tmp_path / "a.jsonl"),
        read_files(tmp_path / "a.json"),
        read_json(tmp_path / "b.json", "data.rows"),
        read_parquet(tmp_path / "a.parquet"),
        read_callable(lambda: iter(ROWS)),
        Selected(ROWS, range(5)),  # pyright: ignore[reportArgumentType]
    ):
        assert list(rows) == ROWS
        assert len(rows) == 5
        assert rows[-1] == ROWS[-1]
        assert list(rows[1:3]) == ROWS[1:3]
        with pytest.raises(IndexError):
            rows[5]
    csv = written(tmp_path / "a.csv", '\ufefftext,n\n"row 0,\nstill",0\nrow 1,1\n')
    assert list(read_csv(csv)) == [
        {"text": "row 0,\nstill", "n": "0"},
        {"text": "row 1", "n": "1"},
    ]
    assert read_csv(written(tmp_path / "a.tsv", "text\tn\na,b\t1\n"))[0]["text"] == "a,b"
    text = written(tmp_path / "a.txt", "one\ntwo\n\n  \n\nthree\n")
    assert [row["text"] for row in read_text(text)] == ["one\ntwo\n\n  \n\nthree\n"]
    assert [row["text"] for row in read_text(text, "paragraph")] == ["one\ntwo", "three"]
    again = pickle.loads(pickle.dumps(read_jsonl(tmp_path / "a.jsonl")))  # noqa: S301
    assert again[2] == ROWS[2]


def test_what_a_file_holds_wrongly_is_named_with_its_line(tmp_path: Path) -> None:
    broken = written(tmp_path / "broken.jsonl", '{"n": 0}\n\n{"n": 1\n{"n": 2}\n')
    rows = read_jsonl(broken)
    assert rows[0] == {"n": 0}
    with pytest.raises(DataError, match=r"broken\.jsonl, line 3: no valid JSON"):
        rows[1]
    with pytest.raises(DataError, match=r"torn\.jsonl, line 2: .* ends in the middle of a row"):
        read_jsonl(written(tmp_path / "torn.jsonl", '{"n": 0}\n{"n": 1'))
    assert len(read_jsonl(written(tmp_path / "whole.jsonl", '{"n": 0}\n{"n": 1}'))) == 2
    assert len(read_jsonl(written(tmp_path / "empty.jsonl", ""))) == 0
    cases = [
        (read_jsonl, "list.jsonl", "[1]", "line 1: a row is an object with columns, not list"),
        (read_json, "a.json", '[{"n": 0},\n{"n" 1}]', "line 2: no valid JSON"),
        (read_json, "b.json", '[{"n": 0}, 3]', "row 2: a row is an object"),
        (read_csv, "a.csv", "n,m\n1,2\n3\n", "line 3: 1 fields where the header has 2"),
        (read_csv, "b.csv", "n,n\n1,2\n", "line 1: a column's name occurs twice"),
        (read_parquet, "a.parquet", "no", "no Parquet file"),
    ]
    for read, name, text, message in cases:
        with pytest.raises(DataError, match=message) as error:
            read(written(tmp_path / name, text))
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "latin.csv").write_bytes(b"n\ncaf\xe9\n")
    for read, name in ((read_text, "latin.txt"), (read_csv, "latin.csv")):
        with pytest.raises(DataError, match="latin"):
            read(tmp_path / name)


def test_folders_and_patterns_are_read_in_the_order_of_paths(tmp_path: Path) -> None:
    tmp_path = tmp_path / ".cache"  # only what is hidden inside the folder is left out
    numbers = [(7 * i) % 20 for i in range(20)]
    for n in numbers:
        written(tmp_path / f"many/{n:02}.jsonl", lines([{"n": n}]))
    assert [row["n"] for row in read_files(tmp_path / "many")] == sorted(numbers)
    assert [row["n"] for row in read_files(tmp_path / "many/*")] == sorted(numbers)
    tmp_path = tmp_path / "few"
    for i, name in enumerate(("b/10.jsonl", "a.jsonl", "b/9.jsonl", ".hidden/x.jsonl")):
        written(tmp_path / name, lines([{"n": i}]))
    written(tmp_path / "notes", "not data")
    assert [row["n"] for row in read_files(tmp_path)] == [1, 0, 2]
    assert read_files(tmp_path)[1] == {"n": 0}
    assert [row["n"] for row in read_files(tmp_path / "b" / "*.jsonl")] == [0, 2]
    assert [row["n"] for row in read_files(f"{tmp_path}/**/1*.jsonl")] == [0]
    written(tmp_path / "b/c.csv", "n\n7\n")
    with pytest.raises(ConfigError, match="holds csv, jsonl files: choose one with format"):
        read_files(tmp_path)
    assert [row["n"] for row in read_files(tmp_path, "csv")] == ["7"]
    for path, options, message in (
        (tmp_path / "none.jsonl", {}, "none.jsonl: no such file"),
        (tmp_path / "b", {"format": "text"}, "no .txt, .md file"),
        (tmp_path, {"format": "jsonlines"}, "did you mean 'jsonl'"),
        (tmp_path / "a.jsonl", {"by": "paragraph"}, "by is no option of jsonl files"),
        (tmp_path / "notes", {}, "which format is it"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_files(path, **options)
    assert len(read_files(tmp_path / "notes", "text")) == 1


def test_a_json_object_needs_the_key_of_its_list(tmp_path: Path) -> None:
    one = written(tmp_path / "one.json", json.dumps({"version": 1, "rows": ROWS}))
    two = written(tmp_path / "two.json", json.dumps({"train": ROWS, "test": ROWS[:2]}))
    assert list(read_json(one)) == ROWS
    assert len(read_files(two, key="test")) == 2
    for key, message in (
        (None, r"give the key of its list \(train, test\)"),
        ("trian", "no key 'trian'; did you mean 'train'"),
        ("train.x", "no key 'train.x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_json(two, key)
    with pytest.raises(ConfigError, match="no list of rows under 'version'"):
        read_json(one, "version")


def test_a_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    rows = read_jsonl(written(tmp_path / "a.jsonl", lines(ROWS)))
    moved = read_jsonl(written(tmp_path / "b/c.jsonl", lines(ROWS)))
    assert fingerprint(rows) == fingerprint(moved)
    others = [
        read_jsonl(written(tmp_path / "d.jsonl", lines(ROWS[:-1]))),
        read_jsonl(written(tmp_path / "e.jsonl", lines(ROWS).replace("row 3", "row 8"))),
        Selected(rows, range(4)),  # pyright: ignore[reportArgumentType]
        Selected(rows, [0, 1, 2, 4, 3]),  # pyright: ignore[reportArgumentType]
        ROWS,
        [*ROWS[1:], ROWS[0]],
        [{**ROWS[0], "x": float("nan")}],
    ]
    seen = {fingerprint(rows), *(fingerprint(other) for other in others)}
    assert len(seen) == len(others) + 1
    assert fingerprint([{"b": 1, "a": 2}]) == fingerprint([{"a": 2, "b": 1}])
    text = written(tmp_path / "a.txt", "one\n\ntwo")
    assert fingerprint(read_text(text)) != fingerprint(read_text(text, "paragraph"))


def test_a_callable_gives_dicts(tmp_path: Path) -> None:
    def rows(n: int) -> Any:
        yield from ROWS[:n]
        yield "row 2"

    with pytest.raises(DataError, match=r"rows\(\), row 3: a row is an object"):
        read_callable(rows, n=2)
    with pytest.raises(ConfigError, match="gave dict, where rows"):
        read_callable(lambda: cast(Any, ROWS[0]))


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for read, package in ((read_parquet, "pyarrow"), (read_huggingface, "datasets")):
        with pytest.raises(
            MissingExtraError, match=rf'{package}: pip install "paceline\[datasets\]"'
        ):
            read(str(tmp_path))


def test_the_manual_is_the_same_each_time() -> None:
    dialogues, texts = python_manual(), python_manual("texts")
    assert 1500 < len(dialogues) == len(texts)
    assert fingerprint(dialogues) == fingerprint(python_manual())
    question, answer = dialogues[5]["messages"]
    assert question["role"] == "user"
    assert question["content"].startswith('Explain "')
    assert answer == {"role": "assistant", "content": texts[5]["text"]}
    assert all(40 <= len(row["text"]) <= 600 for row in texts)


def test_a_saved_hugging_face_dataset_is_read_with_slices(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([4])}).save_to_disk(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert list(read_huggingface(one)) == ROWS
    assert read_huggingface(one)[-1] == ROWS[-1]
    assert list(read_huggingface(one)[3:]) == ROWS[3:]
    with pytest.raises(IndexError):
        read_huggingface(one)[5]
    assert list(read_huggingface(two, "test")) == ROWS[4:]
    assert list(read_huggingface(two, "train[1:3]")) == ROWS[1:3]
    assert list(read_huggingface(two, "train[40%:]")) == ROWS[2:]
    assert fingerprint(read_huggingface(one)) == fingerprint(read_huggingface(two))
    assert fingerprint(read_huggingface(one, "train[:4]")) != fingerprint(read_huggingface(one))
    for name, split, message in (
        (two, "eval", "has no split 'eval', but train, test"),
        (two, "train[x]", "write it like train"),
        ("nobody/nothing", "train", "the dataset 'nobody/nothing', split 'train', cannot"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            read_huggingface(name, split, cache_dir=tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert "HF_HUB_OFFLINE is set" in str(error.value)
    with pytest.raises(ConfigError, match="is a saved Hugging Face dataset"):
        read_files(one)
