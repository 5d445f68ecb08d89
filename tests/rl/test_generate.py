"""Completions: as transformers generates them, alone as in a batch, from ids to ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from language_models import bpe_tokenizer, model_of
from paceline.errors import ConfigError
from paceline.registry import lookup
from paceline.rl.engine import Completion, Request, Sampling
from paceline.rl.text import generate as generate_module
from paceline.rl.text.generate import cut_to_context
from paceline.rl.text.local import LocalEngine
from paceline.rl.text.logprobs import completion_logps, mismatch

NEW, NO_END = 12, [64]  # which no model says
GREEDY, DRAWN = Sampling(NEW, 0.0), Sampling(NEW, 0.7, top_k=30, top_p=0.9)
# Of different lengths, longer than the sliding windows; 2 of them equal, one with BOS (1), the end
# token (2) and the pad token (0) inside.
PROMPTS = [
    np.random.default_rng(i).integers(3, 64, length).astype(np.int32)
    for i, length in enumerate((3, 12, 7, 15))
]
PROMPTS += [PROMPTS[2], np.array([1, 9, 2, 1, 0, 7, 2, 0, 5], np.int32)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("Llama").eval()


@pytest.fixture
def shapes(llama: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the token ids that the model reads, call by call."""
    seen: list[tuple[int, ...]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = llama.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def wanted(sampling: Sampling) -> list[Request]:
    return [Request(prompt, 100 + i, sampling) for i, prompt in enumerate(PROMPTS)]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


def as_transformers(model: Any) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor(prompt[None].astype(np.int64))
        how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "GPT2", "Gemma3"])
def test_a_batch_is_as_transformers_generates_and_as_each_alone(family: str) -> None:
    model = model_of(family).eval()
    engine = LocalEngine(model)
    assert ids_of(engine.generate(wanted(GREEDY))) == as_transformers(model)
    together = engine.generate(wanted(DRAWN))
    alone = [engine.generate([one])[0] for one in wanted(DRAWN)]
    assert ids_of(together) == ids_of(alone)
    assert len({tuple(ids) for ids in ids_of(together)}) == len(PROMPTS), "each has its own noise"
    scored = completion_logps(model, PROMPTS, ids_of(together), temperature=0.7)
    for i, one in enumerate(together):
        recorded = torch.tensor(one.logprobs)
        torch.testing.assert_close(scored.logps[i][scored.mask[i]], recorded, atol=1e-5, rtol=0)


