"""Reads rows from files, Hugging Face datasets and Python: each reader gives a sequence of dicts.

Rows keep their order. What a file holds wrongly is a `DataError` with the file and line; what the
user named wrongly is a `ConfigError`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib.util
import json
import mmap
import os
import re
import textwrap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paceline.errors import ConfigError, DataError, MissingExtraError, nearest, some

Row = dict[str, Any]
Rows = Sequence[Row]
Feed = Callable[[bytes], object]

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
}
_OF_DATASETS = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder
_EXTRAS = {"datasets": "datasets", "gguf": "gguf", "pyarrow": "datasets"}  # others are in "lm"
_SLICE = re.compile(
    r"^(?P<name>[^\[]*)(?:\[(?P<start>-?\d*)(?P<p>%?):(?P<stop>-?\d*)(?P<q>%?)\])?$"
)


class FileRows(Sequence[Row]):
    """Rows of one file, all of them in memory.

    Args:
        path: the file.
        rows: what it holds.
        options: what else decides how the file's bytes become rows.
    """

    def __init__(self, path: Path, rows: Sequence[Row], options: str = "") -> None:
        self._path, self._rows, self._options = path, rows, options

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def feed(self, update: Feed) -> None:
        """Gives a hash the file's bytes."""
        update(f"{type(self).__name__} {self._options}\n".encode())
        with self._path.open("rb") as file:
            update(hashlib.file_digest(file, "blake2b").digest())


class JsonLines(FileRows):
    """Rows of a file with one JSON object a line. Only where lines begin is in memory.

    Args:
        path: the file; empty lines are skipped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, ())
        starts, lines = [], []
        at, line = 0, b"\n"
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        self._starts = np.asarray([*starts, at], dtype=np.int64)
        self._lines = np.asarray(lines, dtype=np.int64)
        self._map: mmap.mmap | None = None
        if starts and not line.endswith(b"\n"):
            self[len(starts) - 1]  # a torn copy is noticed at once

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        line = self._bytes()[self._starts[index] : self._starts[index + 1]]
        where = f"{self._path}, line {self._lines[index]}"
        try:
            row = json.loads(line)
        except ValueError as error:
            torn = index == len(self) - 1 and not line.endswith(b"\n")
            why = "the file ends in the middle of a row; was it copied whole?" if torn else error
            raise DataError(f"{where}: no valid JSON: {why}") from error
        return _row(row, where)

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None}


class _Table(FileRows):
    """Rows of an Arrow table."""

    def __getitem__(self, index: Any) -> Any:
        table: Any = self._rows
        if isinstance(index, slice):
            return table.take(list(range(*index.indices(len(self))))).to_pylist()
        return table.slice(range(len(self))[index], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Row]:
        table: Any = self._rows
        for batch in table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


class _Dataset(Sequence[Row]):
    """Rows of a dataset of the library `datasets`."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(_Dataset(self._dataset.select(range(*index.indices(len(self))))))
        return self._dataset[range(len(self))[index]]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._dataset)

    def feed(self, update: Feed) -> None:
        """Gives a hash the rows in Arrow's format for streams, in batches of one size."""
        import pyarrow

        for batch in self._dataset.with_format("arrow").iter(batch_size=1000):
            sink = pyarrow.BufferOutputStream()
            plain = batch.replace_schema_metadata(None).combine_chunks()
            with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
                stream.write_table(plain)
            update(sink.getvalue())


class Joined(Sequence[Row]):
    """Several sequences of rows, one after the other.

    Args:
        parts: the sequences.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Row]:
        for part in self._parts:
            yield from part

    def feed(self, update: Feed) -> None:
        """Gives a hash each part's fingerprint."""
        for part in self._parts:
            update(fingerprint(part).encode())


class Selected(Sequence[Row]):
    """Some rows of a sequence.

    Args:
        rows: the sequence.
        indices: which of its rows, in this order, [n] integers.
    """

    def __init__(self, rows: Rows, indices: np.ndarray) -> None:
        self.rows, self.indices = rows, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selected(self.rows, self.indices[index])
        return self.rows[int(self.indices[index])]

    def feed(self, update: Feed) -> None:
        """Gives a hash the sequence's fingerprint and the indices."""
        update(fingerprint(self.rows).encode() + self.indices.tobytes())


