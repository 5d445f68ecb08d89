"""Each example's two loops, written by hand and with Paceline, end with the same bytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from paceline.testing import assert_resumes_exactly

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL: dict[str, dict[str, int]] = {
    "word_language_model": {"epochs": 2, "words": 3_000, "vocabulary": 50, "width": 8},
    "dcgan": {"epochs": 2, "images": 150, "width": 4},
    "vae": {"epochs": 2, "images": 200, "width": 8},
    "siamese": {"epochs": 2, "pairs": 200, "width": 2},
    "plateau": {"epochs": 8, "images": 150, "width": 8},
    "nanogpt": {"steps": 8, "every": 4, "warm_up": 3, "val_batches": 2, "width": 4, "layers": 1},
    "lbfgs": {"epochs": 3, "images": 200},
    "three_optimizers": {"epochs": 2, "n": 500, "width": 8},
}


@pytest.fixture(autouse=True, scope="module")
def _digits() -> None:
    """Importing scikit-learn sets environment variables, which no test may."""
    import_module("sklearn.datasets")


@contextmanager
def loops(name: str) -> Iterator[tuple[ModuleType, ModuleType]]:
    """An example's modules, imported as from its folder and forgotten afterwards."""
    sys.path.insert(0, str(EXAMPLES / name))
    try:
        yield import_module("plain"), import_module("with_paceline")
    finally:
        sys.path.remove(str(EXAMPLES / name))
        for module in ("plain", "with_paceline"):
            sys.modules.pop(module, None)


def state(models: Any) -> dict[str, bytes]:
    """The bytes of every parameter and buffer of a model, or of models by name."""
    models = models if isinstance(models, dict) else {"model": models}
    return {
        f"{name}.{key}": value.numpy().tobytes()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("name", SMALL)
def test_both_loops_end_with_the_same_bytes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They print the same, too. Nothing that one leaves in torch's generator reaches the other."""
    with loops(name) as (plain, with_paceline):
        by_hand = plain.train(**SMALL[name])
        printed = capsys.readouterr().out
        torch.manual_seed(99)
        trainer = with_paceline.train(**SMALL[name])
    assert state(dict(trainer.named_models())) == state(by_hand)
    assert capsys.readouterr().out == printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", ["word_language_model", "dcgan", "three_optimizers"])
def test_an_example_with_state_of_its_own_resumes_exactly(name: str, tmp_path: Path) -> None:
    """The hidden state, the noise's generator and the slow copy of a network come back."""
    with loops(name) as (_, with_paceline):

        def build(run_dir: Path) -> Any:
            return with_paceline.make_trainer(**SMALL[name], progress=False, run_dir=run_dir)

        assert_resumes_exactly(build, tmp_path, stop_at=2)


def test_the_list_of_examples_has_each_folder() -> None:
    text = (EXAMPLES / "README.md").read_text()
    listed = re.findall(r"^\| \[`(\w+)`\]\((\w+)\)", text, flags=re.M)
    assert listed == [(name, name) for name in SMALL]
    assert sorted(SMALL) == sorted(path.parent.name for path in EXAMPLES.glob("*/plain.py"))
