"""`paceline preview`: all of it on stdout, in plain characters where there are no others."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def test_everything_is_shown_and_nothing_written(paceline, tmp_path: Path):
    code, out, err = paceline("preview", "toy.yaml", "optimizer.lr=0.5", PYTHONIOENCODING="utf-8")
    assert code == 0, err
    for heading in ("Recipe", "Model", "Training data", "Learning rate of optimizer"):
        assert f"\n{heading}\n" in out
    assert "override 'optimizer.lr=0.5'" in out
    assert "toy.yaml:2" in out
    assert "start 0.5, peak 0.5 at 0, end 0.5" in out
    assert "•" in out
    assert "\x1b" not in out
    assert "hello" in err  # the recipe's own print
    assert not (tmp_path / "runs").exists()


def test_a_terminal_without_utf8_gets_ascii(paceline):
    code, out, _ = paceline("preview", "toy.yaml", PYTHONIOENCODING="ascii")
    assert code == 0
    assert out.isascii()
    assert "+----" in out


def test_depth_says_how_many_modules_are_listed(paceline, tmp_path: Path):
    text = (tmp_path / "toy.yaml").read_text()
    linear = "{_target_: torch.nn.Linear, in_features: 1, out_features: 1}"
    (tmp_path / "toy.yaml").write_text(
        text.replace(linear, f"{{_target_: torch.nn.Sequential, _args_: [{linear}]}}")
    )
    assert "Linear  (4, 1)" in paceline("preview", "toy.yaml")[1].replace("   ", " ")
    assert "Linear  (4, 1)" not in paceline("preview", "toy.yaml", "--depth", "0")[1]


def test_a_recipe_with_mistakes_is_code_2(paceline):
    code, _, err = paceline("preview", "toy.yaml", "trainer.epoch=3")
    assert code == 2
    assert "did you mean 'epochs'" in err


@pytest.mark.parametrize("name", ["digits", "gpt", "gan"])
def test_the_shipped_recipes_are_shown(paceline, name):
    code, out, err = paceline("preview", str(RECIPES / f"{name}.yaml"))
    assert code == 0, err
    assert "the forward pass failed" not in out
    assert "peak 0.00" in out
