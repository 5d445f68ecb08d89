"""A small GPT that learns to write like Python's own manual, one character at a time.

The text is the language reference that ships with Python for `help()`. The model is GPT-2's
(Radford et al., 2019): blocks of causal self-attention and a feed-forward network, each after a
layer norm and added to the stream; token and position embeddings; no biases.
"""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from paceline import Trainer
from paceline.parallel import attention, positions


@cache
def manual() -> tuple[str, Tensor]:
    """The alphabet, and the whole text as indices into it."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    return alphabet, torch.tensor([index[character] for character in text])


class Manual(Dataset):
    """Blocks of the text: each position's target is the character that follows it.

    Args:
        split: "train" (the first nine tenths) or "val".
        block: characters in a sample.
        stride: characters from one sample's beginning to the next one's.
    """

    def __init__(self, split: str, block: int, stride: int) -> None:
        _, text = manual()
        border = len(text) * 9 // 10
        self.text = text[:border] if split == "train" else text[border:]
        self.block, self.stride = block, stride

    def __len__(self) -> int:
        return (len(self.text) - self.block - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.stride
        piece = self.text[start : start + self.block + 1]
        return piece[:-1], piece[1:]


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Heads come first in the features, so that ranks may have some of the heads each.
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.size)).permute(3, 0, 2, 1, 4)
        y = attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward network; both add to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(width, bias=False), Attention(width, heads), nn.Dropout(dropout)
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, bias=False),
            nn.Linear(width, 4 * width, bias=False), nn.GELU(),
            nn.Linear(4 * width, width, bias=False), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Embedding(nn.Module):
    """Characters and their positions as vectors."""

    def __init__(self, width: int, block: int) -> None:
        super().__init__()
        self.token = nn.Embedding(len(manual()[0]), width)
        self.position = nn.Embedding(block, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(positions(tokens.shape[1], tokens.device))


class GPT(nn.Module):
    """The language model; the embedding of a character is also its output weight.

    Args:
        layers, width, heads: the number of blocks, the stream's width, the heads in a block.
        block: the longest context, in characters.
        dropout: share of each block's output that is dropped in training.

    Attributes:
        tp_plan: how it splits over ranks with `parallel.tensor`.
        pipeline_order: what computes it in turn, for the stages of `parallel.pipeline`.
    """

    tp_plan = {
        "blocks.*.attention.1.qkv": "colwise", "blocks.*.attention.1.out": "rowwise",
        "blocks.*.feed_forward.1": "colwise", "blocks.*.feed_forward.3": "rowwise",
    }  # fmt: skip
    pipeline_order = ("embedding", "blocks", "norm", "head")

    def __init__(
        self, layers: int = 4, width: int = 128, heads: int = 4, block: int = 128,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block = block
        self.embedding = Embedding(width, block)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, len(manual()[0]), bias=False)
        self.head.weight = self.embedding.token.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What adds to the stream starts smaller the more blocks there are.
                adds = name.endswith(("out.weight", "feed_forward.3.weight"))
                nn.init.normal_(weight, std=0.02 / ((2 * layers) ** 0.5 if adds else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, length] -> logits [batch, length, alphabet]."""
        return self.head(self.norm(self.blocks(self.embedding(tokens))))

    @torch.no_grad()
    def write(
        self, start: str, length: int, generator: torch.Generator, device: torch.device
    ) -> str:
        """Goes on from `start` for `length` characters, drawn from the model's distribution."""
        alphabet, _ = manual()
        tokens = torch.tensor([[alphabet.index(character) for character in start]], device=device)
        for _ in range(length):
            logits = self(tokens[:, -self.block :])[0, -1].float().cpu()
            drawn = torch.multinomial((logits / 0.8).softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, drawn[None].to(device)], dim=1)
        return "".join(alphabet[i] for i in tokens[0].tolist())


class NextCharacter(nn.CrossEntropyLoss):
    """Cross-entropy of logits [batch, length, alphabet] and characters [batch, length]."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.flatten(0, 1), targets.flatten())


class GPTTrainer(Trainer):
    """Prints a sample of the model's writing at the end.

    Args:
        characters: how long a sample.
        settings: those of every Trainer.
    """

    def __init__(self, *, characters: int = 600, **settings: Any) -> None:
        super().__init__(**settings)
        self.characters = characters

    def on_train_end(self) -> None:
        # On every rank: each may hold a part of the model alone.
        model = self.get_module("model").eval()
        generator = torch.Generator().manual_seed(0)
        text = model.write("\nThe ", self.characters, generator, self.device)
        if self.world.is_main:
            print(text)
