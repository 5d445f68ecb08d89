"""Files of predictions, written batch by batch: JSON lines, or arrays in an npz file."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

import numpy as np
import torch

from paceline.errors import ConfigError, DataError
from paceline.log.floats import as_text

_UNNAMED = "prediction"  # what outputs without a name are called
_INDEX = "index"  # of a sample, in its line


class PredictionsFile(Protocol):
    """Takes outputs in the order of their samples.

    Attributes:
        count: samples so far.
    """

    count: int

    def write(self, outputs: Mapping[str, Any]) -> None:
        """Adds the outputs of some samples: by name, tensors of [samples, ...] or lists."""
        ...


@contextmanager
def open_predictions(path: Path) -> Iterator[PredictionsFile]:
    """A file of predictions, which is there once all are written.

    Args:
        path: ends in `.jsonl` for a line a sample, or in `.npz` for an array an output.

    Raises:
        ConfigError: the file cannot be written; from `write` as well.
        DataError: outputs do not go into such a file.
    """
    hidden = path.with_name(f".{path.name}.new")
    with ExitStack() as opened:
        with _errors_name(path):
            kind = _Lines if path.suffix == ".jsonl" else _Arrays
            file = kind(path, hidden, opened)
        opened.callback(hidden.unlink, missing_ok=True)
        yield file
        with _errors_name(path):
            file.finish()
            os.replace(hidden, path)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """A context in which an error of the disk is one of this file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} could not be written: {error}") from None


def _close(file: IO[Any]) -> None:
    """Closes a file that is discarded if this fails: `finish` has closed the others."""
    with suppress(OSError):
        file.close()


class _Lines:
    """JSON lines: `{"index": 0, "prediction": [0.1, 0.9]}`, with names in place of "prediction"."""

    def __init__(self, path: Path, hidden: Path, opened: ExitStack) -> None:
        self._path = path
        self._file = hidden.open("w", encoding="utf-8")
        opened.callback(_close, self._file)
        self.count = 0

    def write(self, outputs: Mapping[str, Any]) -> None:
        columns = {name or _UNNAMED: _plain(values) for name, values in outputs.items()}
        if _INDEX in columns:
            raise DataError(
                f"predict_step has an output called {_INDEX!r}, as the sample's own number in a "
                "line is: rename it."
            )
        for row in zip(*columns.values(), strict=True):
            line = {_INDEX: self.count, **dict(zip(columns, row, strict=True))}
            try:
                text = json.dumps(line, ensure_ascii=False)
            except TypeError as error:
                raise DataError(f"predict_step's outputs are no JSON ({error}).") from None
            with _errors_name(self._path):
                self._file.write(text + "\n")
            self.count += 1

    def finish(self) -> None:
        """Writes what is buffered."""
        self._file.close()


def _plain(values: Any) -> Any:
    """A list of what JSON can hold."""
    if isinstance(values, torch.Tensor):
        return _plain(values.tolist())
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    if isinstance(values, dict):
        return {str(name): _plain(value) for name, value in values.items()}
    return as_text(values) if isinstance(values, float) else values


class _Arrays:
    """Arrays by name, in files of their own until all are known, as an npz file needs them."""

    def __init__(self, path: Path, hidden: Path, opened: ExitStack) -> None:
        self._path, self._hidden, self._opened = path, hidden, opened
        folder = tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True)
        self._folder = Path(opened.enter_context(folder))
        self._files: dict[str, BinaryIO] = {}
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.count = 0

    def write(self, outputs: Mapping[str, Any]) -> None:
        added = 0
        for name, values in outputs.items():
            array = _array(name or _UNNAMED, values)
            form = self._forms.setdefault(name, (array.dtype, array.shape[1:]))
            if form != (array.dtype, array.shape[1:]):
                raise DataError(
                    f"{name or _UNNAMED}: samples of shape {list(array.shape[1:])} follow ones of "
                    f"{list(form[1])}, and an npz file holds arrays: write a .jsonl file."
                )
            with _errors_name(self._path):
                if name not in self._files:
                    path = self._folder / str(len(self._files))
                    self._files[name] = path.open("w+b")
                    self._opened.callback(_close, self._files[name])
                self._files[name].write(np.ascontiguousarray(array).data)
            added = len(array)
        self.count += added

    def finish(self) -> None:
        """Writes the npz file."""
        with zipfile.ZipFile(self._hidden, "w", allowZip64=True) as packed:
            for name, file in self._files.items():
                dtype, shape = self._forms[name]
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (self.count, *shape),
                }
                file.seek(0)
                with packed.open(f"{name or _UNNAMED}.npy", "w", force_zip64=True) as target:
                    np.lib.format.write_array_header_2_0(target, header)
                    while block := file.read(1 << 20):
                        target.write(block)


def _array(name: str, values: Any) -> np.ndarray:
    """The values as an array.

    Raises:
        DataError: they are no numbers.
    """
    if isinstance(values, torch.Tensor):
        half = values.dtype == torch.bfloat16  # which numpy does not have
        return (values.float() if half else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "biufc":
        raise DataError(f"{name}: an npz file holds numbers only; write a .jsonl file.")
    return array