def right_padded(texts: Any, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = (part.flip(1) for part in generate_module_padded(texts, pad_id))
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
    return ids, mask


def masked_by_pad_id(texts: Any, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, _ = generate_module_padded(texts, pad_id)
    return ids, (ids != pad_id).long()


def with_bos(texts: Any, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    return generate_module_padded([(1, *text) for text in texts], pad_id)


generate_module_padded = generate_module._left_padded  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("broken", [right_padded, masked_by_pad_id, with_bos])
def test_that_notices_a_broken_batch(
    llama: Any, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = as_transformers(llama)
    assert ids_of(LocalEngine(llama).generate(wanted(GREEDY))) == right
    monkeypatch.setattr(generate_module, "_left_padded", broken)
    assert ids_of(LocalEngine(llama).generate(wanted(GREEDY))) != right


def test_the_pad_token_may_be_the_end_token_and_a_common_one(llama: Any) -> None:
    right = ids_of(LocalEngine(llama, end_ids=NO_END).generate(wanted(GREEDY)))
    common = right[0][1]
    assert any(common in ids for ids in right)
    assert (
        ids_of(LocalEngine(llama, end_ids=NO_END, pad_id=common).generate(wanted(GREEDY))) == right
    )
    ending = LocalEngine(llama, end_ids=[common], pad_id=common).generate(wanted(GREEDY))
    for ids, one in zip(right, ending, strict=True):
        length = ids.index(common) + 1 if common in ids else NEW
        assert one.ids.tolist() == ids[:length]
        assert one.ended == ("end" if common in ids[:length] else "length")


def test_every_end_token_of_the_generation_config_ends_a_completion(llama: Any) -> None:
    model = model_of("Llama").eval()
    right = as_transformers(llama)
    first, second = right[0][2], right[1][3]
    model.generation_config.eos_token_id = [first, second]
    got = LocalEngine(model).generate(wanted(GREEDY))
    for ids, one in zip(right, got, strict=True):
        ends = [i for i, token in enumerate(ids) if token in (first, second)]
        assert one.ids.tolist() == ids[: ends[0] + 1 if ends else NEW]
    assert {got[0].ended, got[1].ended} == {"end"}


def test_the_same_request_gives_the_same_bytes_and_draws_nothing_else(llama: Any) -> None:
    llama.train()
    before = torch.get_rng_state()
    engine = LocalEngine(llama)
    engine.version = 5
    one, other = (engine.generate(wanted(DRAWN)) for _ in range(2))
    assert llama.training
    llama.eval()
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one, other, strict=True):
        assert (a.ids.tobytes(), a.logprobs.tobytes()) == (b.ids.tobytes(), b.logprobs.tobytes())
        assert a.version == 5


def test_a_shared_prompt_is_read_once(llama: Any, shapes: list[Any]) -> None:
    requests = [Request(PROMPTS[1], seed, Sampling(3)) for seed in range(5)]
    LocalEngine(llama, end_ids=NO_END).generate(requests)
    assert shapes == [(1, 12), (5, 1), (5, 1)]


def test_what_has_ended_leaves_the_batch(llama: Any, shapes: list[Any]) -> None:
    engine = LocalEngine(llama, end_ids=range(32), batch=4)
    lengths = [len(one.ids) for one in engine.generate(wanted(DRAWN))]
    assert len(set(lengths)) > 1
    # A completion of n tokens has the prompt read, and then n - 1 tokens.
    assert sum(rows for rows, length in shapes if length == 1) == sum(lengths) - len(lengths)
    prompts = [shape for shape in shapes if shape[1] > 1]
    assert prompts == [(3, 9), (2, 15)], "batches of similar length, two of which share a prompt"


class Fixed(torch.nn.Module):
    """A model that has the same logits everywhere, and says nothing of itself."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        past_key_values: Any = None,
    ) -> Any:
        self.past_key_values = self
        self.read = input_ids
        self.out = _Out(self.logits.expand(*input_ids.shape, -1), self)
        return self.out

    def batch_select_indices(self, index: torch.Tensor) -> None:
        pass


class _Out:
    def __init__(self, logits: torch.Tensor, cache: Any) -> None:
        self.logits, self.past_key_values = logits, cache


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(1, temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampling(1, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(1, top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1, temperature=0.0), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_is_asked_for(
    sampling: Sampling, expected: list[float]
) -> None:
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    engine = LocalEngine(Fixed(probs.log().tolist()), batch=4000)
    made = engine.generate([Request(np.array([0]), seed, sampling) for seed in range(4000)])
    found = np.bincount([one.ids[0] for one in made], minlength=4) / 4000
    np.testing.assert_allclose(found, expected, atol=0.03)  # 4 standard deviations
    assert (found[np.array(expected) == 0] == 0).all()
    # At the sampling temperature, and of all tokens: what the trainer computes.
    powers = probs ** (1 / (sampling.temperature or 1.0))
    logps = (powers / powers.sum()).log()
    for one in made[:50]:
        np.testing.assert_allclose(one.logprobs, logps[one.ids.astype(np.int64)], rtol=1e-6)


def test_a_stop_text_ends_a_completion_and_stays(llama: Any) -> None:
    tokenizer = bpe_tokenizer()
    prompt = np.array([40, 50, 60], np.int32)
    torch.manual_seed(3)
    model = Fixed(torch.randn(len(tokenizer)).tolist())
    whole = LocalEngine(model).generate([Request(prompt, 3, Sampling(30))])[0]
    texts = [tokenizer.decode(whole.ids[:n].tolist()) for n in range(31)]
    stop = texts[9][-3:]  # may span tokens
    end = next(n for n, text in enumerate(texts) if stop in text)
    engine = LocalEngine(model, tokenizer)
    got = engine.generate([Request(prompt, 3, Sampling(30, stop=("never said", stop)))])[0]
    assert (got.ids.tolist(), got.ended) == (whole.ids[:end].tolist(), "stop")
    assert whole.ended == "length"


def test_sampled_ids_are_not_tokenised_again() -> None:
    tokenizer = bpe_tokenizer()
    torch.manual_seed(3)
    engine = LocalEngine(Fixed(torch.randn(len(tokenizer)).tolist()), tokenizer)
    made = engine.generate([Request(np.array([40]), 3, Sampling(40, stop=("never said",)))])[0]
    assert tokenizer(tokenizer.decode(made.ids.tolist()))["input_ids"] != made.ids.tolist()
    by_hand = engine.model.logits.log_softmax(-1)[torch.tensor(made.ids.astype(np.int64))]
    np.testing.assert_allclose(made.logprobs, by_hand.detach(), atol=1e-6)


def test_log_probabilities_of_completions_are_those_of_each_alone(llama: Any) -> None:
    completions = [[5, 0, 2], [9], [], [0, 0, 1, 2, 2], [7, 8], [4, 4]]
    for name, model in (("Llama", llama), ("GPT2", model_of("GPT2").eval())):
        scored = completion_logps(model, PROMPTS, completions, temperature=0.5, entropy=True)
        assert scored.mask.tolist() == [[t < len(c) for t in range(5)] for c in completions], name
        assert scored.entropy is not None
        (scored.logps.sum() + scored.entropy.sum()).backward()
        gradient = model.get_input_embeddings().weight.grad.clone()
        model.zero_grad()
        for i, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
            ids = torch.tensor([[*prompt.tolist(), *completion]])
            logps = (model(ids).logits[0] / 0.5).log_softmax(-1)[len(prompt) - 1 : -1]
            chosen = logps[torch.arange(len(completion)), torch.tensor(completion).long()]
            entropy = -(logps.exp() * logps).sum(-1)
            (chosen.sum() + entropy.sum()).backward()
            for got, right in ((scored.logps, chosen), (scored.entropy, entropy)):
                torch.testing.assert_close(got[i, : len(completion)], right, atol=2e-5, rtol=1e-5)
                assert not got[i, len(completion) :].any()
        by_hand = model.get_input_embeddings().weight.grad
        torch.testing.assert_close(gradient, by_hand, atol=1e-3, rtol=1e-4)
        model.zero_grad()
    nothing = completion_logps(llama, PROMPTS[:2], [[], []])
    assert nothing.logps.shape == nothing.mask.shape == (2, 0)


def test_the_mismatch_is_over_tokens_alone() -> None:
    trainer = torch.tensor([[-1.0, -2.0, 9.0]])
    sampler = torch.tensor([[-1.5, -1.0, torch.nan]])
    mask = torch.tensor([[1, 1, 0]])
    row = mismatch(trainer, sampler, mask)
    assert row["rollout/logprob_difference/mean"] == pytest.approx(0.75)
    assert row["rollout/logprob_difference/max"] == pytest.approx(1.0)
    kl = (np.exp(0.5) - 1 - 0.5 + np.exp(-1.0) - 1 + 1.0) / 2
    assert row["rollout/logprob_kl"] == pytest.approx(kl)
    assert mismatch(trainer, sampler, mask * 0) == {}


def test_what_cannot_be_completed_is_refused(llama: Any) -> None:
    engine = LocalEngine(llama)
    for ids, sampling, message in (
        ([], Sampling(), "no tokens: begin it with the tokenizer's BOS"),
        (
            [3] * 2000,
            Sampling(64),
            "of 2000 tokens and max_new_tokens=64 exceed the model",
        ),
        ([3], Sampling(2, stop=("a",)), "stop texts need a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.generate([Request(np.array(ids, np.int32), 0, sampling)])
    kept = cut_to_context(np.arange(2100), llama, 48)
    assert (len(kept), kept[-1]) == (llama.config.max_position_embeddings - 48, 2099)
    assert cut_to_context([1, 2], llama, 48) == [1, 2]
    with pytest.raises(ConfigError, match="no room for a prompt"):
        cut_to_context([1, 2], llama, 4096)
    with pytest.raises(ConfigError, match="logits after 1 tokens are not finite"):
        LocalEngine(Fixed([0.0, torch.nan])).generate([Request(np.array([0]), 0)])
    with pytest.raises(ConfigError, match=r"engine\.batch=0"):
        LocalEngine(llama, batch=0)
    with pytest.raises(ConfigError, match="a prompt has no tokens"):
        completion_logps(llama, [[]], [[1]])
    with pytest.raises(ConfigError, match="2 prompts and 1 completions"):
        completion_logps(llama, [[1], [1]], [[1]])
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"stop": "text"},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Sampling(**setting)


@pytest.mark.parametrize("name", ["vllm", "sglang", "ray", "http"])
def test_an_engine_that_does_not_exist_yet_says_so(name: str) -> None:
    assert lookup("engine", "local") is LocalEngine
    with pytest.raises(ConfigError, match="does not exist yet"):
        lookup("engine", name)
