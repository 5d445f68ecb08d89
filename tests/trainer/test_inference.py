"""Evaluating and predicting outside a run: the same numbers, in any layout, and nothing touched."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mixture import Mixture
from paceline import Callback, MetricMonitor, Parallel, Trainer
from paceline.callbacks import AveragedWeights
from paceline.checkpoint.export import export
from paceline.errors import ConfigError, DataError, MismatchError, PeerError
from paceline.testing import Ranks, bits
from paceline.world.dtensors import local_part
from paceline.world.meeting import announce_exit
from paceline.world.signals import leave_at_once_on_signals
from small import batches, fitted, line, points, settings

SPLIT = {"0": "colwise", "2": "rowwise"}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Dropout(0.5))


def by_hand(model: nn.Module, n: int) -> tuple[torch.Tensor, float]:
    """The outputs and the loss of `points(n)`, in plain torch."""
    x, y = points(n).tensors
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(x)
    return outputs, nn.functional.mse_loss(outputs, y).item()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with size and time."""
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (each.st_size, each.st_mtime_ns) for name, each in found.items()}


def make(folder: Path | None, **changes: Any) -> Trainer:
    options = {"val_dataloader": batches(11), "run_dir": folder, **changes}
    return Trainer(**settings(network(), **options))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run that validated with averaged weights; its best is not its latest."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    make(folder, callbacks=[AveragedWeights(decay=0.5)], lr=0.1).train(seed=1)
    return folder


def test_after_training_it_measures_what_the_run_has_measured() -> None:
    """Given no folder, then with the weights at hand; counters and results stay as they were."""
    trainer = fitted(model=network(), val_dataloader=batches(11))
    before = trainer.result, trainer.global_step, bits(trainer.state_dict())
    torch.manual_seed(5)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert trainer.evaluate() == trainer.result.metrics
    outputs, loss = by_hand(trainer.model, 7)
    assert trainer.evaluate(batches(7)) == pytest.approx({"val/loss": loss})
    torch.testing.assert_close(trainer.predict(batches(7)), outputs)
    assert torch.rand(()) == drawn
    assert (trainer.result, trainer.global_step, bits(trainer.state_dict())) == before


def test_weights_are_those_that_validation_measured_unless_others_are_asked_for(run: Path) -> None:
    """Also of a trainer that keeps no average itself, has no optimizer and trains on nothing."""
    logged = make(run, callbacks=[AveragedWeights(decay=0.5)], lr=0.1).train(seed=1).metrics
    before = files(run)
    trainer = Trainer(model=network(), loss_fn=nn.MSELoss(), run_dir=run)
    assert trainer.evaluate(batches(11)) == logged
    assert trainer.evaluate(batches(11), weights="averaged") == logged
    live = trainer.evaluate(batches(11), weights="live")
    assert live != logged
    outputs, loss = by_hand(trainer.model, 11)
    assert live == pytest.approx({"val/loss": loss})
    torch.testing.assert_close(trainer.predict(batches(11), weights="live"), outputs)
    assert files(run) == before


def test_without_a_checkpoint_the_callback_at_hand_has_the_average() -> None:
    trainer = fitted(
        model=network(), val_dataloader=batches(11), callbacks=[AveragedWeights(decay=0.5)]
    )
    assert trainer.evaluate() == trainer.evaluate(weights="averaged") == trainer.result.metrics
    _, loss = by_hand(trainer.model, 11)
    assert trainer.evaluate(weights="live") == pytest.approx({"val/loss": loss})


def test_a_checkpoint_is_named_by_its_run_or_its_own_path(run: Path, tmp_path: Path) -> None:
    other = Trainer(model=network(), loss_fn=nn.MSELoss())
    [name] = [path.name for path in (run / "checkpoints").glob("step_*10")]
    expected = other.evaluate(batches(11), checkpoint=run)
    assert other.evaluate(batches(11), checkpoint=run / "checkpoints" / name) == expected
    own = Trainer(model=network(), loss_fn=nn.MSELoss(), run_dir=run)
    assert own.evaluate(batches(11), checkpoint=name) == expected


