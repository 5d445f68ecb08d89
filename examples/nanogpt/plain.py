"""The loop that small GPTs are trained with: batches at random places of a text, gradients
accumulated and clipped, warm-up and a cosine, weight decay for matrices alone, an evaluation every
few steps.

Random numbers: the places come from a generator of the loop's own. There is no dropout, as when one
pretrains. Rounding: each micro-batch's loss is divided by the number of micro-batches; Paceline
multiplies by its share of the samples, which is the same to the last bit if that number is a power
of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

BLOCK, BATCH, ACCUMULATION = 64, 8, 4
PEAK_RATE, MAX_NORM = 3e-3, 1.0


@cache
def manual() -> tuple[Tensor, Tensor, int]:
    """The numbers of the manual's characters, for training and validation; the alphabet's size."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([alphabet[character] for character in text])
    border = len(numbers) * 9 // 10
    return numbers[:border], numbers[border:], len(alphabet)


class Block(nn.Module):
    """Causal self-attention, then a feed-forward network; both add to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Characters [n, time] to logits [n, time, alphabet]; the head is the embedding, transposed."""

    def __init__(self, alphabet: int, width: int, layers: int, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(alphabet, width), nn.Embedding(BLOCK, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, but no biases and norms."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.99),
    )


def share_of_peak(step: int, warm_up: int, steps: int) -> float:
    """The learning rate at a step, as a share of the peak: a line up, then a cosine down to 0.1."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    progress = (step - warm_up) / (steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy over all characters."""
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def make(width: int, layers: int) -> tuple[GPT, Tensor, Tensor]:
    """The model, and the texts for training and validation."""
    train_text, val_text, alphabet = manual()
    torch.manual_seed(0)
    return GPT(alphabet, width, layers), train_text, val_text


def batches(text: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pieces from random places, without an end."""
    while True:
        places = torch.randint(len(text) - BLOCK, (BATCH,), generator=generator).tolist()
        x = torch.stack([text[place : place + BLOCK] for place in places])
        y = torch.stack([text[place + 1 : place + 1 + BLOCK] for place in places])
        yield x, y


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, count: int) -> float:
    """The mean loss over some batches, the same at each call."""
    model.eval()
    places = batches(text, torch.Generator().manual_seed(2))
    losses = [token_loss(model, *next(places)).item() for _ in range(count)]
    model.train()
    return sum(losses) / count


def train(
    steps: int = 80,
    every: int = 40,
    warm_up: int = 20,
    val_batches: int = 8,
    width: int = 64,
    layers: int = 2,
) -> GPT:
    """Trains, prints a line of what came of it, and returns the model."""
    model, train_text, val_text = make(width, layers)
    optimizer = make_optimizer(model)
    val_loss = float("nan")
    training = batches(train_text, torch.Generator().manual_seed(1))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * share_of_peak(step, warm_up, steps)
        for _ in range(ACCUMULATION):
            x, y = next(training)
            loss = token_loss(model, x, y) / ACCUMULATION
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0:
            val_loss = evaluate(model, val_text, val_batches)
    print(f"validation loss {val_loss:.4f} a character")
    return model


if __name__ == "__main__":
    train()
