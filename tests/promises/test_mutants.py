"""Every promise's test is seen to fail on a trainer broken on purpose (`mutants.py`)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutants import MUTANTS, Mutant, apply

from language_models import bpe_tokenizer
from paceline.testing import Ranks, Started

TESTS = Path(__file__).parents[1]
ROOMS = (
    "callbacks",
    "checkpoint",
    "data",
    "lm",
    "log",
    "losses",
    "rl",
    "trackers",
    "trainer",
    "tune",
    "world",
)
LIMIT = 8.0  # seconds for ranks that hang; a healthy run of these tests takes one or two


class Broken(Ranks):
    """Ranks with a defect in each."""

    def __init__(self, healthy: Ranks, mutant: Mutant) -> None:
        super().__init__(limit=LIMIT)
        self._healthy = healthy
        self._mutant = mutant

    def start(self, function: Callable[..., Any], size: int, *args: Any) -> Started:
        return self._healthy.start(call_broken, size, self._mutant.name, function, args)


def call_broken(mutant: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    apply(mutant)
    return function(*args)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_caught(
    mutant: Mutant, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, *(str(TESTS / room) for room in ROOMS)])
    module, name = mutant.test.split(":")
    test = getattr(importlib.import_module(module), name)
    fixtures: dict[str, Callable[[], Any]] = {
        "ranks": lambda: Broken(ranks, mutant),
        "tmp_path": lambda: tmp_path,
        "folder": lambda: tmp_path,
        "monkeypatch": lambda: monkeypatch,
        "tokenizer": bpe_tokenizer,
        "experience": lambda: importlib.import_module("test_environments").Experiences(),
    }
    wanted = {k: make() for k, make in fixtures.items() if k in inspect.signature(test).parameters}
    inspect.signature(test).bind(**wanted, **mutant.arguments)  # or nothing would be tested
    mutant.put_in(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):  # whatever shows that it is wrong
        test(**wanted, **mutant.arguments)
