"""Packed documents give the logits and gradients of each alone, with every model that is let in.

What is right is computed by transformers itself, one document after the other, and summed by hand.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from builders import Count
from language_models import FAMILIES, LLAMA, SPECIAL, WINDOW, model_of
from paceline.errors import ConfigError
from paceline.lm import attention
from paceline.lm.attention import (
    NAME,
    Documents,
    attend_by_document,
    check_packing,
    packed_inputs,
    register,
)
from paceline.lm.data.packing import (
    Collate,
    PackedDataset,
    PaddedDataset,
    count_trained,
    plan_packs,
)
from paceline.lm.data.sample import IGNORED, Sample
from paceline.parallel.activation_checkpointing import checkpoint_blocks

transformers: Any = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LENGTHS = [5, 19, 13, 14, 3]


def by_document(name: str) -> Any:
    model = model_of(name)
    attend_by_document(model)
    return model


def documents() -> list[Sample]:
    generator = np.random.default_rng(5)
    ids = [generator.integers(3, 64, length).astype(np.int32) for length in LENGTHS]
    return [Sample(each, np.where(np.arange(len(each)) < 2, IGNORED, each)) for each in ids]


def packed() -> dict[str, Any]:
    """Two rows: documents of 5, 19 and 3 tokens, and of 13 and 14; each with 3 of padding."""
    rows = PackedDataset(documents(), plan_packs(LENGTHS, 27))
    batch = Collate(length=30)([rows[i] for i in range(len(rows))])
    assert batch["documents"] == [[5, 19, 3, 3], [13, 14, 3]]
    return batch


def padded() -> dict[str, Any]:
    rows = PaddedDataset(documents())
    return Collate(pad_to_multiple=4)([rows[i] for i in range(len(rows))])


def total_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over trained tokens, in float64."""
    flat = logits[:, :-1].flatten(0, 1).double()
    return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def alone(model: Any) -> list[torch.Tensor]:
    """The logits of each document by transformers' own attention; adds up the gradients."""
    found = []
    for each in documents():
        ids = torch.tensor(each.ids, dtype=torch.int64)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        total_loss(logits, torch.tensor(each.labels, dtype=torch.int64)[None]).backward()
        found.append(logits[0].detach())
    return found


