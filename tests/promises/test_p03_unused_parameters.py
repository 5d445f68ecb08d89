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
from paceline.parallel.ddp import replicate
from paceline.testing import Ranks, StopAt
from paceline.world.world import World

ONE_FOR_EACH_RANK = [0, 0, 1, 1] * 3
ONE_FOR_NONE = [1] * 12  # nobody uses the model's smallest parameter, a bias of the other head
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
        fit_where_nothing_is_read(),
    ]


def fit_where_nothing_is_read() -> Any:
    """As on an accelerator, where each loss tells the other ranks whether it is finite."""
    World.reads_are_free = property(lambda self: False)  # pyright: ignore
    return fit(ONE_FOR_NONE, 2, True)


def test_what_a_rank_leaves_out_is_trained_by_the_others(ranks: Ranks) -> None:
    """Given heads that only some ranks, micro-batches or steps use, or none, and an output that no
    loss uses, when two ranks train, then all have the weights of one process; a rank that begins to
    leave something out later is refused before its step."""
    for one_each, by_micro_batch, by_step, frozen, late, refused, unread in ranks(fit_all, 2):
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
        torch.testing.assert_close(unread[0], by_hand(ONE_FOR_NONE, 2, True))


class Pair(nn.Module):
    """Two outputs that share nothing."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.near, self.far = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.near(x), self.far(x)

    def optimizers(self) -> dict[str, Any]:
        parts = {"near": self.near.parameters(), "far": self.far.parameters()}
        return {k: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5) for k, p in parts.items()}


class NearAlone(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _ = batch
        return (self.model(x)[0] - y).square().mean()


class OneByOne(Trainer):
    def step(self, window: Any) -> None:
        for (x, y, _), _ in window:
            near, far = self.model(x)
            self.backward((near - y).square().mean(), "near")
            self.backward((far - y).square().mean(), "far")
        self.optimizer_step()


class FarFirst(Trainer):
    """Of a window's two micro-batches the last calls a model and leaves it out of its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _ = batch
        near, far = ((self.model[name](x) - y).square().mean() for name in ("near", "far"))
        return near + far if batch_idx % 2 == 0 else near


def fit_pairs() -> list[dict[str, torch.Tensor]]:
    ended = []
    for kind, batch in ((NearAlone, 2), (OneByOne, 2), (FarFirst, 1)):
        pair = Pair()
        kind(
            model=dict(pair.named_children()) if kind is FarFirst else pair,
            optimizer=pair.optimizers(),
            train_dataloader=DataLoader(TensorDataset(*rows(ONE_FOR_EACH_RANK)), batch),
            gradient_accumulation_steps=2 // batch,
            epochs=1,
            progress=False,
        ).fit()
        ended.append({key: parameter.detach() for key, parameter in pair.named_parameters()})
    return ended


def pair_by_hand(kind: type[Trainer]) -> dict[str, torch.Tensor]:
    pair = Pair()
    optimizers = pair.optimizers()
    for x, y, _ in zip(*(t.split(4) for t in rows(ONE_FOR_EACH_RANK)), strict=True):
        near, far = ((output - y).square() for output in pair(x))
        far = {NearAlone: 0.0, OneByOne: far.mean(), FarFirst: far[:2].sum() / 4}[kind]
        (near.mean() + far).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return {key: parameter.detach() for key, parameter in pair.named_parameters()}


def test_what_no_loss_reaches_at_last_keeps_no_gradient_and_all_else_is_exchanged(
    ranks: Ranks,
) -> None:
    """Given two optimizers, when no loss reaches the one's parameters, each loss goes backward by
    itself after one call of their model, or only a window's first micro-batch trains a model, then
    two ranks have the weights of one process."""
    for near_alone, one_by_one, far_first in ranks(fit_pairs, 2):
        torch.testing.assert_close(near_alone, pair_by_hand(NearAlone))
        torch.testing.assert_close(one_by_one, pair_by_hand(OneByOne))
        torch.testing.assert_close(far_first, pair_by_hand(FarFirst))


def fit_in_two_starts(folder: Path) -> Any:
    with suppress(Preempted):
        fit(GOES_ON, 2, False, settings={"run_dir": folder, "callbacks": [StopAt(1)]})
    return fit(GOES_ON, 2, False, settings={"run_dir": folder})


def test_a_resumed_run_knows_what_its_first_window_left_out(ranks: Ranks, tmp_path: Path) -> None:
    """Given a run that resumes where a window leaves nothing out, it exchanges for later ones."""
    for ended, plan in ranks(fit_in_two_starts, 2, tmp_path):
        torch.testing.assert_close(ended, by_hand(GOES_ON, 2, False))
        assert any("which parameters have gradients" in line for line in plan)


def unreached() -> tuple[list[str], list[str]]:
    world = World(Parallel()).open()
    model = Routed(2, extra=False)
    replica = replicate(model, torch.device("cpu"), whole_way=False)
    replica.begin(exchange=True)
    outputs, _ = replica(torch.ones(2, 3).double(), torch.tensor([world.rank] * 2))
    outputs.sum().backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for parameter in replica._unreached()]
    replica.finish_exchange()
    left = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    world.close()
    return found, left


def test_torch_says_which_parameters_a_backward_pass_has_not_reached(ranks: Ranks) -> None:
    """Only the words of its error say so: they are read, and this fails if torch changes them."""
    for rank, (found, left) in enumerate(ranks(unreached, 2)):
        assert found == [f"heads.{1 - rank}.weight", f"heads.{1 - rank}.bias"]
        assert left == []
