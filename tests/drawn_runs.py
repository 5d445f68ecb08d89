"""Runs of a small language model, with settings drawn at random (`layouts.py`)."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Parallel, Trainer
from paceline.callbacks import SWA, AveragedWeights, GradientMonitor
from paceline.parallel import attention, positions
from paceline.world.dtensors import whole

WORDS, LENGTH, WIDTH = 17, 8, 8
NONE = -1  # a target that does not count


@dataclass(frozen=True)
class Settings:
    """What a run is drawn to be.

    Attributes:
        rows: samples of an epoch.
        batch: samples of a batch, on each process that has samples of its own.
        accumulation: batches of a window.
        layers: blocks of the model.
        tied: whether the embedding is the head too.
        frozen: the part that is not trained, or none.
        optimizer: "sgd", or AdamW in one of its two ways.
        decays: whether weights and biases are groups of their own.
        clip: the largest norm of a gradient.
        halving: whether the learning rate halves every other step.
        average: of the weights, by which it is validated; or none.
        monitor: whether gradients are watched.
        validate_every: "epoch", or steps.
        ragged: whether targets count in some places only, in a few rows nowhere.
        recompute: as `parallel.activation_checkpointing`.
        seed: of the model's weights.
    """

    rows: int
    batch: int
    accumulation: int
    layers: int
    tied: bool
    frozen: str
    optimizer: str
    decays: bool
    clip: float | None
    halving: bool
    average: str
    monitor: bool
    validate_every: Any
    ragged: bool
    recompute: Any
    seed: int

    @staticmethod
    def drawn(draw: random.Random) -> Settings:
        yes_or_no = (True, False)
        return Settings(
            rows=draw.choice((1, 5, 13, 24, 29)),
            batch=draw.choice((1, 2, 3)),
            accumulation=draw.choice((1, 2, 3)),
            layers=draw.choice((2, 3)),
            tied=draw.choice(yes_or_no),
            frozen=draw.choice(("", "", "embedding", "first block", "last layers")),
            optimizer=draw.choice(("sgd", "foreach", "for-loop")),
            decays=draw.choice(yes_or_no),
            clip=draw.choice((None, 0.3, 5.0)),
            halving=draw.choice(yes_or_no),
            average=draw.choice(("", "exponential", "equal")),
            monitor=draw.choice(yes_or_no),
            validate_every=draw.choice(("epoch", 2)),
            ragged=draw.choice(yes_or_no),
            recompute=draw.choice((None, "full", "selective")),
            seed=draw.randrange(100),
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        parts = (part(y) for part in (self.query, self.key, self.value))
        query, key, value = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in parts)
        seen = attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.word(words) + self.place(positions(words.shape[1], words.device))


class Writer(nn.Module):
    pipeline_order = ("embedding", "blocks", "norm", "head")
    tp_plan = {
        **{f"blocks.*.{name}": "colwise" for name in ("query", "key", "value", "up")},
        **{f"blocks.*.{name}": "rowwise" for name in ("out", "down")},
    }

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.ModuleList(Block() for _ in range(settings.layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if settings.tied:
            self.head.weight = self.embedding.word.weight
        frozen = {
            "": [],
            "embedding": [self.embedding],
            "first block": [self.blocks[0]],
            "last layers": [self.blocks[-1], self.norm],
        }
        for part in frozen[settings.frozen]:
            part.requires_grad_(False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Targets(Trainer):
    """Its items are the targets that count."""

    def count_items(self, batch: Any) -> Any:
        return (batch[1] != NONE).sum()


class Keep(Callback):
    """What is to be the same: rows and validations by their step, and weights in the end."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}
        self.validations: dict[int, Any] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.rows[trainer.global_step] = {key: float(value) for key, value in metrics.items()}

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.validations[trainer.global_step] = dict(metrics)

    def on_train_end(self, trainer: Any) -> None:
        [model] = trainer.named_models().values()
        named = model.named_parameters()
        self.weights = {key: whole(p.detach()).clone() for key, p in named if not p.is_meta}


def data(rows: int, seed: int, *, ragged: bool) -> TensorDataset:
    """(words, the next ones), the last of which is the first."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    targets = words.roll(-1, 1)
    if ragged:
        counted = torch.randint(LENGTH + 1, (rows, 1), generator=generator)
        counted[0] = LENGTH  # for a run of one row to have some
        targets = targets.where(torch.arange(LENGTH) < counted, NONE)
    return TensorDataset(words, targets)


def error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=NONE)


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[Any] = [{"params": trained}]
    if settings.decays:
        flat = [p for p in trained if p.dim() < 2]
        matrices = [p for p in trained if p.dim() > 1]
        groups = [{"params": matrices}, {"params": flat, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    foreach = settings.optimizer == "foreach"
    # Where a gradient is nearly zero, its rounding error decides no step.
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-4, foreach=foreach)


def fit(
    settings: Settings,
    batch: int,
    parallel: Parallel | None = None,
    folder: Path | None = None,
    max_steps: int | None = None,
) -> Keep:
    """Runs two epochs on this process, or goes on with what is in the folder.

    Args:
        settings: of the run.
        batch: samples of a batch.
        parallel: the layout.
        folder: where checkpoints go; None for no checkpoints.
        max_steps: where the run is cut.
    """
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)  # a process's own, or the caller's to put back
    torch.manual_seed(settings.seed)
    model, keep = Writer(settings), Keep()
    optimizer = optimizer_of(model, settings)
    averages = {"": [], "exponential": [AveragedWeights(0.9)], "equal": [SWA(start=2)]}
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if settings.halving else None
    (Targets if settings.ragged else Trainer)(
        model=model,
        optimizer=optimizer,
        lr_scheduler=halving,
        loss_fn=error,
        train_dataloader=DataLoader(data(settings.rows, 5, ragged=settings.ragged), batch, True),
        val_dataloader=DataLoader(data(7, 9, ragged=settings.ragged), 3),
        epochs=2,
        max_steps=max_steps,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.clip,
        validate_every=settings.validate_every,
        checkpoint=None if folder is None else CheckpointPolicy(),
        parallel=parallel,
        callbacks=[keep, *averages[settings.average], *[GradientMonitor()] * settings.monitor],
        progress=False,
        log_every=1,
        run_dir=folder,
    ).train(seed=4)
    return keep
