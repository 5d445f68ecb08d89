"""Dream Trainer at home: its acceptance rows on the Trainer, one test a row.

Rows that promises and other tests keep already are listed in `test_dream_rows.py`; those on the
interface stand in `test_dream_interface.py`. Where Paceline differs on purpose the test says what
it does instead.
"""

from __future__ import annotations

import errno
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from faults import QuickDisk
from paceline import (
    AbstractTrainerConfig,
    Callback,
    CheckpointPolicy,
    DeviceParameters,
    Trainer,
)
from paceline.checkpoint import load_tree, native_engine
from paceline.errors import ConfigError, MetricError, MismatchError, ResumeError
from paceline.log.sinks import RunInfo, Sink
from paceline.log.tensorboard import TensorBoard
from paceline.testing import StopAt, Trace, bits
from small import batches, fitted, line, message, points, same, settings, step_rows, weights


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


class Stepped(Trainer):
    """Sends each micro-batch backward itself, and keeps what its steps return."""

    def step(self, window: Any) -> None:
        for batch, batch_idx in window:
            self.backward(self.training_step(batch, batch_idx))
        self.returned = self.optimizer_step()


def stepped(accumulation: int, clip: float | None) -> tuple[float | None, dict[str, Any]]:
    """One step on eight samples, in micro-batches of two."""
    trainer = fitted(
        Stepped,
        train_dataloader=batches(8, 2),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        epochs=1,
    )
    assert trainer.global_step == 1
    norm = trainer.returned
    return None if norm is None else norm.item(), weights(trainer)


