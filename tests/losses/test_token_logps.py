"""Log-probabilities and entropies of tokens, in chunks or not, equal a softmax written out."""

from __future__ import annotations

import math

import pytest
import torch

from paceline.losses import token_entropy, token_logps, tokens

IDS = torch.tensor([[1, 4, -100, 0], [2, -100, 3, 3]])
MASK = IDS >= 0


def drawn_logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=[1, 2**24], ids=["chunks", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one position of all rows, or all at once."""
    monkeypatch.setattr(tokens, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_equal_a_softmax_written_out(temperature: float) -> None:
    logits = drawn_logits()
    logps = token_logps(logits, IDS, MASK, temperature=temperature)
    entropies = token_entropy(logits, MASK, temperature=temperature)
    for i in range(2):
        for t in range(4):
            weights = [math.exp(x / temperature) for x in logits[i, t].tolist()]
            p = [w / sum(weights) for w in weights]
            logp = math.log(p[int(IDS[i, t])]) if MASK[i, t] else 0
            entropy = -sum(x * math.log(x) for x in p) if MASK[i, t] else 0
            assert logps[i, t].item() == pytest.approx(logp, abs=1e-12)
            assert entropies[i, t].item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.usefixtures("chunk")
def test_they_have_the_gradient_of_their_values() -> None:
    logits = drawn_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logps(x, IDS, MASK, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, MASK, temperature=0.7), logits)


@pytest.mark.usefixtures("chunk")
def test_logits_outside_the_mask_may_be_anything() -> None:
    """And a word that is excluded, at minus infinity, is no obstacle."""
    logits = drawn_logits()
    logits[..., 3:] = logits[..., 3:].masked_fill(IDS[..., None] != 3, -math.inf)
    logits[0, 1] = 0.0
    found = []
    for given in (logits, logits.masked_fill(~MASK[..., None], math.nan)):
        given = given.clone().requires_grad_()
        values = token_logps(given, IDS, MASK), token_entropy(given, MASK)
        gradients = [torch.autograd.grad(v.square().sum(), given)[0] for v in values]
        assert all(v.isfinite().all() for v in (*values, *gradients))
        assert not any(g[~MASK].any() for g in gradients)
        found.append([*values, *gradients])
    assert all(map(torch.equal, *found))


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half precision either, whose gradients are half precision, too."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for chunk in (2**24, 20, 1):
            monkeypatch.setattr(tokens, "CHUNK", chunk)
            logits = drawn_logits(dtype).requires_grad_()
            logps, entropies = token_logps(logits, IDS, MASK), token_entropy(logits, MASK)
            (logps.sum() + entropies.square().sum()).backward()
            assert logps.dtype == entropies.dtype == torch.float32
            found.append((logps, entropies, logits.grad))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        expected = token_logps(drawn_logits(dtype).float(), IDS, MASK)
        assert torch.equal(found[0][0], expected)


def test_no_copy_of_the_logits_is_kept_for_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of logits in half precision, shifted as a causal model's are."""
    monkeypatch.setattr(tokens, "CHUNK", 20)
    logits = drawn_logits(torch.bfloat16).requires_grad_()
    own = logits.untyped_storage().data_ptr()
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() != own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logps(logits[:, :-1], IDS[:, 1:], MASK[:, 1:])
        token_entropy(logits[:, :-1], MASK[:, 1:])
    assert sum(kept) < logits.numel() / 2
