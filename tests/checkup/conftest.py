"""A small classifier's recipe with code of its own, and mistakes that it can be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import code_forgotten
from paceline.recipe import Recipe, load_recipe

CODE = """
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from paceline import Trainer


class Points(Dataset):
    def __init__(
        self, n: int = 40, fails_at: int = -1, broken: bool = False, same: bool = False,
        highest: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long() * highest
        if broken:
            self.x[:, 2] = torch.inf
        if same:
            self.x[:] = self.x[0]
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        if self.fails_at >= 0:
            raise OSError("the disk of sample %d is gone" % i)
        return self.x[i], self.y[i]


class Stream(IterableDataset):
    def __iter__(self):
        points = Points()
        yield from (points[i] for i in range(len(points)))


class Net(nn.Module):
    def __init__(
        self, frozen: bool = False, unused: bool = False, dead: bool = False, scale: float = 1.0,
        wrong: bool = False, classes: int = 3, blind: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, classes)
        self.spare = nn.Linear(8, 8) if unused or dead else None
        self.dead, self.scale, self.wrong, self.blind = dead, scale, wrong, blind
        self.first.requires_grad_(not frozen)

    def forward(self, x):
        h = torch.tanh(self.first(0 * x if self.blind else x))
        if self.dead:
            h = h + 0 * self.spare(h)
        if self.wrong:
            print("on my way")
            h = h @ torch.ones(3, 3)
        return self.last(h) * self.scale


class Fit(Trainer):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        outputs = self.model(x)
        self.log("val/loss", self.loss_fn(outputs, y))
        self.log("val/accuracy", (outputs.argmax(1) == y).float().mean())


class Judged(Fit):
    def evaluate(self):
        return {"val/score": self.model(torch.ones(1, 6)).sum()}


class Pair(Trainer):
    def __init__(self, **settings):
        super().__init__(**settings)

    def configure(self):
        self.model = {"a": nn.Linear(6, 3), "b": nn.Linear(3, 3)}
        self.optimizer = {
            "one": torch.optim.SGD(self.model["a"].parameters(), lr=0.1),
            "two": torch.optim.SGD(self.model["b"].parameters(), lr=0.1),
        }

    def step(self, window):
        for (x, y), _ in window:
            a = self.model["a"](x)
            self.backward(self.loss_fn(a, y), only="one")
            self.backward(self.loss_fn(self.model["b"](a.detach()), y), only="two")
        self.optimizer_step("one")
        self.optimizer_step("two")

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss_fn(self.model["a"](batch[0]), batch[1]))


class Penalised(Fit):
    def loss(self, batch):
        x, y = batch
        x = x.requires_grad_()
        outputs = self.model(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return self.loss_fn(outputs, y) + (slope**2).mean()


class Quiet(Fit):
    def __init__(self, callbacks, **settings):
        super().__init__(**settings)


class Sequenced(Fit):
    def configure(self):
        linear = torch.optim.lr_scheduler.LinearLR
        self.lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer, [linear(self.optimizer), linear(self.optimizer)], [500]
        )


class Untrained(Fit):
    def configure(self):
        self.extra = nn.Linear(2, 2)


class Forgetful(Fit):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        with torch.no_grad():
            self.model.last.bias += 1


def undefined(outputs, targets):
    return outputs.mean() * float("nan")
"""

LOADER = {"_target_": "torch.utils.data.DataLoader", "batch_size": 8}
RECIPE: dict[str, Any] = {
    "code": "toy.py",
    "trainer": {"_target_": "toy.Fit", "epochs": 20},
    "model": {"_target_": "toy.Net"},
    "loss_fn": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
    "lr_scheduler": {"type": "warmup_cosine", "warmup": 10},
    "train_dataloader": {**LOADER, "shuffle": True, "dataset": {"_target_": "toy.Points"}},
    "val_dataloader": {**LOADER, "dataset": {"_target_": "toy.Points", "n": 100}},
}

Write = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _forget_code():
    """Code that recipes load neither stays imported nor on the path."""
    with code_forgotten():
        yield


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the recipe into the working folder; overrides are for what a test is about."""
    monkeypatch.chdir(tmp_path)

    def write(**keys: Any) -> Path:
        (tmp_path / "toy.py").write_text(CODE)
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(RECIPE | keys, sort_keys=False))
        return path

    return write


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Write:
    """The recipe, loaded with overrides and with top-level keys replaced."""
    return lambda *overrides, **keys: load_recipe(write(**keys), overrides)