def test_DT_09_a_step_is_that_of_the_whole_batch_and_returns_the_norm_before_clipping(
    ranks: Any,
) -> None:
    """Four micro-batches, or two on each of two ranks. Without clipping no norm is taken."""
    model, (x, y) = line(), points(8).tensors
    nn.functional.mse_loss(model(x), y).backward()
    gradients: Any = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert norm > 0.2
    for clip, scale in ((0.1, 0.1 / norm), (None, 1.0)):
        runs = [stepped(4, clip)] + (ranks(stepped, 2, 2, clip) if clip else [])
        for returned, after in runs:
            assert returned == (clip and pytest.approx(norm, rel=1e-5))
            for name, value in line().state_dict().items():
                expected = value - 0.05 * scale * gradients[f"model.{name}"]
                torch.testing.assert_close(after[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)


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


class Torchmetrics(Trainer):
    """A collection that is called, and a lone metric that is updated, each an attribute."""

    def configure(self) -> None:
        import torchmetrics

        kinds = torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()
        self.metrics = torchmetrics.MetricCollection(list(kinds))
        self.lone = torchmetrics.MeanAbsoluteError()

    def on_validation_start(self) -> None:
        self.metrics.reset()
        self.lone.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        outputs = self.model(x)  # pyright: ignore
        self.metrics(outputs, y)
        self.lone.update(outputs, y)

    def get_val_metrics(self) -> dict[str, Any]:
        named = {f"metrics/{name}": value for name, value in self.metrics.compute().items()}
        return {**named, "lone": self.lone.compute()}


def by_torchmetrics(samples: int) -> tuple[Any, Any]:
    """What a run has measured, and what plain torch gets on all samples at once."""
    loader = DataLoader(points(samples), 2)
    trainer: Any = fitted(Torchmetrics, val_dataloader=loader, epochs=1)
    x, y = points(samples).tensors
    error = (trainer.model(x) - y).detach()
    squared, absolute = (error**2).mean().item(), error.abs().mean().item()
    return trainer.result.metrics, {
        "metrics/MeanSquaredError": squared,
        "metrics/MeanAbsoluteError": absolute,
        "lone": absolute,
    }


def test_DT_15_torchmetrics_are_those_of_one_process(ranks: Any) -> None:
    """On two ranks, of which one has no sample."""
    for measured, expected in ranks(by_torchmetrics, 2, 1):
        assert measured == pytest.approx(expected, rel=1e-5)


def test_DT_23_a_background_save_has_its_steps_weights_and_a_failing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each begins to write only when the step after it has changed the weights; that of step 4
    fails, and training goes on."""
    kept: dict[int, Any] = {}
    stepped = threading.Condition()

    class Disk(QuickDisk):
        def mkdir(self, path: Path) -> None:
            if path.name.startswith(".step_") and (step := int(path.name[6:14])) < 10:
                with stepped:
                    assert stepped.wait_for(lambda: max(kept) > step, 30)
                if step == 4:
                    raise OSError(errno.ENOSPC, "No space left on device")
            super().mkdir(path)

    class Keeps(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            with stepped:
                kept[trainer.global_step] = bits(weights(trainer))
                stepped.notify_all()

    monkeypatch.setattr(native_engine, "Disk", Disk)
    policy = CheckpointPolicy(every_epochs=None, every_steps=2, keep_last=None)
    trainer = fitted(run_dir=tmp_path, checkpoint=policy, callbacks=[Keeps()])
    assert (trainer.result.complete, trainer.global_step) == (True, 10)
    found = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert [int(path.name[5:]) for path in found] == [2, 6, 8, 10]
    for path in found:
        saved = load_tree(path)["models"]["model"]
        saved = {f"model.{name}": value for name, value in saved.items()}
        assert bits(saved) == kept[int(path.name[5:])]
    assert len(set(map(str, kept.values()))) == 10
    text = capsys.readouterr().err
    assert "step 4: the checkpoint could not be written: No space left on device" in text


class Shaped(Protocol):
    """What no `isinstance` can check."""

    shape: int


class Sized:
    """A mixin that a callback may ask for."""

    size = 3


def test_DT_32_a_callback_for_a_kind_of_trainer_is_refused_by_others() -> None:
    class Big(Trainer, Sized): ...

    class Measures(Callback[Sized]):
        def on_train_start(self, trainer: Any) -> None:
            self.size = trainer.size

    class More(Measures): ...

    class AnyShape(Callback[Shaped]): ...

    measures = More()
    fitted(Big, callbacks=[measures, AnyShape()])
    assert measures.size == 3
    text = message(ConfigError, callbacks=[More(), Trace()])
    assert "callbacks: More is for trainers of the kind Sized, which Trainer is not." in text


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


class Tracks(Sink):
    """A tracker of the user's own."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}

    def open(self, run: RunInfo) -> None:
        self.id = run.id

    def write(self, row: Any) -> None:
        if "number" in row:  # not that of an epoch
            self.rows[row["step"]] = row


class Logs(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.global_step + 1
        self.log("number", step)
        self.log("tensor", torch.tensor(2.0 * step))
        self.log("bf16", torch.tensor(step, dtype=torch.bfloat16))
        with pytest.raises(MetricError, match=r"log\('text', ...\) got 'a cat' of type str"):
            self.log("text", "a cat")
        return super().training_step(batch, batch_idx)


def test_DT_35_several_loggers_get_the_means_under_one_id(tmp_path: Path) -> None:
    """Ten steps, a row every five; strings are refused by their name; `loggers=[]` writes none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = Tracks(), Tracks()
    for tracks, *stop in ((first, StopAt(5)), (second,)):
        loggers = [tracks, TensorBoard()]
        fitted(Logs, run_dir=tmp_path / "run", loggers=loggers, log_every=5, callbacks=stop)
    means = {5: (3.0, 6.0, 3.0), 10: (8.0, 16.0, 8.0)}
    names = "number", "tensor", "bf16"
    local = {row["step"]: row for row in step_rows(tmp_path / "run")}
    for found in (local, {**first.rows, **second.rows}):
        assert {step: tuple(found[step][name] for name in names) for step in found} == means
    assert (list(first.rows), list(second.rows), first.id) == ([5], [10], second.id)
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    for i, name in enumerate(names):
        assert {event.step: event.value for event in board.Scalars(name)} == {
            step: values[i] for step, values in means.items()
        }
    fitted(Logs, run_dir=tmp_path / "silent", loggers=[], log_every=5)
    assert not [*(tmp_path / "silent").glob("*.jsonl"), *(tmp_path / "silent").glob("*.csv")]


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
