"""Language-model trainers from recipes: the same weights packed, padded and on ranks; resumed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from language_models import write_tiny
from paceline import Parallel
from paceline.callbacks import Callback
from paceline.errors import ConfigError, RecipeError
from paceline.factories import get_config
from paceline.lm.data import factory as data_factory
from paceline.lm.trainers import CausalTrainer, SFTTrainer
from paceline.testing import Ranks, assert_resumes_exactly
from paceline.world.dtensors import whole


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of one pass over the dialogues by SGD, changed by section."""
    base: dict[str, Any] = {
        "trainer": {"type": "sft", "epochs": 2, "progress": False},
        "model": {"name_or_path": str(folder / "model")},
        "data": {
            "max_length": 128,
            "cache_dir": str(folder / "cache"),
            "sources": [{"type": "jsonl", "path": str(folder / "chats.jsonl")}],
        },
        "optimizer": {"type": "sgd", "lr": 0.5},
        "lr_scheduler": {"type": "constant", "warmup": 0},
        "checkpoint": None,
    }
    for section, values in changes.items():
        base[section] = {**base[section], **values} if base.get(section) else values
    return base


class Last(Callback):
    """Keeps the weights at a run's end, whole."""

    weights: dict[str, torch.Tensor]

    def on_train_end(self, trainer: Any) -> None:
        state = trainer.named_models()["model"].state_dict()
        self.weights = {name: whole(value).clone() for name, value in state.items()}


def train(tree: dict[str, Any], kind: type = SFTTrainer, **settings: Any) -> dict[str, Any]:
    """The weights after a run that writes nothing."""
    last = Last()
    settings["callbacks"] = [*settings.get("callbacks", ()), last]
    kind(get_config(tree), run_dir=None, **settings).train(seed=0)
    return last.weights


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    """Two steps on all dialogues, each document alone, the mean over all trained tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    documents = []
    for line in (folder / "chats.jsonl").read_text().splitlines():
        user, answer = json.loads(line)["messages"]
        opening = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        texts = (opening, answer["content"] + "<|im_end|>", "\n")
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = [*parts[0], *parts[1], *parts[2]]
        labels = [-100] * len(parts[0]) + parts[1] + [-100] * len(parts[2])
        documents.append((torch.tensor([ids]), torch.tensor([labels])))
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in documents)
    for _ in range(2):
        optimizer.zero_grad()
        for ids, labels in documents:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
            (loss / count).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def far(left: dict[str, Any], right: dict[str, Any]) -> float:
    """The largest difference of two sets of weights."""
    return max(float((left[name] - right[name]).abs().max()) for name in right)


WAYS = {  # data, and micro-batches in the one window of an epoch
    "padded": ({"micro_batch_size": 12}, 1),
    "accumulated": ({"micro_batch_size": 5}, 3),
    "padded to a multiple": ({"micro_batch_size": 12, "pad_to_multiple": 32}, 1),
    "packed": ({"micro_batch_size": 12, "pack": True}, 1),
    "packs accumulated": ({"micro_batch_size": 1, "pack": True}, 12),
}


def test_each_way_of_laying_out_tokens_ends_with_the_weights_of_a_plain_loop(tiny: Path) -> None:
    expected = by_hand(tiny)
    for name, (data, accumulated) in WAYS.items():
        tree = recipe(tiny, data=data, trainer={"gradient_accumulation_steps": accumulated})
        assert far(train(tree), expected) < 1e-6, name


def on_ranks(folder: Path, shard: int) -> dict[str, torch.Tensor]:
    tree = recipe(
        folder,
        data={"micro_batch_size": 2, "pack": True},
        trainer={"gradient_accumulation_steps": 12},
    )
    return train(tree, parallel=Parallel(dp_shard=shard))


@pytest.mark.parametrize("shard", [1, 2])
def test_ranks_end_with_the_weights_of_a_plain_loop(ranks: Ranks, tiny: Path, shard: int) -> None:
    first, second = ranks(on_ranks, 2, tiny, shard)
    assert far(first, by_hand(tiny)) < 1e-6
    assert far(first, second) == 0


def packed_with_dropout(folder: Path) -> SFTTrainer:
    tiny = folder.parent.parent.parent
    tree = recipe(
        tiny,
        model={"name_or_path": str(tiny / "dropout")},
        data={"pack": True, "max_length": 64, "num_workers": 1},
        optimizer={"type": "adamw", "lr": 3e-3},
        trainer={"epochs": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
        checkpoint={"every_steps": 100},
    )
    return SFTTrainer(get_config(tree), run_dir=folder)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_of_packs_resumes_exactly(tiny: Path, size: int) -> None:
    assert_resumes_exactly(
        packed_with_dropout, tiny / f"runs{size}", stop_at=2, ranks=size, limit=120
    )


class Rows(Callback):
    """Keeps the metrics of validations."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.seen.append(dict(metrics))


