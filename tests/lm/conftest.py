"""A tokenizer and models for all tests of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from language_models import bpe_tokenizer, write_tiny


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 600 tokens with ChatML; its pad token is its end token."""
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Small random Llamas with and without dropout, their tokenizer, and dialogues."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer)