def test_what_another_checkpoint_leaves_on_the_object_that_has_trained(tmp_path: Path) -> None:
    """Its weights and nothing else; what says that it is the run's state is refused."""
    monitor = MetricMonitor(metric_name="val/loss", mode="min")
    folder = tmp_path / "run"
    # The rate is so high that the loss only rises: the first epoch's weights stay the best.
    trainer = make(folder, metric_monitor=monitor, lr=1.0)
    result = trainer.train(seed=1)
    trained, latest = bits(trainer.state_dict()["models"]), result.metrics["val/loss"]
    export(folder, to=tmp_path / "best.safetensors", checkpoint="best")
    before = (trainer.result, trainer.global_step, trainer.current_epoch, files(folder))

    at_best = trainer.evaluate(checkpoint="best") or {}
    assert at_best["val/loss"] == pytest.approx(result.best) != latest
    assert at_best["val/loss"] == pytest.approx(by_hand(trainer.model, 11)[1])
    exported = load_file(tmp_path / "best.safetensors")
    assert bits(exported) == bits(trainer.model.state_dict())
    assert before == (trainer.result, trainer.global_step, trainer.current_epoch, files(folder))
    with pytest.raises(ConfigError, match=r"weights that an evaluation has loaded from .*step_0*5"):
        trainer.state_dict()

    assert (trainer.evaluate() or {})["val/loss"] == latest  # the run's latest again
    assert bits(trainer.state_dict()["models"]) == trained
    trainer.predict(batches(7), checkpoint="best")
    trainer.train(epochs=3, seed=1)  # resumes from the latest, as a new process would
    whole = make(None, metric_monitor=monitor, lr=1.0, epochs=3)
    whole.train(seed=1)
    assert bits(trainer.state_dict()["models"]) == bits(whole.state_dict()["models"])


class Own(Trainer):
    """Evaluates on its own, once as the Trainer does."""

    def evaluate(self) -> dict[str, float]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.log("val/rows", 11.0)
        return {**(super().evaluate() or {}), "val/twice": 2 * self.model(torch.ones(1, 3)).item()}


def test_an_evaluate_of_ones_own_takes_no_arguments_and_gets_the_weights(tmp_path: Path) -> None:
    options = {"val_dataloader": batches(11), "run_dir": tmp_path / "run"}
    logged = Own(**settings(network(), **options)).train(seed=1).metrics
    assert {*logged} == {"val/loss", "val/rows", "val/twice"}
    new = Own(**settings(network(), **options))
    again: Any = new  # whose own evaluate() has no arguments
    assert new.evaluate() == again.evaluate(checkpoint="latest") == logged
    assert new.train(seed=1).complete