def logits_of(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The logits of each document of a batch, but not of padding; adds up the gradients."""
    logits = model(**packed_inputs(batch)).logits
    total_loss(logits, batch["labels"]).backward()
    found = {}
    for row, labels, lengths in zip(logits, batch["labels"], batch["documents"], strict=True):
        for part, trained in zip(row.split(lengths), labels.split(lengths), strict=True):
            if (trained != IGNORED).any():
                found[len(part)] = part.detach()
    return [found[length] for length in LENGTHS]


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_near(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """To 1e-6 of the largest of all."""
    largest = max(each.abs().max() for each in others)
    for one, other in zip(ones, others, strict=True):
        assert (one - other).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_computed_as_each_alone(name: str) -> None:
    """Logits and gradients, of two packed rows and of padded ones."""
    reference = model_of(name)
    expected = alone(reference)
    for batch in (packed(), padded()):
        model = by_document(name)
        assert_near(logits_of(model, batch), expected)
        assert_near(gradients(model), gradients(reference))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_and_no_bit_crosses_from_one_document_to_another(name: str) -> None:
    model, batch = by_document(name), packed()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {**packed_inputs(batch), "input_ids": None, "inputs_embeds": embedded}
    logits = model(**inputs).logits
    (gradient,) = torch.autograd.grad(logits[0, 5:24].square().sum(), embedded)
    assert gradient[0, :5].count_nonzero() == gradient[0, 24:].count_nonzero() == 0
    assert gradient[1].count_nonzero() == 0
    assert gradient[0, 5:24].any(dim=-1).all()
    batch["input_ids"][0, :5] = 7
    again = model(**packed_inputs(batch)).logits
    assert torch.equal(again[0, 5:], logits[0, 5:])
    assert torch.equal(again[1], logits[1])
    assert not torch.equal(again[0, :5], logits[0, :5])


def test_a_long_document_is_attended_in_blocks_of_its_window() -> None:
    """Longer than a block of queries, and no multiple of it; the window's edge is exact."""
    config = transformers.MistralConfig(**FAMILIES["Mistral"] | {"num_hidden_layers": 1})
    model = transformers.MistralForCausalLM(config)
    length = 2 * attention._BLOCK + 77
    ids = torch.arange(length)[None] * 7 % 64
    expected = model(input_ids=ids, use_cache=False).logits
    attend_by_document(model)
    inputs = {"input_ids": ids, "position_ids": torch.arange(length)[None], "documents": [[length]]}
    with Largest() as seen:
        found = model(**packed_inputs(inputs)).logits
    assert_near([found], [expected])
    assert seen.elements < length * length


class Largest(Count):
    """Also notes the size of the largest result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_attention_drops_out_in_training_alone() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_dropout=0.5))
    attend_by_document(model)
    inputs = packed_inputs(packed())
    one, other = (model.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (model.eval()(**inputs).logits for _ in range(2))
    assert torch.equal(one, other)


def recomputing(model: Any, how: str) -> Any:
    if how == "transformers":
        model.activation_checkpointing_enable()
    elif how != "none":
        checkpoint_blocks(model, "model", how)
    return model


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_recomputing_in_the_backward_pass_changes_no_bit(name: str) -> None:
    """Even if another batch was computed in between, with other documents."""
    found = {}
    other = {**packed(), "documents": [[30], [1, 29]]}
    for how in ("none", "transformers", "full", "selective"):
        model = recomputing(by_document(name), how)
        logits = model(**packed_inputs(packed())).logits
        between = model(**packed_inputs(other)).logits
        total_loss(logits, packed()["labels"]).backward()
        total_loss(between, other["labels"]).backward()
        found[how] = gradients(model)
    assert len(found["none"]) > 10
    for how, grads in found.items():
        assert all(map(torch.equal, grads, found["none"])), how


def test_nothing_is_read_from_the_device() -> None:
    """Nor is anything with values needed: memory on paper has none."""
    model, batch = by_document("Gemma3"), packed()
    with Count() as operations:
        logits = model(**packed_inputs(batch)).logits
        loss = total_loss(logits, batch["labels"]) / count_trained(batch)
        loss.backward()
    assert "aten::_local_scalar_dense" not in operations.calls
    assert "aten::nonzero" not in operations.calls
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        there = {k: fake.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
        assert model(**packed_inputs(there)).logits.shape == (2, 30, 64)


class Attends(torch.nn.Module):
    """Hands keywords down to its attention, as the models do."""

    def forward(self, x: torch.Tensor, **handed_down: Any) -> torch.Tensor:
        attend = transformers.AttentionInterface._global_mapping[NAME]
        return attend(self, x + 1, x, x * 2, None, **handed_down)[0] * 3


def test_compiled_it_is_compiled_once_for_all_documents() -> None:
    from torch._dynamo.testing import CompileCounter

    register()
    counter, x = CompileCounter(), torch.arange(60.0).sin().view(2, 2, 15, 1)
    compiled = torch.compile(Attends(), backend=counter)
    counts = []
    for rows in ([[5, 10], [15]], [[5, 5, 5], [1, 1, 13]], [[3] * 5, [8, 7]]):
        found = compiled(x, documents=Documents(rows))
        assert torch.equal(found, Attends()(x, documents=Documents(rows)))
        counts.append(counter.frame_count)
    torch.compiler.reset()
    assert counts[0] == counts[-1]


# The check


@pytest.fixture
def across(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention across documents."""
    checked = attention._checked

    def whole(*args: Any) -> list[list[int]]:
        return [[sum(row)] for row in checked(*args)]

    monkeypatch.setattr(attention, "_checked", whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_finds_attention_across_documents(name: str, across: None) -> None:
    with pytest.raises(ConfigError) as caught:
        check_packing(by_document(name), capacity=64)
    assert f"{name}" in str(caught.value)
    assert "when it is packed with others (the largest logit is" in str(caught.value)
    assert "pack: false" in str(caught.value)


@pytest.mark.parametrize("name", ["Mistral", "Gemma3"])
def test_the_check_finds_a_window_that_is_off_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention._causal

    def wider(*args: Any) -> torch.Tensor:
        return right(*args[:-1], args[-1] and args[-1] + 1)

    monkeypatch.setattr(attention, "_causal", wider)
    with pytest.raises(ConfigError, match=r"a document of (9|13) tokens differ"):
        check_packing(by_document(name), capacity=64)


def test_the_check_leaves_everything_as_it_was() -> None:
    model = by_document("Gemma3")
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    weights = copy.deepcopy(model.state_dict())
    assert check_packing(model, capacity=64) < 1e-6
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert gradients(model) == []
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))
    assert model.config._attn_implementation == NAME


