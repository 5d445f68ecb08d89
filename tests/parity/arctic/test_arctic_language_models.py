"""ArcticTraining at home: acceptance rows on language models of transformers, one test a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from language_models import bpe_tokenizer, write_tiny
from paceline.errors import RecipeError
from paceline.factories import get_config
from paceline.lm import export as exporting
from paceline.lm.trainers import SFTTrainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("arctic"), bpe_tokenizer())


def recipe(tiny: Path, **data: Any) -> dict[str, Any]:
    chats = {"type": "jsonl", "path": str(tiny / "chats.jsonl")}
    return {
        "trainer": {"type": "sft", "progress": False},
        "model": {"name_or_path": str(tiny / "model")},
        "data": {"sources": [chats], "cache_dir": str(tiny / "cache"), **data},
        "checkpoint": None,
    }


def test_AT_01_13_and_41_a_recipe_of_a_model_and_a_source_is_enough(tiny: Path) -> None:
    """Of its defaults, the seed is 0, the model in fp32, and gradients are clipped if asked."""
    trainer = SFTTrainer(get_config(recipe(tiny)), run_dir=None)
    trainer.make("tokenizer", "data", "model", "optimizer")
    config: Any = trainer.config
    assert (trainer.epochs, config.data.micro_batch_size) == (1, 1)
    assert trainer.gradient_accumulation_steps == 1
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-4, 0.1)
    assert (config.optimizer.betas, config.lr_scheduler.warmup) == ((0.9, 0.999), 0.1)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert config.lr_scheduler.type == "linear"
    model: Any = trainer.model
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "sdpa")
    assert trainer.max_grad_norm is None
    # Samples may be as long as the model's context.
    assert trainer.data_factory.max_length == 256  # pyright: ignore
    for changes, widths in (
        ({"pad_to_multiple": 48}, {48, 96}),
        ({"pad_to_multiple": 256}, {256}),
        ({"pack": True}, {256}),
    ):
        trainer = SFTTrainer(get_config(recipe(tiny, **changes)), run_dir=None)
        trainer.make("tokenizer", "data")
        assert {batch["input_ids"].shape[1] for batch in trainer.train_dataloader} <= widths
    bare = tiny / "bare"
    if not bare.exists():
        held = json.loads((tiny / "model/config.json").read_text())
        bare.mkdir()
        (bare / "config.json").write_text(
            json.dumps({k: v for k, v in held.items() if "position" not in k} | {
                "model_type": "bloom", "hidden_size": 32, "architectures": ["BloomForCausalLM"],
            })
        )  # fmt: skip
    tree = recipe(tiny) | {"tokenizer": {"name_or_path": str(tiny / "model")}}
    tree["model"] = {"name_or_path": str(bare), "from_scratch": True}
    with pytest.raises(RecipeError, match=r"data.max_length: the model does not say how long its"):
        SFTTrainer(get_config(tree), run_dir=None).configure()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_AT_28_the_index_of_shards_has_the_size_of_their_tensors(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(exporting, "SHARD", 20_000)  # bytes
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=dtype)
    exporting.write_model(model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [p.numel() * p.element_size() for p in model.state_dict().values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_B12_the_loss_of_a_validation_is_the_mean_over_its_trained_tokens(tiny: Path) -> None:
    """Batches of five of answers of different lengths: a mean of their means is another number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chats = {"type": "jsonl", "path": str(tiny / "chats.jsonl")}
    tree = recipe(tiny, micro_batch_size=5, eval_sources={"near": chats})
    trainer = SFTTrainer(get_config(tree), run_dir=None)
    found: Any = trainer.evaluate()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    losses = []
    for line in (tiny / "chats.jsonl").read_text().splitlines():
        user, answer = json.loads(line)["messages"]
        opening = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        start, said = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (opening, answer["content"] + "<|im_end|>")
        )
        ids = torch.tensor([start + said])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(said), reduction="none"))
    mean = float(torch.cat(losses).mean())
    means = [float(torch.cat(losses[i : i + 5]).mean()) for i in (0, 5, 10)]
    assert abs(sum(means) / 3 - mean) > 1e-3
    assert found["val/near/loss"] == pytest.approx(mean, rel=1e-5)
