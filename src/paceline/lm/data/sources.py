"""The sources of language-model data that recipes name: files, Hugging Face datasets, functions."""

from __future__ import annotations

import inspect
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import pydantic

from paceline.errors import ConfigError
from paceline.factories import DataSource, DataSourceConfig, HumanFloat
from paceline.lm.data import rows as read
from paceline.lm.data.columns import KNOWN, as_dialogues, as_texts, split_of
from paceline.lm.data.mixing import split
from paceline.lm.data.rows import Rows
from paceline.recipe.code import is_own_code


class RowsConfig(DataSourceConfig):
    """The settings of a source of dialogues or texts.

    Attributes:
        columns: where messages or texts are, see `paceline.lm.data.columns`: `{messages:
            conversations}`, `{user: question, assistant: answer}` or `{text: body}`.
        roles: the role that a turn's speaker stands for, such as `{human: user}`.
        content: the field of a turn that holds what is said.
        eval_share: the part of the rows, by a hash of their content, that is the split "eval"; the
            rest is "train". 0: there are no splits.
    """

    columns: dict[str, str] | None = None
    roles: dict[str, str] | None = None
    content: str | None = None
    eval_share: HumanFloat = pydantic.Field(0.0, ge=0, lt=1)


class RowSource(DataSource):
    """Rows, as dialogues or texts."""

    config_type = RowsConfig

    @abstractmethod
    def read(self, config: Any, split: str) -> Rows:
        """The rows as they are stored.

        Args:
            config: this source's config.
            split: "train" or "eval", or what the config says.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs a read().")

    def load(self, config: Any, split: str) -> Any:
        return self.read(config, split)

    def dialogues(self) -> Rows:
        """Rows with `messages`."""
        c = self.config
        return as_dialogues(
            self._part(), c.columns or self.known_columns(), roles=c.roles, content=c.content
        )

    def texts(self) -> Rows:
        """Rows with `text`."""
        columns = self.config.columns or {}
        if useless := [n for n in ("roles", "content") if getattr(self.config, n) is not None]:
            raise ConfigError(f"{useless[0]} has no effect on texts: it is for dialogues.")
        if unknown := columns.keys() - {"text"}:
            raise ConfigError(
                f"columns: {min(unknown)!r}: a source of texts has one column, `text`, such as "
                "{text: body}."
            )
        return as_texts(self._part(), columns.get("text"))

    def known_columns(self) -> Any:
        """The columns of a set that is known by name; None for any other."""
        return None

    def _part(self) -> Rows:
        """The rows of the split."""
        wanted = self.config.split or self.split
        found: Any = self()
        share = self.config.eval_share
        if not share:
            return found
        if wanted not in ("train", "eval"):
            raise ConfigError(f"split={wanted!r}: with eval_share there are train and eval.")
        return split(found, {"train": 1 - share, "eval": share})[wanted]


class _UnsplitConfig(RowsConfig):
    """A source whose rows have no splits of their own."""

    @pydantic.model_validator(mode="after")
    def _has_splits(self) -> _UnsplitConfig:
        if self.split and not self.eval_share:
            raise ValueError(
                f"split={self.split!r} has no effect here: with eval_share: 10% there are the "
                "splits train and eval."
            )
        return self


class FileConfig(_UnsplitConfig):
    """A source of files.

    Attributes:
        path: a file, a folder, or a pattern such as `data/*.jsonl`; relative to the working folder.
            Files may move between two starts of a run: what is compared is their content.
    """

    free = frozenset({"path"})
    path: str

    @pydantic.field_validator("path")
    @classmethod
    def _is_there(cls, path: str) -> str:
        try:
            read.files_of(Path(path))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return path


class _Files(RowSource):
    """Files of the format that the class is named after."""

    config_type = FileConfig

    def read(self, config: Any, split: str) -> Rows:
        options = {name: getattr(config, name) for name in ("key", "by") if hasattr(config, name)}
        given = {name: value for name, value in options.items() if value is not None}
        return read.read_files(config.path, type(self).name, **given)  # pyright: ignore[reportAttributeAccessIssue]


class Jsonl(_Files):
    """One JSON object a line."""

    name = "jsonl"


class JsonConfig(FileConfig):
    """A JSON file.

    Attributes:
        key: of the list in the file, if it is no list itself.
    """

    key: str | None = None


class Json(_Files):
    """A list of objects."""

    name = "json"
    config_type = JsonConfig


class Csv(_Files):
    """A table with a header."""

    name = "csv"


class Parquet(_Files):
    """A table in Apache Parquet."""

    name = "parquet"


class TextConfig(FileConfig):
    """Text files.

    Attributes:
        by: what a row is: a file, or a paragraph.
    """

    by: Literal["file", "paragraph"] = "file"


class Text(_Files):
    """Plain text."""

    name = "text"
    config_type = TextConfig


class HuggingFaceConfig(RowsConfig):
    """A dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote.

    Attributes:
        name_or_path: its name or the folder.
        config: its configuration, if it has several.
        revision: a commit or branch of the hub.
        cache_dir: where the library keeps what it downloads.
    """

    free = frozenset({"cache_dir"})
    name_or_path: str
    config: str | None = None
    revision: str | None = None
    cache_dir: Path | None = None


class HuggingFace(RowSource):
    """Hugging Face datasets; instruct sets that are known by name need no columns."""

    name = "huggingface"
    config_type = HuggingFaceConfig

    def read(self, config: Any, split: str) -> Rows:
        name, named = split_of(config.name_or_path, split)
        known = KNOWN.get(name)
        return read.read_huggingface(
            name,
            named,
            config=config.config,
            revision=config.revision,
            cache_dir=config.cache_dir,
            verify=known is None or known.verify,
        )

    def known_columns(self) -> Any:
        known = KNOWN.get(split_of(self.config.name_or_path)[0])
        return None if known is None else known.columns


class FunctionConfig(_UnsplitConfig):
    """A function of the recipe's `code:` that returns rows.

    Attributes:
        function: its dotted path, such as `mine.rows`.
        arguments: given to it by name.
    """

    function: str
    arguments: dict[str, Any] = {}


class Function(RowSource):
    """What a Python function returns."""

    name = "python"
    config_type = FunctionConfig

    def read(self, config: Any, split: str) -> Rows:
        module, _, name = config.function.rpartition(".")
        own: Any = sys.modules.get(module) if is_own_code(module) else None
        found: Any = getattr(own, name, None)
        if not inspect.isfunction(found):
            raise ConfigError(
                f"function: {config.function!r} is no function of the recipe's `code:`; write "
                "MODULE.FUNCTION, where MODULE is the file's name without .py."
            )
        return read.read_callable(found, **config.arguments)


class ManualConfig(RowsConfig):
    """Python's reference manual."""

    eval_share: HumanFloat = pydantic.Field(0.1, ge=0, lt=1)


class PythonManual(RowSource):
    """Paragraphs of Python's reference manual, as dialogues or texts: real data to try things."""

    name = "python_manual"
    config_type = ManualConfig

    def read(self, config: Any, split: str) -> Rows:
        return read.python_manual("texts" if self.factory.name == "causal" else "dialogues")  # pyright: ignore[reportAttributeAccessIssue]
