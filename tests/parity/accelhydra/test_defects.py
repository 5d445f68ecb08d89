"""AccelHydra's ways to a wrong result that its acceptance rows leave out: absent here.

Numbers are those of its list of defects. The others of the kind stand in `test_acceptance.py`,
`test_recipes.py` (5, 8 to 11, 15) and `tests/trainer/` (14, 18 to 20).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from paceline import CheckpointPolicy, MetricMonitor, Trainer
from paceline.errors import ConfigError, MismatchError, NonFiniteError
from paceline.log.sinks import RunInfo, Sink
from paceline.recipe.schedules import WarmupCosine
from paceline.testing import StopAt, Trace
from small import batches, checkpoints, fitted, line, points, same, settings, step_rows, weights


def test_AH_09_warm_up_is_counted_in_optimizer_steps() -> None:
    """Ten warm-up steps are ten updates, whatever the accumulation."""
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates: list[float] = []
    trainer = Trainer(
        **settings(
            model=model,
            optimizer=optimizer,
            lr_scheduler=WarmupCosine(optimizer, total_steps=30, warmup=10),
            train_dataloader=batches(60, 2),
            gradient_accumulation_steps=2,
        )
    )
    trainer.on_before_optimizer_step = lambda o: rates.append(o.param_groups[0]["lr"])
    trainer.fit()
    assert trainer.warmup_steps == 10
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert (len(rates), max(rates)) == (30, rates[9])


def test_AH_28_a_tracker_gets_the_settings_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    class Tracker(Sink):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.config: dict[str, Any] = {}
            self.resumed: bool | None = None

        def open(self, run: RunInfo) -> None:
            self.config, self.resumed = dict(run.identity), run.resumed

        def write(self, row: Any) -> None:
            self.steps.append(row["step"])

        def state_dict(self) -> dict[str, Any]:
            return {"id": "abc", "steps": list(self.steps)}

        def load_state_dict(self, state: Any) -> None:
            self.steps = list(state["steps"])

    first, second = Tracker(), Tracker()
    fitted(run_dir=tmp_path, loggers=[first], log_every=1, callbacks=[StopAt(4)])
    assert (first.resumed, first.config["optimizer.lr"], first.config["seed"]) == (False, 0.05, 1)
    fitted(run_dir=tmp_path, loggers=[second], log_every=1)
    assert second.resumed
    assert second.steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]  # with a row for each epoch


@pytest.mark.parametrize("step", [1, 2, 3])
def test_7_no_gradient_is_lost_at_a_checkpoint(step: int, tmp_path: Path) -> None:
    """Checkpoints stand between windows, so none falls between two accumulated batches."""
    kept = {"train_dataloader": batches(40, 2), "gradient_accumulation_steps": 4}
    whole = fitted(**kept)
    policy = CheckpointPolicy(every_steps=1)
    fitted(**kept, run_dir=tmp_path, checkpoint=policy, callbacks=[StopAt(step)])
    assert same(weights(fitted(**kept, run_dir=tmp_path, checkpoint=policy)), weights(whole))


def test_21_the_logged_loss_is_the_mean_over_all_items_since_the_last_row(tmp_path: Path) -> None:
    losses: list[tuple[float, int]] = []
    trainer = Trainer(
        **settings(
            train_dataloader=batches(23, 4),
            gradient_accumulation_steps=2,
            epochs=1,
            log_every=3,
            run_dir=tmp_path,
        )
    )
    trainer.on_train_batch_end = lambda batch, batch_idx, loss: losses.append(
        (loss.item(), len(batch[0]))
    )
    trainer.fit()
    (row,) = step_rows(tmp_path)
    assert row["train/loss"] == pytest.approx(sum(loss * n for loss, n in losses) / 23)


def test_21_a_run_that_diverges_does_not_go_on() -> None:
    with pytest.raises(NonFiniteError):
        fitted(lr=1e38, epochs=3)


def test_22_the_norm_logged_under_fp16_is_that_of_the_true_gradients(tmp_path: Path) -> None:
    class Small(Trainer):
        def on_train_start(self) -> None:
            if self.optimization.scaler is not None:
                state = self.optimization.scaler.state_dict()
                self.optimization.scaler.load_state_dict({**state, "scale": 128.0})

    norms: dict[str, Any] = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        fitted(Small, precision=precision, max_grad_norm=1e9, log_every=1, run_dir=folder)
        norms[precision] = [row["grad_norm"] for row in step_rows(folder)]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=2e-2)


class Streamed:
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(10))


def test_25_loaders_need_no_length() -> None:
    trainer = fitted(train_dataloader=Streamed(), val_dataloader=Streamed())
    x, y = points(10).tensors
    error = nn.functional.mse_loss(trainer.model(x), y).item()
    assert trainer.result.final_val_loss == pytest.approx(error)


def rate_after_ten_updates() -> tuple[int, float]:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = fitted(
        model=model,
        optimizer=optimizer,
        lr_scheduler=StepLR(optimizer, 1, 0.5),
        train_dataloader=batches(40, 2),
        epochs=None,
        max_steps=10,
        loss_fn=nn.SmoothL1Loss(),
    )
    return trainer.global_step, trainer.learning_rates["optimizer"]


def test_27_a_schedule_runs_as_fast_on_two_ranks_as_on_one(ranks: Any) -> None:
    assert ranks(rate_after_ten_updates, 2) == [rate_after_ten_updates()] * 2
    assert rate_after_ten_updates() == (10, 0.5**10)


def test_35_a_trainer_is_an_object_like_any_other() -> None:
    one, other = Trainer(**settings()), Trainer(**settings())
    assert len({one, other, one}) == 2
    assert len(repr(one)) < 200


def test_37_triggers_that_meet_make_one_checkpoint(tmp_path: Path) -> None:
    saved: list[list[str]] = []

    class Counts(Trainer):
        def checkpoint(self, reasons: Any = (), *, best: bool = False) -> None:
            saved.append(list(reasons))
            super().checkpoint(reasons, best=best)

    fitted(
        Counts,
        run_dir=tmp_path,
        epochs=1,
        val_dataloader=batches(4),
        metric_monitor=MetricMonitor(),
        checkpoint=CheckpointPolicy(every_steps=5, every_epochs=1, keep_every_steps=5),
    )
    assert saved == [["step", "epoch", "best", "end"]]
    assert checkpoints(tmp_path) == ["step_00000005"]


def test_37_a_step_checkpoint_at_an_epochs_end_is_after_that_end(tmp_path: Path) -> None:
    """Resumed from it, the run repeats neither the validation nor the epoch's start."""

    def run(*callbacks: Any, **changes: Any) -> Any:
        trace = Trace()
        fitted(
            run_dir=tmp_path,
            val_dataloader=batches(4),
            checkpoint=CheckpointPolicy(every_steps=5, every_epochs=None),
            callbacks=[trace, *callbacks],
            **changes,
        )
        return [event for event, _ in trace.events]

    run(epochs=1)
    trace = run(epochs=2)
    start = trace.index("on_train_start")
    assert trace[start + 1] == "on_train_epoch_start"
    assert trace.count("on_train_epoch_start") == trace.count("on_validation_start") == 1