class Noted(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_setup(self, trainer: Trainer) -> None:
        self.events.append("setup")

    def on_validation_batch_end(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        self.events.append("batch")
        trainer.log("val/noted", batch[0].sum(), weight=1)

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.events.append("metrics")

    def on_teardown(self, trainer: Trainer) -> None:
        self.events.append("teardown")


def test_callbacks_hear_of_its_batches_and_of_nothing_that_training_decides() -> None:
    noted = Noted()
    trainer = fitted(val_dataloader=batches(11), callbacks=[noted])
    noted.events.clear()
    assert trainer.evaluate() == trainer.result.metrics
    assert noted.events == ["setup", "batch", "batch", "batch", "teardown"]


class Stuck(Callback):
    @contextmanager
    def applied(self) -> Iterator[None]:
        yield
        raise RuntimeError("stuck")


def test_what_fails_as_weights_are_swapped_back_leaves_the_trainer_usable() -> None:
    noted = Noted()
    trainer = Trainer(model=line(), loss_fn=nn.MSELoss(), callbacks=[Stuck(), noted])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stuck"):
            trainer.evaluate(batches(4), weights="averaged")
    assert (noted.events.count("teardown"), trainer.val_dataloader) == (2, None)


class Squared(Trainer):
    def on_metrics(self, metrics: dict[str, float]) -> None:
        metrics["val/squared"] = metrics["val/loss"] ** 2


def test_metrics_that_the_trainer_adds_are_there_too() -> None:
    trainer = Squared(**settings(network(), val_dataloader=batches(11)))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics == trainer.result.metrics
    assert metrics["val/squared"] == metrics["val/loss"] ** 2


class Named(Trainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        return {
            "sum": x.sum(1),
            "texts": [f"{row[0]:.3f}" for row in x],
            "batch": [batch_idx] * len(x),
        }


def test_outputs_may_have_names_and_be_no_tensors() -> None:
    trainer = Named(**settings())
    x, _ = points(10).tensors
    found = trainer.predict(batches(10))
    torch.testing.assert_close(found["sum"], x.sum(1))
    assert found["texts"] == [f"{row[0]:.3f}" for row in x]
    assert found["batch"] == [0] * 4 + [1] * 4 + [2] * 2


@pytest.mark.parametrize("batch", [points(6).tensors[0], [points(6).tensors[0]]])
def test_batches_without_targets_are_inputs(batch: Any) -> None:
    trainer = Trainer(model=line())
    torch.testing.assert_close(trainer.predict([batch]), line()(points(6).tensors[0]).detach())


class Share(IterableDataset):
    """A rank's rows, of which rank 0 has more."""

    def __init__(self, rank: int, size: int) -> None:
        self.rows = points(11).tensors[0][rank::size] if rank else points(11).tensors[0][::size]

    def __iter__(self) -> Any:
        return iter(self.rows)


LAYOUTS = [
    Parallel(),
    Parallel(dp_shard=2),
    Parallel(tensor=2, plan=SPLIT),
    Parallel(pipeline=2),
]


class Drifting(nn.Module):
    """Adds what training has made of things that no state dictionary holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.mean, self.sums, self.rate = torch.zeros(1), [torch.zeros(1)], 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.mean = self.mean + 0.2
            self.sums[0] = self.sums[0] + 0.1
            self.rate += 0.05
        return x + self.calls + self.mean + self.sums[0] + self.rate


TRAINED = [
    *((layout, network) for layout in LAYOUTS),
    (
        Parallel(expert=2, plan={"0.experts": "experts"}),
        lambda: nn.Sequential(Mixture(3), nn.Linear(3, 1)),
    ),
]


def evaluated_after_training(layout: Parallel, model: nn.Sequential, folder: Path) -> None:
    """The same object again and again, with the weights at hand and a checkpoint's."""
    trained = Trainer(
        **settings(
            nn.Sequential(*model, Drifting()),
            val_dataloader=batches(11),
            callbacks=[AveragedWeights(decay=0.5)],
            parallel=layout,
            max_steps=2,
        )
    )
    logged = trained.train(seed=1).metrics
    optimizer, state = trained.optimizer, bits(local_state(trained))
    assert trained.evaluate() == logged
    live = trained.evaluate(weights="live")
    assert live != logged
    outputs = trained.predict(batches(11), weights="live")
    loss = nn.functional.mse_loss(outputs, points(11).tensors[1]).item()
    assert live == pytest.approx({"val/loss": loss})
    assert bits(local_state(trained)) == state
    assert trained.optimizer is optimizer
    if layout in (LAYOUTS[1], LAYOUTS[3]):
        with pytest.raises(ConfigError, match="make a new Trainer with a new model and optimizer"):
            trained.train(epochs=3)
        trained.parallel = Parallel()
        with pytest.raises(ConfigError, match="says another layout now: leave it as it was"):
            trained.evaluate()
        trained.parallel = layout
        assert trained.evaluate(weights="averaged") == logged
        loaded = trained.evaluate(checkpoint=folder, weights="live")
        assert loaded == trained.evaluate(weights="live") != live


def local_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of what this rank has of the model; the shapes of what other stages have."""
    state = trainer.model.state_dict()
    return {key: local_part(value).detach().clone() for key, value in state.items()}


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it cannot be copied")


class Lengthy(Trainer):
    """Asks how long the run is, as one with a schedule does."""

    def configure(self) -> None:
        assert self.training_horizon


def everywhere(folder: Path) -> Any:
    """Evaluated and predicted by new objects, and by those that have trained."""
    for layout, model in TRAINED:
        torch.manual_seed(3)
        evaluated_after_training(layout, model(), folder)
    uncopied = fitted(model=Uncopied(3, 1), parallel=LAYOUTS[1])
    with pytest.raises(ConfigError, match=r"model is spread .*\(TypeError: it cannot be copied\)"):
        uncopied.evaluate(batches(4))
    found = []
    for layout in LAYOUTS:
        new = Trainer(model=network(), loss_fn=nn.MSELoss(), parallel=layout)
        found.append((new.evaluate(batches(11), checkpoint=folder), new.predict(batches(11))))
    metrics = Lengthy(
        model=network(), loss_fn=nn.MSELoss(), train_dataloader=batches(8), epochs=1,
        global_batch_size=4,  # which two ranks could not train with
    ).evaluate(batches(11), checkpoint=folder)  # fmt: skip
    assert metrics == found[0][0]
    alone = Trainer(model=network())
    shares = DataLoader(Share(alone.world.rank, alone.world.size), 2)
    streamed = alone.predict(shares)
    if alone.world.rank == 1:  # as the command does for an error between two runs
        assert announce_exit(1, "broken")
    else:
        with pytest.raises(PeerError, match="rank 1 failed before the ranks had met: broken"):
            alone.predict(shares)
    return found, streamed


def test_two_ranks_evaluate_and_predict_as_one_does(run: Path, ranks: Ranks) -> None:
    """Eleven rows in copies, shards, split modules and stages; a stream's batches take turns. One
    that fails afterwards ends the other, which waits for it in the next meeting. What has trained
    measures what the run has measured, as often as it is asked."""
    one = Trainer(model=network(), loss_fn=nn.MSELoss(), run_dir=run)
    metrics, outputs = one.evaluate(batches(11)), one.predict(batches(11))
    x = points(11).tensors[0]
    turns = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9])
    for found, streamed in ranks(everywhere, 2, run, limit=120):
        for of_layout, predicted in found:
            assert of_layout == pytest.approx(metrics, rel=1e-6)
            torch.testing.assert_close(predicted, outputs)
        torch.testing.assert_close(streamed, network().eval()(x[turns]).detach())


@pytest.mark.parametrize(
    ("ask", "kind", "said"),
    [
        (lambda t: t.evaluate(), ConfigError, "give evaluate() a loader"),
        (lambda t: t.evaluate([1], checkpoint="best"), ConfigError, "no run_dir to look in"),
        (lambda t: t.evaluate(object()), ConfigError, "cannot be iterated"),
        (lambda t: t.evaluate(batches(), weights="ema"), ConfigError, "weights='ema'"),
        (lambda t: t.evaluate(batches(), weights="averaged"), ConfigError, "keeps an average"),
        (lambda t: t.predict(batches(shuffle=True)), ConfigError, "shuffle=False"),
        (lambda t: t.predict(batches(10, drop_last=True)), ConfigError, "its last 2 samples"),
        (lambda t: t.predict({"a": [1], "b": [1]}), ConfigError, "predict one of them"),
        (lambda t: t.predict(), ConfigError, "give predict() a loader"),
    ],
)
def test_what_cannot_be_is_said(ask: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said.replace("(", r"\(").replace(")", r"\)")):
        ask(Trainer(model=line(), loss_fn=nn.MSELoss()))


class Summing(Trainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0].sum()


def test_an_output_that_is_not_one_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(\) for a batch of 4 samples"):
        Summing(**settings()).predict(batches(10))


class Changing(Trainer):
    """In its second batch it returns other outputs than before, or fails."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and self.loss_fn is None:
            raise ValueError("broken")
        return dict.fromkeys("ab"[batch_idx:], batch[0])


def test_each_batch_has_the_same_outputs() -> None:
    """Given an error in a batch, its note names the batch."""
    with pytest.raises(DataError, match="'b' for batch 1, and 'a', 'b' before"):
        Changing(model=line(), loss_fn=nn.MSELoss()).predict(batches(8))
    with pytest.raises(ValueError, match="broken") as caught:
        Changing(model=line()).predict(batches(8))
    assert caught.value.__notes__[0].startswith("in batch 1 of the prediction, rank 0: ")


def test_weights_of_another_model_are_refused(run: Path) -> None:
    with pytest.raises(MismatchError, match="model"):
        Trainer(model=line(), loss_fn=nn.MSELoss()).evaluate(batches(4), checkpoint=run)


class Within(Callback):
    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        trainer.evaluate(checkpoint="best")


def test_within_a_run_it_takes_no_arguments() -> None:
    with pytest.raises(ConfigError, match="within a run takes no arguments"):
        fitted(callbacks=[Within()], val_dataloader=batches(4))


def test_datasets_of_one_tensor_are_predicted() -> None:
    x, _ = points(6).tensors
    found = Trainer(model=line()).predict(DataLoader(TensorDataset(x), 4))
    torch.testing.assert_close(found, line()(x).detach())


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scale


class Annealing(Callback):
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        trainer.model.scale = 1.0 + trainer.current_epoch


def test_what_training_has_changed_of_a_model_comes_with_its_weights(tmp_path: Path) -> None:
    options = {"callbacks": [Annealing()], "val_dataloader": batches(7), "run_dir": tmp_path}
    logged = fitted(model=Scaled(3, 1), lr=1e-3, **options).result.metrics
    new = Trainer(model=Scaled(3, 1), loss_fn=nn.MSELoss(), run_dir=tmp_path)
    assert new.evaluate(batches(7)) == logged
    assert new.model.scale == 2.0


class Configured(Trainer):
    """Makes another model each time that it is asked."""

    def configure(self) -> None:
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


def test_what_configure_makes_is_made_once_and_keeps_the_weights_that_were_loaded(
    tmp_path: Path,
) -> None:
    options = {"loss_fn": nn.MSELoss(), "train_dataloader": batches(), "epochs": 1}
    Configured(**options, progress=False, run_dir=tmp_path / "run").train(seed=1)
    trainer = Configured(loss_fn=nn.MSELoss())
    loaded = trainer.evaluate(batches(7), checkpoint=tmp_path / "run")
    outputs, loss = by_hand(trainer.model, 7)
    assert loaded == pytest.approx({"val/loss": loss})
    torch.testing.assert_close(trainer.predict(batches(7)), outputs)
    trained = Configured(**options, progress=False, val_dataloader=batches(7))
    trained.train(seed=2)
    assert trained.evaluate() == trained.result.metrics


class Slow(Trainer):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def evaluate_slowly() -> None:
    leave_at_once_on_signals()  # as a command does
    Slow(model=line(), loss_fn=nn.MSELoss()).evaluate(batches(8))


def test_a_signal_to_ranks_that_evaluate_ends_them_at_once(ranks: Ranks) -> None:
    ended = ranks.outcomes(evaluate_slowly, 2)
    assert [one.code for one in ended] == [75, 75]
    assert all(one.seconds < 10 for one in ended)
