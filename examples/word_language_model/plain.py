"""An LSTM predicts the next word of Python's manual; its hidden state is carried from chunk to
chunk.

The text is cut into parallel columns that are read from left to right, and gradients end at a
chunk's edge (truncated backpropagation through time). So the order of the chunks is fixed, and
nothing but the initial weights is random: `torch.manual_seed(0)` before the model is made is all
that the two loops need to agree.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

Hidden = tuple[Tensor, Tensor]
LEARNING_RATE = 5.0
MAX_NORM = 0.25


@cache
def manual(words: int, vocabulary: int) -> Tensor:
    """The first words of the manual as numbers [words]; rare words share the number 0."""
    text = " ".join(topics[name] for name in sorted(topics))
    found = re.findall(r"\w+|[^\w\s]", text.lower())[:words]
    common = [word for word, _ in Counter(found).most_common(vocabulary - 1)]
    number = {word: i for i, word in enumerate(common, start=1)}
    return torch.tensor([number.get(word, 0) for word in found])


class Chunks(Dataset[tuple[Tensor, Tensor]]):
    """Batches of consecutive words: inputs and targets [columns, length], the last one shorter."""

    def __init__(self, words: Tensor, columns: int, length: int) -> None:
        self.columns = words[: len(words) // columns * columns].view(columns, -1)
        self.length = length

    def __len__(self) -> int:
        return -(-(self.columns.shape[1] - 1) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        piece = self.columns[:, index * self.length :][:, : self.length + 1]
        return piece[:, :-1], piece[:, 1:]


class WordModel(nn.Module):
    """An embedding, an LSTM, and a linear layer over the vocabulary."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, words: Tensor, hidden: Hidden | None) -> tuple[Tensor, Hidden]:
        states, after = self.lstm(self.embedding(words), hidden)
        return self.head(states), after


def make(words: int, vocabulary: int, width: int) -> tuple[WordModel, Chunks, Chunks]:
    """The model, and the chunks for training and validation."""
    text = manual(words, vocabulary)
    border = len(text) * 9 // 10
    torch.manual_seed(0)
    model = WordModel(vocabulary, width)
    return model, Chunks(text[:border], 20, 35), Chunks(text[border:], 5, 35)


def train(
    epochs: int = 2, words: int = 40_000, vocabulary: int = 2_000, width: int = 64
) -> WordModel:
    """Trains, prints a line of what came of it, and returns the model."""
    model, train_chunks, val_chunks = make(words, vocabulary, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loss_per_word = float("nan")
    for _ in range(epochs):
        model.train()
        hidden: Hidden | None = None
        for x, y in train_chunks:
            if hidden is not None:
                hidden = (hidden[0].detach(), hidden[1].detach())
            optimizer.zero_grad()
            logits, hidden = model(x, hidden)
            loss = cross_entropy(logits.flatten(0, 1), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()

        model.eval()
        total, count, hidden = 0.0, 0, None
        with torch.no_grad():
            for x, y in val_chunks:
                logits, hidden = model(x, hidden)
                total += cross_entropy(logits.flatten(0, 1), y.flatten()).item() * y.numel()
                count += y.numel()
        loss_per_word = total / count
    print(f"validation loss {loss_per_word:.4f} a word")
    return model


if __name__ == "__main__":
    train()