class Partial(nn.Module):
    """A frozen backbone that comes from elsewhere; saves its head alone."""

    saves = ("head.", "norm.")

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3).requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.backbone(x)))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name.startswith(self.saves)}


def partial(model: nn.Module, run_dir: Path, epochs: int, **changes: Any) -> Trainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    return fitted(model=model, optimizer=optimizer, run_dir=run_dir, epochs=epochs, **changes)


def save_and_load_partial(run_dir: Path) -> tuple[bool, bool]:
    torch.manual_seed(4)
    first = partial(Partial(), run_dir, 1)
    torch.manual_seed(5)
    second = Partial()
    backbone = second.backbone.weight.clone()
    partial(second, run_dir, 1)
    loaded = torch.equal(second.head.weight, first.model.head.weight)
    return loaded, torch.equal(second.backbone.weight, backbone)


def test_AH_20_what_is_not_saved_stays_and_what_is_trained_must_be_saved(
    ranks: Any, tmp_path: Path
) -> None:
    assert ranks(save_and_load_partial, 2, tmp_path / "run") == [(True, True)] * 2

    class Headless(Partial):
        saves = ("norm.",)

    with pytest.raises(ConfigError, match=r"leaves out what is trained: model.head.weight"):
        partial(Headless(), tmp_path / "headless", 1)

    class Deeper(Partial):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))

    with pytest.raises(MismatchError, match=r"missing from the checkpoint: head.0.weight"):
        partial(Deeper(), tmp_path / "run", 2, gradient_accumulation_steps=2)
