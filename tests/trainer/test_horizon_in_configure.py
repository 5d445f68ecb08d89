"""How long a run is can be read where components are made: schedules want to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.utils.data import DataLoader

from builders import Noisy, Regression, loader
from paceline import Callback, CheckpointPolicy, Trainer
from paceline.data.loader import count_windows
from paceline.data.source import WindowSize
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits
from small import batches, fitted, settings, weights


class StopAfter5(Callback):
    """Every rank asks for a stop after 5 steps."""

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if trainer.global_step == 5:
            trainer.stop_agreement.request("test", everywhere=True)


class Configured(Regression):
    """Makes all of its components in `configure()`, the schedule as long as the run."""

    asks = True
    length = 0

    def configure(self) -> None:
        self.train_dataloader = loader(Noisy(61), 5)
        self.val_dataloader = loader(Noisy(11), 5)
        horizon = self.training_horizon if self.asks else self.length
        self.facts = (horizon, self.train_batches, self.epochs) if self.asks else None
        self.model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.lr_scheduler = OneCycleLR(self.optimizer, 0.1, total_steps=horizon)


class ByHand(Configured):
    """The same with the length counted on paper: 13 batches, two a window, 3 epochs."""

    asks = False


def configured(kind: type[Configured], folder: Path | None, *callbacks: Any, **more: Any) -> Any:
    return kind(
        epochs=3,
        progress=False,
        run_dir=folder,
        callbacks=callbacks,
        checkpoint=CheckpointPolicy(every_steps=4),
        **{"gradient_accumulation_steps": 2, **more},
    )


def outcome(trainer: Trainer) -> Any:
    trainer.train(seed=3)
    return bits([weights(trainer), trainer.lr_scheduler.state_dict(), trainer.result.metrics])


def compared(folder: Path, length: int, batches: int) -> list[Any]:
    """A run that asks, one that is told, and one that asks, is stopped and asks again."""
    asking = configured(Configured, None)
    asked = outcome(asking)
    assert asking.facts == (length, batches, 3)
    assert (asking.training_horizon, asking.train_batches) == (length, batches)  # after it too
    told = configured(ByHand, None)
    told.length = length
    stopped = configured(Configured, folder, StopAfter5())
    stopped.train(seed=3)
    assert stopped.global_step == 5
    return [asked, outcome(told), outcome(configured(Configured, folder))]


def test_a_schedule_of_the_runs_length(tmp_path: Path) -> None:
    asked, told, resumed = compared(tmp_path, 21, 13)
    assert asked == told == resumed


def test_so_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for asked, told, resumed in ranks(compared, 2, tmp_path, 12, 7):
        assert asked == told == resumed


def known(folder: Path) -> tuple[Any, ...]:
    trainer = configured(Configured, folder)
    trainer.train(seed=3)
    return trainer.facts


def test_a_global_batch_size_counts_given_or_kept_from_a_checkpoint(
    ranks: Ranks, tmp_path: Path
) -> None:
    sizes = {"gradient_accumulation_steps": 1, "global_batch_size": 15}
    trainer = configured(Configured, None, **sizes)
    trainer.train(seed=3)
    assert trainer.facts == (15, 13, 3)
    configured(Configured, tmp_path, StopAfter5()).train(
        seed=3
    )  # 10 samples a step, as on two ranks
    assert ranks(known, 2, tmp_path) == [(21, 7, 3)] * 2


@pytest.mark.parametrize(
    "name", ["train_dataloader", "val_dataloader", "gradient_accumulation_steps"]
)
def test_data_assigned_after_that_are_refused(name: str) -> None:
    class Late(Configured):
        def configure(self) -> None:
            super().configure()
            setattr(self, name, 3 if name.startswith("gradient") else loader(Noisy(20)))

    with pytest.raises(ConfigError, match=f"configure.. assigns {name} after it has read"):
        configured(Late, None).train()


def test_what_opens_no_data_may_be_assigned_late() -> None:
    class Late(Configured):
        def configure(self) -> None:
            super().configure()
            self.max_steps = 2

    trainer = configured(Late, None)
    trainer.train()
    assert (trainer.facts[0], trainer.training_horizon, trainer.global_step) == (21, 2, 2)


def test_without_data_it_says_so() -> None:
    class Early(Configured):
        def configure(self) -> None:
            _ = self.training_horizon

    with pytest.raises(ConfigError, match="train_dataloader: there is nothing to train on"):
        configured(Early, None).train()


def test_before_any_run_it_is_not_known() -> None:
    trainer = Trainer(**settings())
    for name in ("training_horizon", "train_batches"):
        with pytest.raises(ConfigError, match=r"read it in configure\(\), or later"):
            getattr(trainer, name)
    assert trainer.epochs == 2


class Lengthens:
    """Batches of one sample; a pass has 5 of them, 6 or 5."""

    pass_ = drawn = 0

    def set_epoch(self, pass_: int) -> None:
        self.pass_ = pass_

    def __iter__(self) -> Any:
        self.drawn += 1
        return iter([[i] for i in range((5, 6, 5)[self.pass_ % 3])])


def test_passes_of_different_lengths_are_counted_one_by_one() -> None:
    """Given a batch sampler of 5, 6 and 5 batches, a schedule of the run's length ends with it.
    Of a thousand passes some are drawn, and the length is estimated."""

    class Decays(Trainer):
        def configure(self) -> None:
            steps = self.training_horizon or 0
            self.lr_scheduler = LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
            self.rates = []

        def on_step_end(self, metrics: Any) -> None:
            self.rates.append(self.optimizer.param_groups[0]["lr"])

    sampler: Any = Lengthens()
    loader = DataLoader(batches(24).dataset, batch_sampler=sampler)
    assert abs(count_windows(loader, WindowSize(), 3000, None, dp_size=1, seed=0) - 16000) < 30
    assert sampler.drawn < 110
    assert count_windows(loader, WindowSize(), 3, None, dp_size=1, seed=0) == 16
    trainer = fitted(Decays, train_dataloader=loader, epochs=3)
    assert (trainer.global_step, trainer.training_horizon) == (16, 16)
    assert [trainer.rates[-2] > 0, trainer.rates[-1]] == [True, pytest.approx(0, abs=1e-9)]


def test_a_second_run_counts_its_own_data() -> None:
    class Counts(Trainer):
        def configure(self) -> None:
            self.horizons = [*getattr(self, "horizons", []), self.training_horizon]

    trainer = fitted(Counts)
    trainer.train(train_dataloader=batches(40), epochs=1)
    assert trainer.horizons == [10, 10]
    trainer.train(train_dataloader=batches(8), epochs=1)
    assert trainer.horizons[2:] == [2]
