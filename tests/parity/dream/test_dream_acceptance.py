"""Dream Trainer at home: its acceptance rows on the Trainer, one test a row.

Rows that promises and other tests keep already are listed in `test_dream_rows.py`; those on the
interface stand in `test_dream_interface.py`. Where Paceline differs on purpose the test says what
it does instead.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline import AbstractTrainerConfig, Callback, DeviceParameters, Trainer
from paceline.errors import ConfigError, MismatchError, ResumeError
from paceline.testing import Trace, bits
from small import batches, fitted, line, message, points, same, settings, weights


@dataclass(frozen=True, kw_only=True)
class Config(AbstractTrainerConfig):
    """A configuration with a field of the user's own."""

    width: int = 3


class Configured(Trainer):
    """A trainer in Dream's style: its configuration is all it is given."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            loss_fn=nn.MSELoss(),
            train_dataloader=batches(),
            epochs=2,
            progress=False,
            **config.device_parameters.settings(),
        )
        self.config = config

    def configure(self) -> None:
        self.net = nn.Linear(self.config.width, 1)
        self.adam = torch.optim.Adam(self.net.parameters())

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)


def test_DT_02_a_configured_trainer_fits_on_a_plain_machine() -> None:
    """No launcher, no environment variable, no accelerator: one process on the CPU."""
    config = Config(device_parameters=DeviceParameters.SINGLE_DEVICE())
    trainer = Configured(config)
    result = trainer.fit(seed=config.seed)
    assert (result.complete, result.global_step) == (True, 10)
    world = trainer.world
    assert (world.device.type, world.size, world.rank) == ("cpu", 1, 0)


class Counted(Trainer):
    """Counts how often its components are made and placed."""

    made = placed = 0

    def configure(self) -> None:
        self.made += 1

    def setup(self) -> None:
        self.placed += 1
        super().setup()


def trace(size: int) -> list[str]:
    """Two epochs of four micro-batches in windows of two, two validation batches."""
    trace = Trace()
    trainer = fitted(
        Counted,
        train_dataloader=batches(16 * size),
        val_dataloader=batches(8 * size),
        gradient_accumulation_steps=2,
        callbacks=[trace],
    )
    assert (trainer.made, trainer.placed) == (1, 1)
    return [event for event, _ in trace.events]


BATCH = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"]
WINDOW = [*BATCH * 2, "on_before_optimizer_step", "on_step_end"]
VALIDATION = ["on_validation_batch_start", "on_validation_batch_end"] * 2
EPOCH = [
    "on_train_epoch_start",
    *WINDOW * 2,
    *["on_validation_start", *VALIDATION, "on_validation_end", "on_metrics"],
    "on_train_epoch_end",
]
TRACE = ["on_setup", "on_train_start", *EPOCH * 2, "on_train_end", "on_teardown"]


def test_DT_06_the_order_of_events() -> None:
    """Dream's order with our names; a first validation for the sake of it is preflight's."""
    assert trace(1) == TRACE


def test_DT_06_the_order_of_events_on_each_rank(ranks: Any) -> None:
    assert ranks(trace, 2, 2) == [TRACE] * 2


def test_DT_07_a_parameter_without_values_is_named() -> None:
    """What is made on the meta device is filled by its own module. This one cannot."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

    model = nn.Sequential(line(), Scale())
    with pytest.raises(ConfigError, match=r"without values: model\.1\.weight.*meta"):
        Trainer(**settings(model)).fit()


class Stream:
    """Counts what is taken from it, without an end."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        for i in itertools.count():
            self.taken += 1
            yield torch.full((1, 3), float(i)), torch.zeros(1, 1)


def test_DT_12_an_epoch_takes_no_batch_more_than_it_trains_on() -> None:
    seen: list[float] = []

    class Sees(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch[0][0, 0].item())
            return super().training_step(batch, batch_idx)

    stream = Stream()
    fitted(Sees, lr=1e-4, train_dataloader=stream, epoch_length=3, epochs=2)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert stream.taken == 6


class Accuracy:
    """What a metric of torchmetrics is: sums of its own, added up over the ranks when asked."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.sums = torch.zeros(2, dtype=torch.float64)

    def __call__(self, hits: torch.Tensor) -> None:
        self.sums += torch.tensor([hits.sum().item(), hits.numel()])

    def compute(self) -> torch.Tensor:
        right, seen = self.world.all_reduce(self.sums.clone())
        return right / seen


class Judged(Trainer):
    """Keeps a metric object of its own, updated by a call."""

    def on_validation_start(self) -> None:
        self.accuracy = Accuracy(self.world)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.accuracy((self.model(x) > 0) == (y > 0))  # pyright: ignore

    def get_val_metrics(self) -> dict[str, Any]:
        return {"accuracy/whole": self.accuracy.compute()}


