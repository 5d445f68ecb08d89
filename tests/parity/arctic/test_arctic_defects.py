"""What ArcticTraining got wrong in silence comes out right here; expected values in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import registry
from paceline.factories import DataSource, FactoryTrainer, ModelFactory, get_config, register
from paceline.lm.data.columns import as_dialogues
from paceline.lm.data.packing import PackedDataset, plan_packs
from paceline.lm.data.sample import Sample
from paceline.lm.trainers import next_token_loss


class Line(ModelFactory):
    def create_model(self, model_config: Any) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)


class Numbers(DataSource):
    """The numbers below 24."""

    def load(self, config: Any, split: str) -> Any:
        return [torch.tensor([float(i)]) for i in range(24)]


class Seen(FactoryTrainer):
    """Keeps the numbers of each batch, those of validations apart, and each step's rate."""

    model_factory_type = Line

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[bool, list[list[int]]] = {True: [], False: []}
        self.rates: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        self.seen[self.model.training].append([int(n) for n in batch.flatten()])
        return (self.model(batch) - 1).square().mean()

    def pre_step_callback(self) -> None:
        optimizer: Any = self.optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(autouse=True)
def _named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with registry.restored():
        register("trainer", "seen")(Seen)
        register("data_source", "numbers")(Numbers)
        yield


def trained(seed: int = 0, batch: int = 5, validates: bool = False, **trainer: Any) -> Seen:
    tree = {
        "seed": seed,
        "trainer": {"type": "seen", "progress": False, **trainer},
        "data": {"micro_batch_size": batch, "sources": [{"type": "numbers"}],
                 "eval_sources": {"all": {"type": "numbers"}} if validates else {}},
        "optimizer": {"type": "sgd", "lr": 1e-4},
        "checkpoint": None,
    }  # fmt: skip
    found = Seen(get_config(tree), run_dir=None)
    found.train()
    return found


@pytest.mark.parametrize("accumulation", [1, 4])
def test_B2_and_B5_a_schedule_is_as_long_as_the_run_in_optimizer_steps(accumulation: int) -> None:
    """24 micro-batches: warm-up over a tenth, then down to where one more step would be 0."""
    found = trained(batch=1, gradient_accumulation_steps=accumulation)
    steps = 24 // accumulation
    warm = int(0.1 * steps)
    expected = [(t + 1) / warm if t < warm else (steps - t) / (steps - warm) for t in range(steps)]
    assert found.rates == pytest.approx([1e-4 * share for share in expected], abs=1e-12)
    assert found.training_horizon == found.global_step == steps


def test_B11_each_pass_has_an_order_of_its_own_and_a_validation_has_none() -> None:
    """24 numbers in fives: the last batch is short, and no number is left out or seen twice."""
    found, other = trained(epochs=2), trained(seed=1, validates=True)
    passes = [[*chain(*found.seen[True][start : start + 5])] for start in (0, 5)]
    own = [*chain(*other.seen[True])]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(own) == [*range(24)]
    assert len({tuple(order) for order in (*passes, own, range(24))}) == 4
    assert [*chain(*other.seen[False])] == [*range(24)]
    assert [len(batch) for batch in other.seen[False]] == [5, 5, 5, 5, 4]


def test_B7_a_dialogue_keeps_all_its_turns_in_their_order() -> None:
    """Turns were paired by role there: one system message left one question and one answer."""
    said = ["system:short", "user:a", "assistant:", "user:c", "assistant:d", "user:e"]
    turns = [{"from": who, "value": text} for who, _, text in (one.partition(":") for one in said)]
    columns = {f"{role}": f"chat.from.{role}" for role in ("assistant", "user", "system")}
    [row] = as_dialogues([{"chat": turns}], columns)
    assert [f"{m['role']}:{m['content']}" for m in row["messages"]] == said


def test_B8_no_pack_is_longer_than_was_asked_for() -> None:
    """Documents of 60 tokens in packs of 100: 120 tokens were one pack there."""
    ids = torch.arange(60, dtype=torch.int32).numpy()
    samples = [Sample(ids + 100 * i, ids + 100 * i) for i in range(3)]
    rows = PackedDataset(samples, plan_packs([60, 60, 60], 100))
    assert [len(rows[i]["input_ids"]) for i in range(len(rows))] == [60, 60, 60]


def test_B12_and_B19_a_loss_is_the_mean_over_tokens_whatever_rows_have_none() -> None:
    """A row without a trained token adds nothing, and a batch of such rows is 0 and no error."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor(
        [[-100, 3, -100, 4, 5], [-100] * 5, [2, -100, -100, -100, 6]]  # the first predicts nothing
    )
    trained = [(0, 0, 3), (0, 2, 4), (0, 3, 5), (2, 3, 6)]  # row, place that predicts, token
    odds = torch.log_softmax(logits.detach().float(), -1)
    expected = -sum(float(odds[row, at, token]) for row, at, token in trained) / 4
    found = next_token_loss(logits, labels)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    [gradient] = torch.autograd.grad(found, logits)
    assert gradient[1].count_nonzero() == 0
    none = next_token_loss(logits, torch.full_like(labels, -100))
    [gradient] = torch.autograd.grad(none, logits)
    assert (float(none), int(gradient.count_nonzero())) == (0.0, 0)