def tiny(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}TextConfig", None)
    config = config or getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config(**settings))


REFUSED = {
    "Gemma2": (LLAMA | {"head_dim": 8}, "Gemma2Attention asks for softcap"),
    "GptOss": (LLAMA | {"head_dim": 8, "num_local_experts": 2}, "GptOssAttention asks for s_aux"),
    "Llama4": (
        LLAMA
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
        | {"attention_chunk_size": WINDOW},  # in a mask alone
        "logits of a document of .* tokens differ",
    ),
    "Mamba": (
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, **SPECIAL},
        "logits of a document of .* tokens differ",
    ),
    "Bloom": (
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4, **SPECIAL},
        "BloomForCausalLM has an attention of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_packed_is_refused(name: str) -> None:
    settings, why = REFUSED[name]
    model = tiny(name, **settings)

    def check() -> None:
        attend_by_document(model)
        check_packing(model, capacity=64)

    with pytest.raises(ConfigError, match=f"{why}.*pack: false"):
        check()


def test_a_model_without_logits_cannot_be_compared() -> None:
    model = by_document("Llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ConfigError, match="only logits of 0"):
        check_packing(model, capacity=64)


def test_what_would_be_ignored_is_refused() -> None:
    model, inputs = by_document("Llama"), packed_inputs(packed())
    with pytest.raises(ConfigError, match=r"given none: call the model with packed_inputs"):
        model(input_ids=inputs["input_ids"], use_cache=False)
    with pytest.raises(ConfigError, match="asks for attention_mask"):
        model(**inputs, attention_mask=torch.zeros(2, 1, 30, 30))
    with pytest.raises(ConfigError, match="asks for output_attentions"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ConfigError, match="attention to later tokens"):
        model(**inputs, is_causal=False)
    part = {**inputs, "input_ids": inputs["input_ids"][:, :15], "position_ids": None}
    with pytest.raises(ConfigError, match=r"2 rows of 15 .* 30, 30 tokens.*parallel\.context"):
        model(**part)
    with pytest.raises(ConfigError, match=r"2 rows of 30 tokens.*of 1 row with 30"):
        model(**{**inputs, "documents": Documents([[30]])})
    with pytest.raises(ConfigError, match=r"call attend_by_document\(model\) first"):
        check_packing(model_of("Llama"), capacity=64)
    with pytest.raises(ConfigError, match="Linear is no model of transformers"):
        attend_by_document(torch.nn.Linear(1, 1))


def test_registered_twice_it_is_the_same_and_a_model_can_be_given_its_own_back() -> None:
    register()
    first = transformers.AttentionInterface()[NAME]
    register()
    assert transformers.AttentionInterface()[NAME] is first
    model = by_document("Llama")
    model.set_attn_implementation("sdpa")
    ids = packed()["input_ids"][:1, :5]
    assert model.eval().generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)
