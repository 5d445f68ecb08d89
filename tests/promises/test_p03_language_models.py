"""P3 for language models: however tokens are laid out, a step is that on each document alone.

What is right is computed in plain torch, with transformers' own attention, one document at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from language_models import FAMILIES, model_of
from paceline import Parallel
from paceline.callbacks import Callback
from paceline.lm import SFTTrainer
from paceline.lm.data import Collate, PackedDataset, PaddedDataset, Sample, plan_packs
from paceline.testing import Ranks
from paceline.world.dtensors import whole

pytest.importorskip("transformers")

LENGTHS = [5, 19, 13, 2, 14, 3, 9, 26]  # of which most exceed the windows of those that have one
CAPACITY = 40  # so that there are three packs: two ranks do not have the same number
STEPS = 3
TOLERANCE = 1e-6  # of the largest weight; float32 itself has 6e-8
WAYS = {  # whether packed, rows in a micro-batch, and micro-batches in the one window of an epoch
    "padded": (False, 8, 1),
    "accumulated": (False, 3, 3),
    "packed": (True, 8, 1),
    "packs accumulated": (True, 1, 8),
}


def samples() -> list[Sample]:
    """Documents of which each third is trained whole, from its first token on, and the others from
    a third of it on: each has another part in the mean over tokens."""
    generator = np.random.default_rng(8)
    made = []
    for i, length in enumerate(LENGTHS):
        ids = generator.integers(3, 64, length).astype(np.int32)
        labels = ids.copy()
        labels[: (length // 3 if i % 3 else 0)] = -100
        made.append(Sample(ids, labels))
    return made


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def by_hand(family: str) -> dict[str, torch.Tensor]:
    """The weights of a plain loop whose model sees each document alone."""
    model = model_of(family)
    optimizer = optimizer_of(model)
    documents = [
        (torch.tensor(each.ids).long(), torch.tensor(each.labels).long()) for each in samples()
    ]
    count = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ids, labels in documents:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            total = F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
            (total / count).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


class Last(Callback):
    """Keeps the weights at a run's end, whole."""

    weights: dict[str, torch.Tensor]

    def on_train_end(self, trainer: Any) -> None:
        state = trainer.named_models()["model"].state_dict()
        self.weights = {name: whole(value).clone() for name, value in state.items()}


def trained(family: str, way: str, **settings: Any) -> dict[str, torch.Tensor]:
    packs, rows, accumulation = WAYS[way]
    dataset = PaddedDataset(samples())
    if packs:
        dataset = PackedDataset(samples(), plan_packs(LENGTHS, CAPACITY))
        assert len(dataset) == 3
    model, last = model_of(family), Last()
    SFTTrainer(
        model=model,
        optimizer=optimizer_of(model),
        train_dataloader=DataLoader(dataset, batch_size=rows, collate_fn=Collate()),  # pyright: ignore[reportArgumentType]
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        epochs=STEPS,
        progress=False,
        run_dir=None,
        callbacks=[last],
        **settings,
    ).train(seed=0)
    return last.weights


def assert_equal(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor], what: Any) -> None:
    assert found.keys() == right.keys()
    largest = max(float(value.abs().max()) for value in right.values())
    far = max(float((found[name] - right[name]).abs().max()) for name in right)
    assert far <= TOLERANCE * largest, (what, far)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_on_each_document_alone(family: str) -> None:
    right = by_hand(family)
    start = model_of(family).state_dict()
    assert max(float((right[name] - start[name]).abs().max()) for name in right) > 0.01
    for way in WAYS:
        assert_equal(trained(family, way), right, way)


def on_ranks(families: list[str]) -> list[tuple[tuple[str, int], dict[str, torch.Tensor]]]:
    """Replicated and sharded (FSDP2)."""
    return [
        ((family, shard), trained(family, "packs accumulated", parallel=Parallel(dp_shard=shard)))
        for family in families
        for shard in (1, 2)
    ]


def test_ranks_equal_one_process_with_each_document_alone(ranks: Ranks) -> None:
    families = ["GPT2", "Gemma3"]  # with tied weights; with windows in some layers
    right = {family: by_hand(family) for family in families}
    for one, other in zip(*ranks(on_ranks, 2, families), strict=True):
        (family, shard), weights = one
        assert_equal(weights, right[family], (family, shard))
        assert all(torch.equal(weights[name], other[1][name]) for name in weights)