def test_each_evaluation_source_has_its_loss_and_perplexity_by_its_name(tiny: Path) -> None:
    chats = {"type": "jsonl", "path": str(tiny / "chats.jsonl")}
    some = {"near": {**chats, "sample_count": 3}, "far": {**chats, "sample_count": 5}}
    rows = Rows()
    tree = recipe(tiny, data={"eval_sources": some, "micro_batch_size": 2})
    train(tree, callbacks=[rows])
    for name in some:
        loss = rows.seen[-1][f"val/{name}/loss"]
        assert rows.seen[-1][f"val/{name}/perplexity"] == math.exp(loss)
    assert rows.seen[-1]["val/near/loss"] != rows.seen[-1]["val/far/loss"]


def test_attention_that_is_changed_on_the_way_is_refused(tiny: Path) -> None:
    """Plain attention would take the documents of a pack for one, without a word."""
    tree = recipe(tiny, data={"pack": True})
    trainer = SFTTrainer(get_config(tree), run_dir=None)
    trainer.on_train_start = lambda: trainer.model.set_attn_implementation("sdpa")  # pyright: ignore
    with pytest.raises(ConfigError, match="attention was changed during training on packs"):
        trainer.train(seed=0)


def test_texts_fill_packs_of_exactly_the_length_asked_for(tiny: Path) -> None:
    texts = [{"type": "jsonl", "path": str(tiny / "texts.jsonl")}]
    seen: list[tuple[int, ...]] = []

    class Seen(CausalTrainer):
        def loss(self, batch: Any) -> torch.Tensor:
            seen.append(tuple(batch["input_ids"].shape))
            assert int(batch["input_ids"][0, 0]) >= 0
            return super().loss(batch)

    tree = recipe(tiny, data={"sources": texts, "max_length": 32}, trainer={"type": "causal"})
    train(tree, Seen)
    assert set(seen) == {(1, 32)}


def test_a_second_run_tokenizes_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tiny))
    monkeypatch.setattr(data_factory, "encode_dialogue", None)
    train(recipe(tiny, data={"num_workers": 0, "cache": "only"}))
    with pytest.raises(Exception, match=r"max_length: \d+ -> 100"):
        train(recipe(tiny, data={"max_length": 100, "cache": "only"}))


def prepare(tree: dict[str, Any]) -> None:
    """Tokenizes what a recipe trains on, or takes it from the cache."""
    trainer = SFTTrainer(get_config(tree), run_dir=None)
    trainer.make("tokenizer")
    trainer.factory("data").prepare()


def test_another_template_has_samples_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    folder, other = write_tiny(tmp_path, tokenizer), copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("\n", "\n\n")
    other.save_pretrained(folder / "dropout")
    only = {"cache": "only"}
    prepare(recipe(folder))
    prepare(recipe(folder, data=only))
    with pytest.raises(ConfigError, match="template changed"):
        prepare(recipe(folder, data=only, tokenizer={"name_or_path": str(folder / "dropout")}))


def test_what_is_wrong_with_the_data_is_said_before_the_model_is_built(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    none = {
        "sources": [{"type": "jsonl", "path": "none.jsonl"}],
        "pack": True,
        "pad_to_multiple": 8,
    }
    with pytest.raises(RecipeError) as caught:
        train(recipe(tiny, data=none, trainer={"beta": 1}))
    for text in ("none.jsonl: no such file", "trainer.beta"):
        assert text in str(caught.value)
    with pytest.raises(RecipeError, match="pad_to_multiple has no effect with pack: true"):
        train(recipe(tiny, data={"pack": True, "pad_to_multiple": 8}))
    with pytest.raises(Exception, match=r"1000 tokens are more than the model's context of 256"):
        train(recipe(tiny, data={"max_length": 1000}))
    with pytest.raises(RecipeError, match=r"none of the 12 rows is left .longer than max_length"):
        train(recipe(tiny, data={"max_length": 5}))
    with pytest.raises(RecipeError, match=r"training on preferences .DPO. does not exist yet"):
        get_config(recipe(tiny, trainer={"type": "dpo"}))
