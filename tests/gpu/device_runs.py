"""The run that the tests on an accelerator share: a small transformer on random sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer
from paceline.testing import bits

WIDTH, LENGTH, BATCH = 64, 16, 8
STATE = ("models", "optimizers", "schedulers", "scaler", "callbacks", "progress")


def device() -> torch.device:
    """The accelerator; in a rehearsal the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


class Block(nn.Module):
    """Attention and a perceptron; all sizes are multiples of 16, as float8 needs."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.between(x)))))


class Net(nn.Module):
    """[batch, LENGTH, WIDTH] -> [batch, LENGTH, 1]; the same weights at each call."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(dropout) for _ in range(2)])
            self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def examples(rows: int = 56) -> TensorDataset:
    """Sequences, a target for each element, and the number of each row."""
    x = torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.cumsum(1).mean(-1, keepdim=True), torch.arange(rows))


def batches(**options: Any) -> DataLoader:
    """7 batches of one size: nothing is compiled twice."""
    return DataLoader(examples(), BATCH, **{"shuffle": True, **options})


def fused_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose step can be masked on the device."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)


def digests(tree: Any) -> Any:
    """`bits` with digests in place of bytes, so that a difference is readable."""

    def short(part: Any) -> Any:
        if isinstance(part, bytes):
            return hashlib.sha256(part).hexdigest()[:16]
        if isinstance(part, dict):
            return {key: short(value) for key, value in part.items()}
        return [short(each) for each in part] if isinstance(part, (list, tuple)) else part

    return short(bits(tree))


class Fit(Trainer):
    """The mean squared error, which is NaN in the steps `bad`.

    Attributes:
        ids: the rows of each window's last micro-batch, by step.
        after: digests of the weights and the optimizer's state after each step of `kept`.
        ended: digests of the state at the end.
    """

    bad: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()

    def on_train_start(self) -> None:
        self.ids: dict[int, torch.Tensor] = {}
        self.after: dict[int, Any] = {}

    def loss(self, batch: Any) -> torch.Tensor:
        x, y, ids = batch
        self.ids[self.global_step] = ids
        loss = F.mse_loss(self.model(x), y)  # pyright: ignore[reportCallIssue,reportOptionalCall]
        return loss * torch.nan if self.global_step in self.bad else loss

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        if self.global_step in self.kept:
            self.after[self.global_step] = self.digests()

    def on_train_end(self) -> None:
        state = self.state_dict()
        self.ended = {name: digests(state[name]) for name in STATE}

    def digests(self) -> Any:
        """Digests of the current weights and optimizer state."""
        return digests([self.model.state_dict(), self.optimizer.state_dict()["state"]])


def trainer(
    kind: type[Fit] = Fit,
    model: nn.Module | None = None,
    bad: tuple[int, ...] = (),
    kept: tuple[int, ...] = (),
    **settings: Any,
) -> Fit:
    """A run of 14 steps, deterministic unless told otherwise; it is not started."""
    model = model or Net()
    made = kind(
        model=model,
        optimizer=fused_adamw(model.parameters()),
        **{
            "train_dataloader": batches(),
            "epochs": 2,
            "max_grad_norm": 1.0,
            "deterministic": True,
            "progress": False,
            "log_every": 4,
            **settings,
        },
    )
    made.bad, made.kept = bad, kept
    return made


def fitted(kind: type[Fit] = Fit, **settings: Any) -> Fit:
    """The same trainer, after its run."""
    made = trainer(kind, **settings)
    made.train(seed=3)
    return made


def apart(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """The distance between two models, relative to the distance of the first from its start."""
    a, b, was = (
        torch.cat([p.detach().float().cpu().flatten() for p in m.parameters()])
        for m in (one, other, start)
    )
    return float((a - b).norm() / (a - was).norm())
