"""Samples at validations: what the model would say, in a table, without disturbing training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lm_trainers import Last, recipe, train

from language_models import ANSWERS
from paceline import Parallel
from paceline.errors import ConfigError, RecipeError
from paceline.factories import get_config
from paceline.lm import CausalTrainer, SFTTrainer
from paceline.log import Sink, Table
from paceline.testing import Ranks, bits, rows


def asked(folder: Path, kind: str = "sft", **samples: Any) -> dict[str, Any]:
    """Packs, a model with dropout, and a validation each other step."""
    texts = "chats" if kind == "sft" else "texts"
    source = {"type": "jsonl", "path": str(folder / f"{texts}.jsonl")}
    data = {"pack": True, "max_length": 64, "micro_batch_size": 2, "sources": [source],
            "eval_sources": {"near": source}}  # fmt: skip
    settings = {"type": kind, "max_steps": 4, "validate_every": 2, "log_every": 1}
    more = {"samples": samples} if samples else {}
    return recipe(
        folder,
        model={"name_or_path": str(folder / "dropout")},
        data=data,
        trainer={**settings, **more},
    )


class Shown(Sink):
    """Keeps the tables that it is shown."""

    def __init__(self) -> None:
        self.tables: list[tuple[int, str, Table]] = []

    def write_media(self, step: int, name: str, value: Any) -> None:
        self.tables.append((step, name, value))


def written(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run_dir / "samples").iterdir())
    }


def by_hand(folder: Path, weights: dict[str, torch.Tensor], prompt: str, count: int) -> str:
    """The likeliest tokens one after the other, each from the whole text before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "dropout")
    model = AutoModelForCausalLM.from_pretrained(folder / "dropout").eval()
    model.load_state_dict(weights)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_table_has_what_the_model_says_to_the_first_dialogues(
    tiny: Path, tmp_path: Path
) -> None:
    shown, last = Shown(), Last()
    tree = asked(tiny, prompts=2, max_new_tokens=7)
    tree["optimizer"]["lr"] = 0.01  # soon enough it would say nothing but the end
    config = get_config(tree)
    trainer = SFTTrainer(config, run_dir=tmp_path / "run", callbacks=[last], loggers=[shown])
    trainer.train(seed=0)
    found = written(tmp_path / "run")
    assert list(found) == ["step_00000002.jsonl", "step_00000004.jsonl"]
    for i, row in enumerate(found["step_00000004.jsonl"]):
        said = f"Question {i}: {'what ' * (i % 4)}?"
        prompt = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
        assert (row["source"], row["prompt"], row["expected"]) == ("near", prompt, ANSWERS[i])
        assert row["generated"] == by_hand(tiny, last.weights, prompt, 7)
        assert row["generated"]
    step, name, table = shown.tables[-1]
    assert (step, name, len(table.rows)) == (4, "val/samples", 2)
    assert table.rows[0][2] == found["step_00000004.jsonl"][0]["generated"]


def play(folder: Path, run_dir: Path, shard: int, samples: dict[str, Any]) -> Any:
    last = Last()
    config = get_config(asked(folder, **samples))
    parallel = Parallel(dp_shard=shard)
    SFTTrainer(config, run_dir=run_dir, callbacks=[last], parallel=parallel).train(seed=0)
    return bits(last.weights)


@pytest.mark.parametrize("shard", [1, 2])
def test_with_samples_training_ends_with_the_same_bits_on_ranks(
    ranks: Ranks, tiny: Path, tmp_path: Path, shard: int
) -> None:
    samples = {"prompts": ["Why?", "What is a list?"], "max_new_tokens": 5, "temperature": 0.8}
    without = ranks(play, 2, tiny, tmp_path / "without", shard, {})
    with_them = ranks(play, 2, tiny, tmp_path / "with", shard, samples)
    assert with_them == without
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    found = written(tmp_path / "with")
    assert [row["prompt"].split("\n")[1] for row in found["step_00000002.jsonl"]] == [
        "Why?<|im_end|>",
        "What is a list?<|im_end|>",
    ]
    assert not (tmp_path / "without" / "samples").exists()


def test_texts_are_continued_from_their_first_half(tiny: Path, tmp_path: Path) -> None:
    config = get_config(asked(tiny, "causal", prompts=3, max_new_tokens=4))
    CausalTrainer(config, run_dir=tmp_path / "run").train(seed=0)
    for row, answer in zip(written(tmp_path / "run")["step_00000002.jsonl"], ANSWERS, strict=False):
        assert row["prompt"].startswith("<|bos|>")
        assert row["prompt"].removeprefix("<|bos|>") + row["expected"] == answer * 3


def test_samples_that_nothing_would_generate_are_refused(tiny: Path) -> None:
    tree = asked(tiny, prompts=1)
    del tree["data"]["eval_sources"]
    with pytest.raises(ConfigError, match=r"trainer.samples: .* give data.eval_sources or"):
        train(tree)
    mistakes: dict[str, Any] = {"prompts": 0, "max_tokens": 3, "temperature": -1.0}
    for wrong in ({"prompts": []}, *({key: value} for key, value in mistakes.items())):
        with pytest.raises(RecipeError, match=r"trainer\.samples"):
            get_config(asked(tiny, **wrong))
    with pytest.raises(ConfigError, match=r"has \d+ tokens, which leave no room .* of 256"):
        train(asked(tiny, prompts=["far too long " * 100]))
