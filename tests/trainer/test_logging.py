"""What a step may return and log, the row of an epoch, and a run's history."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, Trainer, World
from paceline.errors import ConfigError, MetricError
from paceline.log import Image, Sink, Table, Text
from paceline.testing import Ranks, StopAt, assert_resumes_exactly
from small import batches, fitted, line, message, weights


class Returning(Trainer):
    """Returns its loss in a dictionary."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log_dict({"train/twice": 2 * loss.detach(), "rows": float(len(batch[0]))})
        return {"loss": loss, "half": loss / 2, "train/batch": batch_idx}


def test_a_dictionary_with_a_loss_trains_on_it_and_logs_the_rest() -> None:
    plain = fitted(log_every=1)
    returning = fitted(Returning, log_every=1)
    assert all(torch.equal(weights(plain)[k], v) for k, v in weights(returning).items())
    found = returning.result.history
    steps = slice(0, 5)
    assert found["train/loss"] == plain.result.history["train/loss"]
    losses = [loss for loss in found["train/loss"] if not math.isnan(loss)]
    assert [x for x in found["train/half"] if x == x] == [loss / 2 for loss in losses]
    assert [x for x in found["train/twice"] if x == x] == [2 * loss for loss in losses]
    assert found["train/batch"][steps] == [0, 1, 2, 3, 4]
    assert found["rows"][steps] == [4.0] * 5


class ReturningMore(Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "logits": torch.ones(4)}


def test_what_is_beside_the_loss_is_a_number() -> None:
    said = message(MetricError, ReturningMore)
    assert "log('train/logits', ...) got a tensor of shape (4,)" in said


def test_an_optimizer_is_not_called_loss() -> None:
    model = line()
    named = {"loss": torch.optim.SGD(model.parameters(), lr=0.1)}
    assert "name the optimizer otherwise" in message(ConfigError, model=model, optimizer=named)


@pytest.mark.parametrize(
    ("samples", "steps"),
    [(12, [1, 2, 3]), (100, [*range(2, 25, 2), 25]), (2400, [*range(50, 601, 50)])],
)
def test_an_epoch_has_some_ten_rows_unless_one_says_otherwise(
    samples: int, steps: list[int]
) -> None:
    """Given an epoch of 3, 25 and 600 steps, there are rows every 1, 2 and 50 steps."""
    trainer = fitted(train_dataloader=batches(samples), loggers=[(found := Seen())], epochs=1)
    assert found.steps == steps
    every = "each step" if steps[0] == 1 else f"every {steps[0]} steps"
    assert f"a row of metrics {every}" in [line.decision for line in trainer.plan]


class Seen(Sink):
    """The steps of the rows."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, row: dict[str, Any]) -> None:
        if not any(name.startswith("epoch/") for name in row):
            self.steps.append(row["step"])


def test_ranks_whose_streams_differ_have_rows_at_the_same_steps(ranks: Ranks) -> None:
    assert ranks(rows_of_streams, 2) == [[*range(1, 31)], [*range(1, 31)]]


def rows_of_streams() -> list[int]:
    steps: list[int] = []

    class Steps(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            if metrics:
                steps.append(metrics["step"])

    own = [(torch.ones(4, 3), torch.ones(4, 1))] * (10 + 20 * World().rank)
    fitted(train_dataloader=own, callbacks=[Steps()], epochs=1)
    return steps


def test_an_epoch_has_a_row_with_the_means_of_its_steps() -> None:
    """Given rows every 3 steps of 5 an epoch, then the epochs' rows have the means over their
    samples, computed by hand."""
    found = fitted(log_every=3, epochs=3, lr=0.01).result.history
    model, expected = line(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        losses = []
        for x, y in batches():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(sum(losses) / 5)
    ends = {5: expected[0], 10: expected[1], 15: expected[2]}
    rows = dict(zip(found["step"], found["epoch/train/loss"], strict=True))
    assert {s: v for s, v in rows.items() if not math.isnan(v)} == pytest.approx(ends)
    assert found["epoch"] == [0, 0, 1, 1, 1, 2, 2]
    assert found["step"] == [3, 5, 6, 9, 10, 12, 15]


def in_parts(run_dir: Path | None, **changes: Any) -> Regression:
    model = make_model()
    return Regression(
        **changes,
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train_dataloader=loader(Noisy(), 15),
        epochs=3,
        progress=False,
        log_every=4,
        run_dir=run_dir,
    )


def test_so_it_has_after_a_resume(tmp_path: Path) -> None:
    """Stopped between the rows of an epoch, and between an epoch's end and the next row."""
    assert_resumes_exactly(in_parts, tmp_path, stop_at=[2, 6, 8])


class Looks(Callback):
    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        pass


def test_rows_that_are_turned_on_later_are_of_the_epochs_from_then_on(tmp_path: Path) -> None:
    """Given a run without rows, of which a callback looks at the metrics, stopped after its
    second epoch."""
    whole = in_parts(None).train(seed=1)
    stop = StopAt(whole.global_step // 3 * 2)
    in_parts(tmp_path, callbacks=[Looks(), stop], loggers=[]).train(seed=1)
    history = in_parts(tmp_path).train(seed=1).history
    *_, second, third = [v for v in whole.history["epoch/train/loss"] if not math.isnan(v)]
    found = [v for v in history["epoch/train/loss"] if not math.isnan(v)]
    assert found[-1] == third
    assert found[0] < second, "of its last steps, in which the loss is lower"


def of_epochs(layout_dir: Path) -> list[float]:
    found = in_parts(layout_dir).train(seed=1).history
    return [mean for mean in found["epoch/train/loss"] if not math.isnan(mean)]


def test_so_it_has_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks(of_epochs, 2, tmp_path / "run")
    assert one == two
    assert len(one) == 3


class Showing(Trainer):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/rows", Table(["x", "y"], [[1, "a|b"]]))
        self.log("note", Text("**one**"))
        self.log("picture", Image(torch.rand(4, 5, 3)))


class Album(Sink):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def write_media(self, step: int, name: str, value: Any) -> None:
        self.seen.append((step, name, type(value).__name__))


def test_what_is_no_number_goes_to_the_loggers_that_show_it(capsys: Any) -> None:
    album = Album()
    shown = fitted(Showing, val_dataloader=batches(4), epochs=1, loggers=[album])
    kinds = [("val/rows", "Table"), ("note", "Text"), ("picture", "Image")]
    assert album.seen == [(5, *each) for each in kinds]
    assert set(shown.result.metrics) == {"val/loss"}
    assert capsys.readouterr().err == ""
    fitted(Showing, val_dataloader=batches(4))
    assert capsys.readouterr().err.count("no logger here shows it") == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Image(torch.ones(2, 3, 4, 5)), "three dimensions"),
        (lambda: Image(torch.ones(2, 5, 7)), "1, 3 or 4 channels"),
        (lambda: Table(["a", "b"], [[1]]), "2 columns, and a row of 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(make: Any, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        make()


def test_the_history_of_a_folder_is_that_of_the_whole_run(tmp_path: Path) -> None:
    """Also after a resume, and without rows there is none."""
    whole = in_parts(None).train(seed=1).history
    for stop in (StopAt(5), None):
        trainer = in_parts(tmp_path / "run")
        trainer.callbacks = [stop] if stop else []
        result = trainer.train(seed=1)
    assert result.history["step"] == whole["step"]
    assert str(result.history) == str(whole)
    assert fitted(loggers=[]).result.history == {}
