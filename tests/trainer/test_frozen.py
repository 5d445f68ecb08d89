"""Frozen models on several ranks: a teacher that is sharded beside its student, or kept whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Parallel, Resume, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks, StopAt, bits
from paceline.world.dtensors import is_dtensor, local_part, whole

BAD = 5  # the sample whose loss is not a number


class Net(nn.Module):
    """Blocks, and parameters of its own around them."""

    def __init__(self, size: int, *, frozen: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(4, size)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(size, size)) for _ in range(2)))
        self.head = nn.Linear(size, 4)
        self.double().requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).tanh())


class Distils(Trainer):
    """Learns what the teacher says of a batch."""

    bad = False

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            taught = self.model["teacher"](x)
        return self.model["student"](x), taught

    def loss(self, batch: Any) -> torch.Tensor:
        x, ids = batch
        outputs, taught = self.outputs(x)
        loss = (outputs - taught).square().mean()
        bad = self.bad and torch.is_grad_enabled() and not self.muted and BAD in ids
        return loss * torch.nan if bad else loss


class Unguarded(Distils):
    """Forgets that the teacher needs no gradients."""

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model["student"](x), self.model["teacher"](x)


class Perceives(Distils):
    """Compares what the teacher makes of the student's outputs: gradients pass through it."""

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = self.model["teacher"]
        return teacher(self.model["student"](x)), teacher(x)


class Watch(Callback):
    """What each rank has of the teacher between two windows, and behind a validation."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.plan: list[str] = []
        self.metrics: dict[str, float] = {}

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.rows.append(metrics)
        self.look(trainer)

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        teacher: Any = trainer.model["teacher"]
        self.elements = sum(local_part(p).numel() for p in teacher.parameters())
        self.sharded = all(is_dtensor(p) for p in teacher.parameters())
        if self.sharded:
            assert not teacher._get_fsdp_state()._comm_ctx.post_forward_order

    def on_train_end(self, trainer: Trainer) -> None:
        named = trainer.named_models().items()
        self.weights = {
            f"{name}.{key}": whole(value.detach()).clone()
            for name, model in named
            for key, value in model.state_dict().items()
        }
        self.state = bits(trainer.optimizer.state_dict()["state"])


def fit(
    kind: type[Distils] = Distils,
    parallel: Parallel | None = None,
    folder: Path | None = None,
    stop: int | None = None,
    rows: int = 22,
    **settings: Any,
) -> Watch:
    """Windows of 8 samples; the last one has 6, with which one rank of two runs a stand-in."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = TensorDataset(x, torch.arange(rows))
    student = Net(6, frozen=False, seed=0)
    watch = Watch()
    trainer = kind(
        model={"teacher": Net(8, frozen=True, seed=1), "student": student},
        optimizer=torch.optim.AdamW(student.parameters(), lr=0.02),
        train_dataloader=DataLoader(data, 2, shuffle=True),
        val_dataloader=DataLoader(data, 3),
        callbacks=[watch, *([StopAt(stop)] if stop else [])],
        parallel=parallel,
        global_batch_size=8,
        epochs=2,
        max_grad_norm=0.5,
        log_every=1,
        loggers=[],
        checkpoint=CheckpointPolicy(every_steps=1) if folder else None,
        run_dir=folder,
        progress=False,
        **settings,
    )
    trainer.bad = "on_nonfinite" in settings
    trainer.train(seed=2)
    watch.plan = [str(line) for line in trainer.plan]
    watch.metrics = trainer.result.metrics
    return watch


def ways(parallel: Parallel | None = None) -> list[Watch]:
    return [
        fit(Distils, parallel),
        fit(Unguarded, parallel),
        fit(Perceives, parallel, on_nonfinite="skip"),
    ]


def assert_same(found: Watch, expected: Watch) -> None:
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-9)
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        for name in ("train/loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9, nan_ok=True)
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-9, atol=1e-11)


def test_a_sharded_teacher_teaches_as_a_whole_one(ranks: Ranks) -> None:
    """Called with and without gradients, which may also pass through it, with stand-ins, and with
    a window that is left out: as on one process, and each rank has half of it at any time."""
    expected = ways()
    whole_size = expected[0].elements
    for outcome in ranks(ways, 2, Parallel(dp_shard=2)):
        for ours, theirs in zip(outcome, expected, strict=True):
            assert_same(ours, theirs)
            assert ours.sharded
            assert ours.elements == whole_size / 2


def stop_and_go_on(folder: Path) -> list[Watch]:
    layout = Parallel(dp_shard=2)
    never_stopped = fit(Perceives, layout)
    fit(Perceives, layout, folder, stop=3)
    return [never_stopped, fit(Perceives, layout, folder)]


def test_a_run_with_a_sharded_teacher_goes_on_exactly(ranks: Ranks, tmp_path: Path) -> None:
    for whole_run, in_two in ranks(stop_and_go_on, 2, tmp_path):
        assert bits(in_two.weights) == bits(whole_run.weights)
        assert in_two.state == whole_run.state
        assert in_two.rows == whole_run.rows[3:]


LAYOUTS = [
    (2, Parallel(dp_shard=2)),
    (1, Parallel()),
    (2, Parallel(dp_shard=2, frozen="replicate")),
    (2, Parallel()),
]


def test_a_teacher_is_read_in_any_other_layout(ranks: Ranks, tmp_path: Path) -> None:
    found = [
        ranks(fit, size, Perceives, parallel, tmp_path, stop)[0]
        for (size, parallel), stop in zip(LAYOUTS, (1, 3, 5, None), strict=True)
    ]
    for name, value in fit(Perceives).weights.items():
        torch.testing.assert_close(found[-1].weights[name], value, rtol=1e-9, atol=1e-11)
    assert [each.sharded for each in found] == [True, False, False, False]
    assert "shards the frozen teacher over 2 ranks, too  [parallel.frozen]" in found[0].plan
    assert "keeps the frozen teacher whole on each rank  [parallel.frozen]" in found[2].plan
    assert not any("frozen" in line for line in found[3].plan)


class Scaled(nn.Module):
    """A loss with a frozen parameter of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=False)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets) * self.scale).square().mean()


def fit_scaled(folder: Path | None, parallel: Parallel, steps: int, *shape: int) -> Any:
    model = nn.Linear(4, 4)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=Scaled(*shape),
        train_dataloader=DataLoader(TensorDataset(x, x), 2),
        global_batch_size=4,
        max_steps=steps,
        parallel=parallel,
        run_dir=folder,
        resume=Resume("auto"),
        progress=False,
    )
    try:
        return trainer.train().complete
    except ConfigError as error:
        return str(error)


def test_a_loss_that_is_sharded_is_the_same_loss(ranks: Ranks, tmp_path: Path) -> None:
    """What names a run's loss does not depend on the layout."""
    sharded = Parallel(dp_shard=2)
    assert ranks(fit_scaled, 2, tmp_path, sharded, 2, 4) == [True, True]
    assert fit_scaled(tmp_path, Parallel(), 4, 4) is True
    for text in ranks(fit_scaled, 2, None, sharded, 2):
        assert "scale of 'loss_fn' have no dimension to shard" in text
        assert "parallel.frozen='replicate'" in text


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.frozen='split': expected 'shard' or 'repl"):
        Parallel(frozen="split")  # type: ignore[arg-type]