def judged(samples: int, epochs: int) -> tuple[float, float]:
    """What a run has measured in the end, and what its last weights get on all samples at once."""
    trainer: Any = fitted(Judged, val_dataloader=DataLoader(points(samples), 2), epochs=epochs)
    x, y = points(samples).tensors
    expected = ((trainer.model(x) > 0) == (y > 0)).double().mean().item()
    return trainer.result.metrics["accuracy/whole"], expected


def test_DT_15_a_metric_object_is_computed_once_over_all_batches() -> None:
    measured, expected = judged(11, 1)
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize("samples", [11, 1])
def test_DT_15_a_rank_without_samples_makes_no_other_wait(ranks: Any, samples: int) -> None:
    """Ranks have six and five samples, or one and none; the value is that of one process."""
    for measured, expected in ranks(judged, 2, samples, 2):
        assert measured == pytest.approx(expected)


class Leaves(Callback):
    """Takes itself off the trainer's list in the middle of an event."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        trainer.callbacks.remove(self)


def test_DT_32_a_callback_that_takes_itself_away_costs_no_other_an_event() -> None:
    """Who listens is settled when the run starts: the list cannot be changed till it ends."""
    leaves, trace = Leaves(), Trace()
    text = message(ConfigError, callbacks=[leaves, trace])
    assert "callbacks, loggers: the run that is open read it at its start" in text
    assert [event for event, _ in trace.events].count("on_step_end") == 0


def test_DT_32_two_callbacks_of_a_class_have_names_of_their_own(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self, by: int) -> None:
            self.by, self.count = by, 0

        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            self.count += self.by

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    fitted(run_dir=tmp_path, callbacks=[Counts(1), Counts(10)])
    again = [Counts(1), Counts(10)]
    fitted(run_dir=tmp_path, callbacks=again, epochs=3)
    assert [each.count for each in again] == [15, 150]


def test_DT_37_a_run_goes_where_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's "none" names no run, and another run never goes on with this one's weights."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    fitted(run_dir=tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    with pytest.raises(ResumeError, match=r"optimizer\.lr: 0\.05 then, 0\.5 now"):
        fitted(run_dir=tmp_path / "one", lr=0.5)


def test_DT_38_a_zero_gradient_stops_nothing() -> None:
    class Flat(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 0 * super().training_step(batch, batch_idx)

    trainer = fitted(Flat, max_grad_norm=1.0)
    assert trainer.global_step == 10
    assert same(weights(trainer), {f"model.{k}": v for k, v in line().state_dict().items()})


def test_DT_39_the_seed_is_the_one_given_and_zero_is_one(tmp_path: Path) -> None:
    """None is 0 here, not a number that each rank draws for itself."""

    class Drops(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * torch.rand(())

    def ends(seed: int | None, name: str) -> Any:
        trainer = Drops(**settings(run_dir=tmp_path / name))
        trainer.fit(seed=seed)
        return json.loads((tmp_path / name / "run.json").read_text())["seed"], weights(trainer)

    (zero, first), (none, second), (one, third) = ends(0, "a"), ends(None, "b"), ends(1, "c")
    assert (zero, none, one) == (0, 0, 1)
    assert same(first, second)
    assert not same(first, third)


def draws() -> list[float]:
    """What each micro-batch of this rank draws in its training step."""
    found: list[float] = []

    class Draws(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            found.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    fitted(Draws)
    return found


def test_DT_39_each_rank_has_a_stream_of_its_own_that_comes_again(ranks: Any) -> None:
    first = ranks(draws, 2)
    assert len({*first[0], *first[1]}) == len(first[0]) + len(first[1])
    assert ranks(draws, 2) == first


def test_DT_41_a_state_that_does_not_fit_is_refused_and_left_as_it_was() -> None:
    """What is not this trainer's is named; neither the state nor the trainer is changed by it."""
    seen: list[str] = []

    class Loads(Trainer):
        def on_train_start(self) -> None:
            state = self.state_dict()
            strange = state["models"] | {"head": {"weight": torch.zeros(1)}}
            longer = {"model": state["models"]["model"] | {"scale": torch.zeros(1)}}
            for models, error in ((strange, ResumeError), (longer, MismatchError)):
                wrong = {**state, "models": models}
                before = bits(wrong["models"])
                with pytest.raises(error) as caught:
                    self.load_state_dict(wrong)
                seen.append(str(caught.value))
                assert bits(wrong["models"]) == before
                assert bits(self.state_dict()["models"]) == bits(state["models"])
            self.load_state_dict(state)

    fitted(Loads)
    assert "head" in seen[0]
    assert "scale" in seen[1]
