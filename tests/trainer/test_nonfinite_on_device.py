"""A bad step on an accelerator: masked there, read with the next row, never in the weights.

The accelerator is pretended (reading is said not to be free). The oracle is the same run where
reading is free and the bad window is dropped at once.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import CheckpointPolicy, Trainer, World
from paceline.errors import NonFiniteError
from paceline.testing import bits

STEPS, EVERY = 12, 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.1},
    "Adagrad": {},
}


class Bad(Trainer):
    """Its loss is bad in some steps: NaN that reaches no gradient, infinite, or a bad gradient."""

    bad: tuple[int, ...] = ()
    how: str = "constant"

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if self.global_step in self.bad and self.how == "input":
            x = x * torch.inf
        loss = ((self.model(x) - y) ** 2).mean()
        if self.global_step not in self.bad or self.how == "input":
            return loss
        if self.how == "gradient":  # a finite loss whose gradient is infinite
            return loss + (self.model[0].weight.sum() * 0).abs().sqrt()
        return loss + torch.nan

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.trace[self.global_step] = copy.deepcopy(
            [self.model.state_dict(), self.optimizer.state_dict()["state"]]
        )


def run(
    monkeypatch: pytest.MonkeyPatch,
    *,
    free: bool,
    bad: tuple[int, ...] = (),
    how: str = "constant",
    optimizer: str = "AdamW",
    **settings: Any,
) -> Bad:
    """A run of 12 steps with a row each 4; the trainer that made it, however it ended."""
    monkeypatch.setattr(World, "reads_are_free", property(lambda self: free))
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    options = {"lr": 0.05, "fused": True, **OPTIMIZERS[optimizer]}
    trainer = Bad(
        model=model,
        optimizer=getattr(torch.optim, optimizer)(model.parameters(), **options),
        train_dataloader=DataLoader(data, 4, shuffle=True),
        max_steps=STEPS,
        **{"loggers": [], "progress": False, "log_every": EVERY, "max_grad_norm": 1.0, **settings},
    )
    trainer.bad, trainer.how, trainer.trace = bad, how, {}
    trainer.error = None
    try:
        trainer.train(seed=3)
    except NonFiniteError as error:
        trainer.error = error
    assert not hasattr(trainer.optimizer, "found_inf"), "the mask outlives the run"
    return trainer


def state(trainer: Bad, step: int) -> Any:
    return bits(trainer.trace[step])


ways = pytest.mark.parametrize("how", ["constant", "input", "gradient"])
optimizers = pytest.mark.parametrize("optimizer", list(OPTIMIZERS))


@ways
@optimizers
@pytest.mark.parametrize("bad", [(0,), (5, 6), (11,)])
def test_skip_equals_dropping_the_window(monkeypatch, bad, optimizer: str, how: str) -> None:
    """Weights, optimizer state and running statistics after each step, the first one included."""
    settings = {"bad": bad, "how": how, "optimizer": optimizer, "on_nonfinite": "skip"}
    masked = run(monkeypatch, free=False, **settings)
    dropped = run(monkeypatch, free=True, **settings)
    for step in range(1, STEPS + 1):
        if not dropped.trace[step][1]:  # no step yet: a masked one leaves zeros
            masked.trace[step][1] = {}
        assert state(masked, step) == state(dropped, step), step
    assert all(torch.isfinite(t).all() for t in masked.model.state_dict().values())


@ways
@optimizers
def test_raise_names_the_step_and_leaves_the_weights(monkeypatch, optimizer: str, how: str):
    masked = run(monkeypatch, free=False, bad=(5,), how=how, optimizer=optimizer)
    clean = run(monkeypatch, free=False, optimizer=optimizer)
    ids = list(masked.source._ids(0, [(20, 24)], 0))
    assert "step 6 " in str(masked.error)
    assert f"rank 0 had the samples [{ids}]" in str(masked.error)
    assert masked.global_step == 8  # read with the row behind the bad step
    parameters = dict(masked.model.named_parameters())
    before = clean.trace[5][0]
    assert bits(parameters) == bits({name: before[name] for name in parameters})
    assert bits(masked.optimizer.state_dict()["state"]) == bits(clean.trace[5][1])


@ways
def test_a_bad_last_step_is_not_overlooked(monkeypatch, tmp_path: Path, how: str) -> None:
    """No row is due behind it: the end of the run reads the verdict before it saves."""
    masked = run(
        monkeypatch, free=False, bad=(STEPS - 1,), how=how, log_every=1000, run_dir=tmp_path
    )
    assert f"step {STEPS} " in str(masked.error)
    assert not list(tmp_path.glob("checkpoints/step_*"))


@ways
@optimizers
def test_stop_saves_what_was_before_the_bad_step(
    monkeypatch, tmp_path: Path, optimizer: str, how: str
) -> None:
    masked = run(
        monkeypatch,
        free=False,
        bad=(5,),
        how=how,
        optimizer=optimizer,
        on_nonfinite="stop",
        run_dir=tmp_path,
    )
    clean = run(monkeypatch, free=False, optimizer=optimizer)
    assert masked.error is None
    assert masked.result.stopped_by == "non-finite"
    assert masked.global_step == 8
    assert state(masked, 8) == state(clean, 5)
    resumed = run(
        monkeypatch, free=False, optimizer=optimizer, run_dir=tmp_path, on_nonfinite="stop"
    )
    assert resumed.result.complete


@ways
@pytest.mark.parametrize("saves", [2, 4, 3])
def test_rewind_goes_back_before_the_bad_step(
    monkeypatch, tmp_path: Path, how: str, saves: int
) -> None:
    """No checkpoint is taken in between, whichever of row and save comes first."""
    settings: dict[str, Any] = {"bad": (5,), "how": how, "on_nonfinite": "rewind"}
    settings["checkpoint"] = CheckpointPolicy(every_steps=saves, keep_last=None)
    masked = run(monkeypatch, free=False, run_dir=tmp_path / "masked", **settings)
    dropped = run(monkeypatch, free=True, run_dir=tmp_path / "dropped", **settings)
    assert masked.progress.skips == dropped.progress.skips == [5]
    assert masked.result.complete
    assert state(masked, STEPS) == state(dropped, STEPS)


@pytest.mark.parametrize("how", ["constant", "input"])
def test_a_bad_loss_under_a_scaler(monkeypatch, how: str) -> None:
    """The scaler skips by its own look at the gradients, so the loss is told through them."""
    masked = run(monkeypatch, free=False, bad=(6,), how=how, precision="fp16", on_nonfinite="skip")
    assert bits(dict(masked.trace[6][0])) == bits(dict(masked.trace[7][0]))
    assert bits(masked.trace[6][1]) == bits(masked.trace[7][1])
    assert state(masked, 8) != state(masked, 7)


def test_an_unfused_optimizer_is_asked_and_equals_the_fused(monkeypatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "AdamW", {"fused": False, "foreach": True})
    settings: dict[str, Any] = {"bad": (0, 5), "on_nonfinite": "skip"}
    masked = run(monkeypatch, free=False, **settings)
    dropped = run(monkeypatch, free=True, **settings)
    assert state(masked, STEPS) == state(dropped, STEPS)


def test_without_rows_the_verdict_is_read_all_the_same(monkeypatch) -> None:
    """Else a run that nobody watches would stand still to its end after a bad step."""
    monkeypatch.delattr(Bad, "on_step_end")
    masked = run(monkeypatch, free=False, bad=(5,))
    assert "step 6 " in str(masked.error)
    assert masked.global_step == 8