class Mapped(Sequence[Row]):
    """Rows changed one by one as they are read.

    Args:
        rows: the sequence.
        change: makes a row's new form; gets the row and its number, from 0.
        settings: what decides how `change` works, for the fingerprint.
    """

    def __init__(self, rows: Rows, change: Callable[[Row, int], Row], settings: Any) -> None:
        self._rows, self._change, self._settings = rows, change, settings

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._change(self._rows[index], index)

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(self._rows):
            yield self._change(row, index)

    def feed(self, update: Feed) -> None:
        """Gives a hash the sequence's fingerprint and the settings."""
        update(fingerprint(self._rows).encode() + canonical(self._settings))


def read_jsonl(path: str | Path) -> Rows:
    """Rows of a file with one JSON object a line; a line is read when its row is asked for.

    Raises:
        DataError: a line is no JSON object; the message gives its number.
    """
    return JsonLines(Path(path))


def read_json(path: str | Path, key: str | None = None) -> Rows:
    """Rows of a JSON file: a list of objects, or an object that holds one.

    Args:
        path: the file.
        key: the object's key that holds the list; dots lead into nested objects. None if the file
            is a list, or an object with a single list.

    Raises:
        DataError: it is no JSON, or an entry of the list is no object.
        ConfigError: there is no list under `key`.
    """
    path = Path(path)
    try:
        held = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: no valid JSON: {error.msg}") from error
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON: {error}") from error
    found = held
    if key is None and isinstance(held, dict):
        lists = [name for name, value in held.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise ConfigError(f"{path} is an object: give the key of its list ({some(held)}).")
        found = held[lists[0]]
    for part in key.split(".") if key else ():
        if not isinstance(found, dict) or part not in found:
            known = list(found) if isinstance(found, dict) else []
            raise ConfigError(f"{path} has no key {key!r}{nearest(part, known)}")
        found = found[part]
    if not isinstance(found, list):
        raise ConfigError(f"{path} has no list of rows{f' under {key!r}' if key else ''}.")
    rows = [_row(row, f"{path}, row {i}") for i, row in enumerate(found, 1)]
    return FileRows(path, rows, f"json {key}")


def read_csv(path: str | Path) -> Rows:
    """Rows of a CSV file (or TSV, by its suffix) whose first line names the columns; all strings.

    Raises:
        DataError: a row has more or fewer fields than the header, or the file is not UTF-8.
    """
    path = Path(path)
    tabs = path.suffix == ".tsv"
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
        try:
            header = next(reader, [])
            if len({*header}) < len(header):
                raise DataError(f"{path}, line 1: a column's name occurs twice: {some(header)}")
            for fields in filter(None, reader):
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields where the header "
                        f"has {len(header)}"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return FileRows(path, rows, "tsv" if tabs else "csv")


def read_parquet(path: str | Path) -> Rows:
    """Rows of a Parquet file.

    Raises:
        DataError: it is not one.
        MissingExtraError: the package pyarrow is not installed.
    """
    needs("pyarrow", "Parquet files")
    import pyarrow
    from pyarrow import parquet

    path = Path(path)
    try:
        return _Table(path, parquet.ParquetFile(path, memory_map=True).read())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no Parquet file that can be read: {first_line(error)}") from error


def read_text(path: str | Path, by: Literal["file", "paragraph"] = "file") -> Rows:
    """Rows `{"text": ...}` of a text file.

    Args:
        path: the file, in UTF-8.
        by: "file": the file is one row; "paragraph": what empty lines separate, without the
            white space around it.

    Raises:
        DataError: it is not UTF-8.
    """
    path = Path(path)
    if by not in ("file", "paragraph"):
        raise ConfigError(f"by={by!r}: a row of a text file is a file or a paragraph.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error
    parts = [text] if by == "file" else _paragraphs(text)
    return FileRows(path, [{"text": part} for part in parts if part], f"text {by}")


READERS: dict[str, Callable[..., Rows]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text,
}


def read_files(path: str | Path, format: str | None = None, **options: Any) -> Rows:
    """Rows of a file, of all files of a folder and the folders in it, or of a pattern's files.

    Files are read in the order of their paths; hidden ones are left out.

    Args:
        path: a file, a folder, or a pattern such as `data/*.jsonl` (`**` for folders in between).
        format: jsonl, json, csv, parquet or text; None to go by the files' suffixes.
        **options: of that format's reader: `key` for json, `by` for text.

    Raises:
        ConfigError: there is no such file, or several formats and none chosen.
        DataError: a file holds no rows of its format.
    """
    if format is not None and format not in READERS:
        raise ConfigError(
            f"no format {format!r}{nearest(format, READERS)}; there are {some(READERS)}."
        )
    files = files_of(Path(path), format)
    formats = {format} if format else {_format_of(file) for file in files}
    if len(formats) > 1:
        raise ConfigError(f"{path} holds {some(sorted(formats))} files: choose one with format.")
    chosen = formats.pop()
    if unknown := {*options} - {"json": {"key"}, "text": {"by"}}.get(chosen, set()):
        raise ConfigError(f"{path}: {some(sorted(unknown))} is no option of {chosen} files.")
    parts = [READERS[chosen](file, **options) for file in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def read_huggingface(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    verify: bool = True,
) -> Rows:
    """Rows of a dataset of the Hugging Face hub, or of a folder that `save_to_disk` wrote.

    Code that a dataset brings along is never run.

    Args:
        name: on the hub, such as "HuggingFaceH4/ultrachat_200k", or the folder.
        split: its split, maybe with a slice: "train[:20]", "train[10%:]".
        config: the dataset's configuration, if it has several.
        revision: a commit or branch of the hub.
        cache_dir: where the library `datasets` keeps what it downloads; None for its own folder.
        verify: compare sizes and checksums with those that the dataset declares.

    Raises:
        ConfigError: no such dataset, split or configuration, or the hub cannot be reached.
        MissingExtraError: the package datasets is not installed.
    """
    needs("datasets", "Hugging Face datasets")
    import datasets

    what = f"the dataset {name!r}, split {split!r}, cannot be loaded"
    try:
        if os.path.isdir(name):
            return _Dataset(_from_disk(datasets.load_from_disk(name), name, split))
        found = datasets.load_dataset(
            name,
            config,
            split=split,
            revision=revision,
            cache_dir=str(cache_dir) if cache_dir else None,
            verification_mode="basic_checks" if verify else "no_checks",
        )
        return _Dataset(found)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        offline = "Offline" in str(error)
        cure = "; HF_HUB_OFFLINE is set, so only downloaded ones are there" if offline else ""
        raise ConfigError(f"{what}: {first_line(error)}{cure}") from error


def read_callable(function: Callable[..., Iterable[Row]], **arguments: Any) -> Rows:
    """Rows that a Python function makes, read to the end at once.

    Args:
        function: returns an iterable of dicts.
        **arguments: given to it.

    Raises:
        ConfigError: it returns no iterable.
        DataError: one of what it returns is no dict.
    """
    name = getattr(function, "__qualname__", repr(function))
    made: Any = function(**arguments)
    if isinstance(made, str | bytes | Mapping) or not isinstance(made, Iterable):
        raise ConfigError(f"{name}() gave {type(made).__name__}, where rows (dicts) are needed.")
    return [_row(row, f"{name}(), row {i}") for i, row in enumerate(made, 1)]


def python_manual(form: Literal["dialogues", "texts"] = "dialogues") -> Rows:
    """Paragraphs of Python's reference manual, which every Python has: real data to try things.

    Some 1,900 paragraphs of 40 to 600 characters, always in the same order; the text is that of the
    Python that runs.

    Args:
        form: "dialogues": rows with `messages`, a question and the paragraph as the answer;
            "texts": rows with `text`.
    """
    from pydoc_data.topics import topics

    if form not in ("dialogues", "texts"):
        raise ConfigError(f"form={form!r}: dialogues or texts.")
    rows = []
    for topic in sorted(topics):
        parts = [part for part in _paragraphs(topics[topic]) if 40 <= len(part) <= 600]
        for number, part in enumerate(parts, 1):
            question = f'Explain "{topic}" in Python, part {number} of {len(parts)}.'
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": part},
            ]
            rows.append({"text": part} if form == "texts" else {"messages": messages})
    return rows


def fingerprint(rows: Rows) -> str:
    """A hash of what rows hold.

    For files it is taken from their bytes, which is fast, and from what decides how they are read;
    their names and places do not count.

    Args:
        rows: from a reader, or any sequence of dicts.

    Returns:
        32 hexadecimal digits.
    """
    found = hashlib.blake2b(digest_size=16)
    feed = getattr(rows, "feed", None)
    if feed is not None:
        feed(found.update)
    else:
        for row in rows:
            found.update(canonical(row) + b"\n")
    return found.hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no white space, so that equal values have equal bytes.

    Args:
        value: plain data; of what JSON does not know the text counts, of bytes their hexadecimal.
    """

    def plain(thing: Any) -> Any:
        if isinstance(thing, bytes):
            return thing.hex()
        return thing.tolist() if isinstance(thing, np.ndarray | np.generic) else str(thing)

    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=plain
    )
    return text.encode("utf-8", "surrogatepass")


def needs(package: str, what: str) -> None:
    """Refuses to go on without an optional package.

    Args:
        package: its name.
        what: needs it, in the plural.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        extra = _EXTRAS.get(package, "lm")
        raise MissingExtraError(
            f'{what} need the package {package}: pip install "paceline[{extra}]".'
        )


def first_line(error: BaseException) -> str:
    """An error's message, or what of it stands in its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object with columns, not {type(row).__name__}")
    return row


def _paragraphs(text: str) -> list[str]:
    parts = re.split(r"\n[ \t]*\n", text)
    return [cut for part in parts if (cut := textwrap.dedent(part.strip("\n")).strip())]


def _format_of(file: Path) -> str:
    for name, suffixes in SUFFIXES.items():
        if file.suffix.lower() in suffixes:
            return name
    raise ConfigError(f"{file}: which format is it? Give one of {some(SUFFIXES)}.")


def files_of(path: Path, format: str | None = None) -> list[Path]:
    """The files that a path means, in order.

    Args:
        path: a file, a folder or a pattern.
        format: as for `read_files`.

    Raises:
        ConfigError: there is none.
    """
    if path.is_file():
        return [path]
    wanted = SUFFIXES[format] if format else [s for group in SUFFIXES.values() for s in group]
    if path.is_dir():
        if any((path / name).is_file() for name in _OF_DATASETS):
            raise ConfigError(f"{path} is a saved Hugging Face dataset: use the type huggingface.")
        found = [file for file in path.rglob("*") if file.suffix.lower() in wanted]
        found = [f for f in found if not any(p[0] == "." for p in f.relative_to(path).parts)]
        what = f"no {some(wanted)} file"
    else:
        found, what = [Path(name) for name in glob.glob(str(path), recursive=True)], "no such file"
    found = sorted(file for file in found if file.is_file())
    if not found:
        raise ConfigError(f"{path}: {what}.")
    return found


def _from_disk(loaded: Any, name: str, split: str) -> Any:
    """A split of a saved dataset; slices as on the hub."""
    match = _SLICE.fullmatch(split)
    if match is None:
        raise ConfigError(f"split {split!r}: write it like train, train[:20] or train[10%:90%].")
    if isinstance(loaded, dict):
        if match["name"] not in loaded:
            known = some(loaded)
            raise ConfigError(f"the dataset {name!r} has no split {match['name']!r}, but {known}.")
        loaded = loaded[match["name"]]
    if match["start"] is None:
        return loaded
    n = len(loaded)

    def bound(text: str, percent: str) -> int | None:
        if not text:
            return None
        return round(int(text) * n / 100) if percent else int(text)

    bounds = slice(bound(match["start"], match["p"]), bound(match["stop"], match["q"]))
    return loaded.select(range(*bounds.indices(n)))
