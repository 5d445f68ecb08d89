"""Language models by name, with their tokenizers: made on the spot, packaged, or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.lm import gguf
from paceline.lm.loading import read_model, read_tokenizer, reading
from paceline.rl.redteam.tiny import TINY, tiny_model, tiny_tokenizer


def model_and_tokenizer(name: str, *, where: str = "", seed: int = 0) -> tuple[Any, Any]:
    """A causal model of transformers and its tokenizer.

    Args:
        name: "tiny" for a small random model of English words, "smollm2", a folder, or a hub id.
        where: it stands, for messages; the name itself if empty.
        seed: of a tiny model's weights.

    Raises:
        ConfigError: there is no such model.
        MissingExtraError: a package is not installed.
    """
    with reading(where or name):
        if name == TINY:
            return tiny_model(seed), tiny_tokenizer()
        folder = _folder(name)
        return read_model(folder, dtype="auto")[0], read_tokenizer(folder)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model alone.

    Args:
        name: as for `model_and_tokenizer`.

    Raises:
        ConfigError: there is no such model.
    """
    with reading(name):
        return tiny_tokenizer() if name == TINY else read_tokenizer(_folder(name))


def _folder(name: str) -> str:
    if name in gguf.PACKAGED and not Path(name).exists():
        return str(gguf.converted(gguf.packaged(name), lambda line: None))
    return name
