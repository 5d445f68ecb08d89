"""The commands on a recipe of a language model: look at its data, train, export, evaluate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command import Paceline
from paceline.testing import Ranks

RECIPE = """
trainer: {{type: sft, max_steps: 6, max_grad_norm: 1.0, validate_every: 3}}
model: {{name_or_path: {tiny}/dropout}}
data:
  micro_batch_size: 2
  max_length: 0.125Ki
  pack: true
  cache_dir: cache
  sources: [{{type: jsonl, path: "{tiny}/chats.jsonl"}}]
  eval_sources: {{manual: {{type: python_manual, split: eval, sample_count: 9}}}}
optimizer: {{lr: 3e-3}}
checkpoint: [{{type: paceline, every_steps: 2}}, {{type: huggingface, at_end: true}}]
run: {{dir: run}}
"""


@pytest.fixture
def sft(tmp_path: Path, ranks: Ranks, tiny: Path) -> Iterator[Paceline]:
    (tmp_path / "sft.yaml").write_text(RECIPE.format(tiny=tiny))
    paceline = Paceline(tmp_path, ranks)
    yield paceline
    paceline.close()


def test_the_data_are_prepared_and_shown_without_a_model(sft: Paceline, tiny: Path) -> None:
    code, out, err = sft("data", "sft.yaml", "--show", "2", "--html", "page.html")
    assert code == 0, err
    assert "longer than max_length" in out
    assert out.count("\u27e6") == out.count("\u27e7") == 2  # around what is trained
    assert "yes<|im_end|>\u27e7" in out
    page = (sft.folder / "page.html").read_text()
    assert '<span class="green">yes&lt;|im_end|&gt;</span>' in page
    code, out, err = sft("data", "sft.yaml", "data.cache=only", "--json")
    report = json.loads(out)
    assert report["train"]["jsonl"]["samples"] == 12
    assert report["packs"]["capacity"] == 128


def test_a_recipe_without_texts_has_no_such_data(sft: Paceline) -> None:
    text = "trainer: {max_steps: 1}\nmodel: {_target_: torch.nn.Linear, _args_: [1, 1]}\n"
    text += "loss_fn: {_target_: torch.nn.MSELoss}\n"
    text += "optimizer: {_target_: torch.optim.SGD, lr: 1}\ntrain_dataloader:\n"
    text += "  _target_: torch.utils.data.DataLoader\n"
    text += "  dataset: {_target_: torch.utils.data.TensorDataset, _args_: []}\n"
    (sft.folder / "plain.yaml").write_text(text)
    code, out, err = sft("data", "plain.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: plain.yaml: its data are no dialogues or texts")
    assert len(err.splitlines()) == 1


def test_a_run_is_trained_exported_and_evaluated(sft: Paceline) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, _, err = sft("train", "sft.yaml")
    assert code == 0, err
    run = sft.folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/manual/loss" in row][-1]
    assert last["val/manual/perplexity"] == math.exp(last["val/manual/loss"])
    code, out, err = sft("evaluate", "run")
    assert code == 0, err
    assert "The same as the run logged, bit by bit." in out
    code, _, err = sft("export", "run", "--format", "huggingface", "--to", "exported")
    assert code == 0, err
    exported: dict[str, Any] = {}
    for folder in ("exported", "run/exports/huggingface/step_00000006"):
        path = sft.folder / folder
        path = path if (path / "config.json").is_file() else next(path.iterdir())
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompt = [{"role": "user", "content": "What?"}]
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        exported[folder] = model.generate(**ids, max_new_tokens=4, do_sample=False)
        exported[f"{folder} weights"] = model.state_dict()["lm_head.weight"]
    one, two = "exported", "run/exports/huggingface/step_00000006"
    assert torch.equal(exported[one], exported[two])
    assert torch.equal(exported[f"{one} weights"], exported[f"{two} weights"])


def test_memory_on_paper_is_known_without_a_step(sft: Paceline) -> None:
    code, out, err = sft("preflight", "sft.yaml", "--on", "2xA100-80GB", "parallel.dp_shard=2")
    assert code == 0, err + out
    assert "memory: " in out
