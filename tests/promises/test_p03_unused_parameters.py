"""P3 The same mathematics at any layout: also where a rank's loss leaves out a part of the model.

The reference is a loop in plain torch over whole windows, in double precision. AdamW decays a
weight whose gradient is zero and leaves one without a gradient alone, so it tells them apart.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.errors import LossError, Preempted
from paceline.testing import Ranks, StopAt

ONE_FOR_EACH_RANK = [0, 0, 1, 1] * 3
BY_MICRO_BATCH = [0, 1, 0, 1, 1, 0, 1, 0] * 2
BY_STEP = [0, 0, 0, 0, 1, 1, 1, 1, 0]  # in the last window one rank has no sample
GOES_ON = [0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1]  # in the second window each rank uses both
LATE = [0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0]


class Routed(nn.Module):
    """Sends each row to the head of its kind, and calls only the heads that are needed."""

    def __init__(self, heads: int, extra: bool) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.body = nn.Linear(3, 4).double()
        self.heads = nn.ModuleList([nn.Linear(4, 1).double() for _ in range(heads)])
        self.extra = nn.Linear(4, 2).double() if extra else None

    def forward(self, x: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, Any]:
        h = torch.tanh(self.body(x))
        outputs = torch.zeros(len(x), 1, dtype=x.dtype)
        for kind in kinds.unique().tolist():
            outputs = outputs + self.heads[kind](h) * (kinds == kind)[:, None]
        return outputs, None if self.extra is None else self.extra(h)


class Fit(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, kinds = batch
        outputs, _ = self.model(x, kinds)
        return (outputs - y).square().mean()

    def on_train_end(self) -> None:
        self.ended = {k: p.detach().clone() for k, p in self.model.module.named_parameters()}


class SetAside(Fit):
    """Freezes a head that was trainable when the models were placed."""

    def on_train_start(self) -> None:
        self.model.module.heads[1].requires_grad_(False)


def rows(kinds: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(len(kinds), 3, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True), torch.tensor(kinds)


def by_hand(kinds: list[int], heads: int, extra: bool) -> dict[str, torch.Tensor]:
    """Windows of four rows on one process."""
    model = Routed(heads, extra)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for x, y, kind in zip(*(t.split(4) for t in rows(kinds)), strict=True):
        (model(x, kind)[0] - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: parameter.detach() for key, parameter in model.named_parameters()}


def fit(
    kinds: list[int],
    heads: int,
    extra: bool,
    batch: int = 2,
    kind: type[Fit] = Fit,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    model = Routed(heads, extra)
    trainer = kind(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5),
        train_dataloader=DataLoader(TensorDataset(*rows(kinds)), batch),
        gradient_accumulation_steps=2 // batch,
        epochs=1,
        progress=False,
        parallel=Parallel(**options),
        **(settings or {}),
    )
    try:
        trainer.fit()
    except LossError as error:
        return str(error)
    return getattr(trainer, "ended", None), [line.decision for line in trainer.plan]


def fit_all() -> list[Any]:
    return [
        fit(ONE_FOR_EACH_RANK, 3, True),
        fit(BY_MICRO_BATCH, 3, True, batch=1),
        fit(BY_STEP, 3, True),
        fit(ONE_FOR_EACH_RANK, 2, True, kind=SetAside),
        fit(LATE, 2, False, find_unused_parameters=True),
        fit(LATE, 2, False),
    ]


def test_what_a_rank_leaves_out_is_trained_by_the_others(ranks: Ranks) -> None:
    """Given heads that only some ranks, micro-batches or steps use, or none, and an output that no
    loss uses, when two ranks train, then all have the weights of one process; a rank that begins to
    leave something out later is refused before its step."""
    for one_each, by_micro_batch, by_step, frozen, late, refused in ranks(fit_all, 2):
        for (ended, plan), kinds in (
            (one_each, ONE_FOR_EACH_RANK),
            (by_micro_batch, BY_MICRO_BATCH),
            (by_step, BY_STEP),
        ):
            torch.testing.assert_close(ended, by_hand(kinds, 3, True))
            [line] = [line for line in plan if "which parameters have gradients" in line]
            assert "model.heads.2.weight" in line
        started = Routed(2, True).heads[1].weight
        torch.testing.assert_close(frozen[0]["heads.1.weight"], started)
        torch.testing.assert_close(late[0], by_hand(LATE, 2, False))
        assert "step 2: no loss of rank " in refused or "rank 1 failed" in refused


def fit_in_two_starts(folder: Path) -> Any:
    with suppress(Preempted):
        fit(GOES_ON, 2, False, settings={"run_dir": folder, "callbacks": [StopAt(1)]})
    return fit(GOES_ON, 2, False, settings={"run_dir": folder})


def test_a_resumed_run_knows_what_its_first_window_left_out(ranks: Ranks, tmp_path: Path) -> None:
    """Given a run that resumes where a window leaves nothing out, it exchanges for later ones."""
    for ended, plan in ranks(fit_in_two_starts, 2, tmp_path):
        torch.testing.assert_close(ended, by_hand(GOES_ON, 2, False))
        assert any("which parameters have gradients" in line for line in plan)
