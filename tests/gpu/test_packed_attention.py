"""Attention by document on CUDA: exact, without waiting, and by the varlen kernel the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.lm.attention import attend_by_document, check_packing, packed_inputs

pytestmark = pytest.mark.gpu(kind="cuda")
DOCUMENTS = [[70, 23, 35], [5, 123]]
WINDOW = 32


def model(dtype: torch.dtype, *, varlen: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        initializer_range=0.2,
    )
    torch.manual_seed(2)
    made = transformers.MistralForCausalLM(config).to("cuda", dtype)
    attend_by_document(made, varlen=varlen)
    return made


def inputs() -> dict[str, Any]:
    ids = torch.arange(256).view(2, 128).cuda() * 7 % 128
    positions = [torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS]
    batch = {"input_ids": ids, "position_ids": torch.stack(positions).cuda()}
    return packed_inputs({**batch, "documents": DOCUMENTS})


def test_packed_documents_are_computed_as_each_alone() -> None:
    assert check_packing(model(torch.float32), capacity=256) < 1e-5


def test_varlen_attention_is_the_same_to_rounding() -> None:
    usual, other = model(torch.bfloat16), model(torch.bfloat16, varlen=True)
    assert check_packing(other, capacity=256) < 5e-2
    found = []
    for each in (usual, other):
        logits = each(**inputs()).logits
        logits.float().square().mean().backward()
        found.append((logits.detach(), *(p.grad for p in each.parameters())))
    for one, another in zip(*found, strict=True):
        assert (one - another).abs().max() <= 5e-2 * one.abs().max()


@pytest.mark.parametrize("varlen", [False, True])
def test_nothing_waits_for_the_device(varlen: bool) -> None:
    there, batch = model(torch.bfloat16, varlen=varlen), inputs()
    there(**batch).logits.float().mean().backward()  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        there(**batch).logits.float().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
