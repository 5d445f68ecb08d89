"""Tokens and operations per second: against numbers worked out by hand, and torch's own count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lm_trainers import recipe
from tiny import model
from torch.utils.flop_counter import FlopCounterMode

from paceline.callbacks import throughput
from paceline.errors import ConfigError
from paceline.factories import get_config
from paceline.lm import SFTTrainer, TokenThroughput
from paceline.lm.flops import ModelFlops, flops_of, pairs
from paceline.testing import Ranks

# The Llama of `tiny.py`: width 16, 24 within the MLP, 4 heads of 4, keys and values of 2, 2 layers.
LAYER = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16 + 3 * 16 * 24
WEIGHTS = 2 * LAYER + 16 * 600  # and the output layer; the embedding is a look-up
PAIR = 2 * (2 * 2 * 4 * 4)  # two layers; scores and values; 4 heads of 4


def test_the_operations_of_documents_are_those_worked_out_by_hand() -> None:
    found = flops_of(model())
    assert found == ModelFlops(2 * WEIGHTS, {None: PAIR})
    assert isinstance(found, ModelFlops)
    by_hand = 2 * WEIGHTS * (3 + 5) + PAIR * (1 + 2 + 3 + 1 + 2 + 3 + 4 + 5)
    assert found.forward([3, 5]) == by_hand
    assert found.training([3, 5]) == 3 * by_hand
    assert flops_of(model(tied=True)) == found  # the embedding is the output layer too
    assert found.forward([8]) > by_hand  # one document costs more than two


def test_a_window_bounds_what_a_token_sees() -> None:
    for length, window in ((5, None), (5, 9), (5, 5), (9, 4), (9, 1)):
        seen = [min(i + 1, window or length) for i in range(length)]
        assert pairs(length, window) == sum(seen)
    windowed = model()
    windowed.config.layer_types = ["sliding_attention", "full_attention"]
    windowed.config.sliding_window = 4
    found = flops_of(windowed)
    assert found == ModelFlops(2 * WEIGHTS, {4: PAIR // 2, None: PAIR // 2})
    windowed.config.layer_types = ["linear_attention"] * 2
    assert flops_of(windowed) == "its layers are of the kind linear_attention"


def mixture() -> Any:
    import transformers

    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=600, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_of_experts_a_token_takes_its_share() -> None:
    attention, router, expert = 2 * (16 * 16 + 16 * 8), 16 * 4, 3 * 16 * 24
    found = flops_of(mixture())
    assert isinstance(found, ModelFlops)
    assert found.per_token == 2 * (attention + router + 2 * expert + 16 * 600)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrix_products_are_those_that_torch_counts(kind: str) -> None:
    """It counts attention to later tokens as well, which is length squared."""
    made = model(kind)
    made.set_attn_implementation("eager")
    found = flops_of(made)
    assert isinstance(found, ModelFlops)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        made(input_ids=torch.arange(12)[None], use_cache=False)
    squared = sum(found.per_pair.values()) * 12 * 12
    assert counted.get_total_flops() == 12 * found.per_token + squared


def timed(folder: Path, run_dir: Path, **trainer: Any) -> list[dict[str, Any]]:
    """The timing rows of a run of packs, two a step, a row each three steps."""
    tree = recipe(
        folder,
        data={"pack": True, "max_length": 64, "micro_batch_size": 1},
        trainer={"epochs": 1, "log_every": 3, "gradient_accumulation_steps": 2, **trainer},
    )
    SFTTrainer(get_config(tree), run_dir=run_dir).train(seed=0)
    return [json.loads(line) for line in (run_dir / "timing.jsonl").read_text().splitlines()]


def test_rows_have_the_speeds_of_all_tokens_and_of_those_trained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock with 2 s between two looks they are what the batches' documents add up to."""
    looks = iter(range(0, 10_000, 2))
    clock = SimpleNamespace(perf_counter=lambda: float(next(looks)))
    monkeypatch.setattr(throughput, "time", clock)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(SFTTrainer, "loss", lambda self, batch: noted(self, batch, seen))
    rows = timed(tiny, tmp_path / "run", peak_tflops=1e-6)
    first = next(row for row in rows if "tokens_per_second" in row)
    assert first["step"] == 3
    batches = seen[:6]
    trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    lengths = [n for batch in batches for row in batch["documents"] for n in row]
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 48
    forward = 2 * (2 * layer + 32 * 600) * sum(lengths)
    forward += 2 * 4 * 32 * sum(n * (n + 1) // 2 for n in lengths)
    assert first["trained_tokens_per_second"] == trained / 2
    assert first["tokens_per_second"] == 6 * 64 / 2
    assert first["samples_per_second"] == 6 / 2
    assert first["tflops_per_device"] == pytest.approx(3 * forward / 2 / 1e12)
    assert first["mfu"] == pytest.approx(3 * forward / 2 / 1e6)  # of the 10^6 a second given


def noted(trainer: Any, batch: dict[str, Any], seen: list[dict[str, Any]]) -> torch.Tensor:
    seen.append(batch)
    logits = trainer.model(**trainer.inputs(batch)).logits
    return logits.float().square().mean()


def on_ranks(folder: Path, run_dir: Path) -> list[dict[str, Any]]:
    return timed(folder, run_dir)


def test_of_all_ranks_together_and_without_a_peak_no_mfu(
    ranks: Ranks, tiny: Path, tmp_path: Path
) -> None:
    rows = ranks(on_ranks, 2, tiny, tmp_path / "run")[0]
    speeds = [row for row in rows if "tokens_per_second" in row]
    assert speeds
    for row in speeds:
        assert row["tokens_per_second"] == pytest.approx(64 * row["samples_per_second"])
        assert row["tflops_per_device"] > 0
        assert "mfu" not in row


def test_a_peak_is_positive() -> None:
    with pytest.raises(ConfigError, match=r"TokenThroughput\(peak_tflops=0\): give a number above"):
        TokenThroughput(0)
