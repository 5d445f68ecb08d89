"""What a Trainer is given by mistake: each a clear error that says what, where and what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Sampler

from paceline import Callback, CheckpointPolicy, MetricMonitor, Parallel, Resume, Trainer
from paceline.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LossError,
    MetricError,
    MismatchError,
    NonFiniteError,
    PacelineError,
)
from paceline.testing import rows
from paceline.trainer import checks
from paceline.trainer.elsewhere import ELSEWHERE, EVENTS_ELSEWHERE, METHODS_ELSEWHERE
from small import batches, checkpoints, fitted, line, message, points, same, settings, weights, wide


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with a digest of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Keywords and settings


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [
        ("criterion", "loss_fn"),
        ("scheduler", "lr_scheduler"),
        ("max_epochs", "epochs"),
        ("device", "the device follows from the machine"),
        ("save_last_k", "CheckpointPolicy(keep_last=...)"),
        ("devices", "`paceline train RECIPE --nproc N`, or torchrun"),
        ("val_check_interval", "validate_every, in optimizer steps"),
        ("warmup_steps", "lr_scheduler=WarmupCosine("),
        ("per_device_train_batch_size", "the batch_size of train_dataloader"),
        ("mixed_precision", "here it is precision"),
        ("max_iters", "here it is max_steps"),
        ("validation_split", "val_dataloader=DataLoader(...)"),
        ("epoch", "did you mean 'epochs'"),
        ("fnord", "no such setting"),
    ],
)
def test_a_keyword_of_another_system_names_ours(keyword: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(**settings(**{keyword: 1}))
    assert f"{keyword}: " in str(caught.value)
    assert ours in str(caught.value)


def test_unknown_keywords_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError, match=r"criterion: .*\n.*scheduler: "):
        Trainer(criterion=1, scheduler=2)


def test_each_name_of_the_table_is_one_that_a_trainer_does_not_have() -> None:
    """An entry for a keyword, a method or an event of ours would never be read."""
    with pytest.raises(ConfigError) as caught:
        Trainer(**dict.fromkeys(ELSEWHERE, 1))
    assert str(caught.value).count("here it is") == len(ELSEWHERE)
    assert [name for name in METHODS_ELSEWHERE if hasattr(Trainer, name)] == []
    assert [name for name in EVENTS_ELSEWHERE if hasattr(Callback, name)] == []


def test_a_model_given_to_fit_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"seed=Linear.*: expected a whole number\. Models, "):
        Trainer(**settings()).fit(line())  # pyright: ignore[reportArgumentType]
    trainer = Trainer(**settings())
    trainer.fit(np.int64(3))  # pyright: ignore[reportArgumentType]
    assert trainer.seed == 3


CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.test(), "Trainer has no test: here it is evaluate(loader)."),
    (lambda t: t.validate(line(), [1]), "Trainer has no validate: here it is evaluate(), or"),
    (lambda t: t.fit(line(), batches()), "fit(...): too many positional arguments.\nModels, opti"),
    (lambda t: t.fit(*points().tensors), "DataLoader(TensorDataset(x, y), batch_size)"),
    (lambda t: t.fit(epochs=3, x=1), "epochs: here it is Trainer(epochs=...), or train(epochs="),
    (lambda t: t.fit(optimizer=3), "optimizer: here it is Trainer(optimizer=...)"),
    (lambda t: t.fit(ckpt_path="last"), "ckpt_path: here it is nothing: a run resumes by itself"),
    (lambda t: t.train(max_epochs=3), "max_epochs: here it is epochs"),
    (lambda t: t.train(max_steps=3), "max_steps: here it is Trainer(max_steps=...)"),
    (lambda t: t.train(fnord=3), "train(...) got what it does not have:\n  fnord: no such setting"),
    (lambda t: t.train(line()), "is a model, which is given to Trainer(model=...)"),
    (lambda t: t.train(*points().tensors), "train_dataloader: a Tensor is no loader: give DataL"),
    (lambda t: t.evaluate(line(), batches()), "evaluate(...): too many positional arguments.\nIt"),
    (lambda t: t.evaluate(dataloaders=[]), "dataloaders: here it is loader, a DataLoader"),
    (lambda t: t.evaluate(points().tensors[0]), "val_dataloader: a Tensor is no loader"),
    (lambda t: t.evaluate(ckpt_path="best"), "ckpt_path: here it is checkpoint."),
    (lambda t: t.predict(verbose=0), "verbose: here it is progress=... of the Trainer"),
    (lambda t: t.predict(line()), "is a model, which is given to Trainer(model=...)"),
    (lambda t: t.predict(np.ones((4, 3))), "a ndarray is no loader"),
    (lambda t: t.predicting(batch_size=4), "batch_size: here it is the batch_size of the loader"),
    (lambda t: t.log("a", 1.0, on_step=True), "on_step: here it is nothing: what is logged is in"),
    (lambda t: t.log("a", 1.0, prog_bar=True), "prog_bar: here it is nothing: the progress shows"),
    (lambda t: t.log({"a": 1.0}), "missing a required argument: 'value'.\nIt is log(name, value,"),
    (lambda t: t.log_dict({"a": 1.0}, sync_dist=True), "sync_dist: here it is nothing: each value"),
    (lambda t: t.log("a", 1.0), "this works within a run"),
    (lambda t: t.backward(torch.ones(())), "this works within a run"),
    (lambda t: t.result, "a Trainer's result is known once train() has returned"),
    (lambda t: t.save_checkpoint("x"), "Trainer has no save_checkpoint: here it is checkpoint(), "),
    (lambda t: t.optimizers(), "here it is optimizer, or named_optimizers()"),
    (lambda t: type(t).load_from_checkpoint("x"), "here it is paceline.recipe.load_model(RUN)"),
    (lambda t: t.is_global_zero, "here it is world.is_main"),
    (lambda t: t(points().tensors[0]), "a Trainer is no model: call trainer.model(inputs), or pre"),
]


@pytest.mark.parametrize(("call", "text"), CALLS, ids=range(len(CALLS)))
def test_a_call_by_another_system_s_habit_is_told_ours(
    call: Callable[[Any], Any], text: str
) -> None:
    """Each ends with one message, and none with Python's own TypeError or AttributeError."""
    with pytest.raises(ConfigError) as caught:
        call(Trainer(**settings()))
    assert text in str(caught.value)


def test_a_name_that_is_answered_is_not_there() -> None:
    """`hasattr`, `dir` and a default see no such name, and a subclass may have it as its own."""
    trainer = Trainer(**settings())
    assert not hasattr(trainer, "test")
    assert not hasattr(Trainer, "test")
    assert getattr(trainer, "state", 3) == 3
    assert {"test", "optimizers", "result"}.isdisjoint(dir(trainer))
    own = type("Own", (Trainer,), {"test": lambda self: 5, "history": property(lambda self: 7)})
    mine: Any = own(**settings())
    mine.metrics = {"a": 1}
    assert (mine.test(), mine.history, mine.metrics) == (5, 7, {"a": 1})
    assert {"test", "history", "metrics"} <= set(dir(mine))
    assert mine.fit().stopped_by == "epochs"


def test_an_error_of_the_user_s_own_in_a_call_stays_as_it_is() -> None:
    def fail(*_: Any) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        Trainer(**settings(loss_fn=fail)).train()


ANY = torch.optim.SGD(line().parameters(), lr=1.0)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs=0: expected at least 1"),
    ({"epochs": 1.5}, "epochs=1.5: expected a whole number"),
    ({"epochs": True}, "epochs=True: expected a whole number"),
    ({"epochs": None}, "epochs: say where the run ends"),
    ({"max_steps": -1}, "max_steps=-1: expected at least 1"),
    ({"epoch_length": 0}, "epoch_length=0: expected at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: expected at least 1"),
    ({"log_every": 0}, "log_every=0: expected at least 1"),
    ({"log_every": "50"}, "log_every='50': expected a whole number"),
    ({"validate_every": 0}, "validate_every=0: expected 'epoch' or"),
    ({"validate_every": True}, "validate_every=True: expected 'epoch' or"),
    ({"validate_every": "step"}, "validate_every='step': expected 'epoch' or"),
    ({"max_grad_norm": 0}, "max_grad_norm=0: expected a positive norm"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: expected a positive norm"),
    ({"max_grad_norm": "1"}, "max_grad_norm='1': expected a positive norm"),
    ({"precision": "int8"}, "precision='int8': expected one of fp32, bf16, fp16, fp8"),
    ({"precision": 16}, "precision=16: expected one of fp32, bf16, fp16, fp8"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore': expected one of raise, stop, skip"),
    (
        {"lr_scheduler_interval": "steps"},
        "expected one of step, epoch, metric; did you mean 'step'",
    ),
    ({"compile": "yes"}, "compile='yes': expected True, False or 'blocks'"),
    ({"progress": None}, "progress=None: expected True or False"),
    ({"early_stop": 0}, "early_stop=0: expected at least 1"),
    ({"early_stop": 3}, "early_stop: it counts validations"),
    ({"metric_monitor": MetricMonitor()}, "metric_monitor: nothing is ever validated"),
    ({"metric_monitor": "val/loss"}, "expected a MetricMonitor(metric_name=..., mode=...)"),
    ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "give one of them"),
    ({"on_nonfinite": "rewind"}, "it goes back to a checkpoint, and none is written"),
    ({"checkpoint": True}, "checkpoint=True: expected a CheckpointPolicy(...)"),
    ({"checkpoint": CheckpointPolicy}, "checkpoint=the class CheckpointPolicy: expected a"),
    ({"parallel": 2}, "parallel=2: expected a Parallel(...)"),
    ({"callbacks": [Callback]}, "the class Callback is no Callback; make one of it: Callback(...)"),
    ({"callbacks": 3}, "callbacks: 3 is no Callback"),
    ({"loggers": ["wandbb"]}, "'wandbb'; did you mean 'wandb'?"),
    ({"loggers": [3]}, "loggers: 3 is no Sink"),
    (
        {"model": nn.Linear, "optimizer": torch.optim.SGD(line().parameters())},
        "the class Linear is not a torch.nn.Module; make one of it",
    ),
    (
        {"model": [line()], "optimizer": torch.optim.SGD(line().parameters())},
        "is not a torch.nn.Module",
    ),
    ({"loss_fn": torch.nn.MSELoss}, "the class MSELoss is no loss; make one of it: MSELoss(...)."),
    ({"optimizer": torch.optim.SGD}, "the class SGD is not a torch optimizer; make one of it"),
    ({"optimizer": None}, "there is no optimizer"),
    ({"lr_scheduler": "cosine"}, "lr_scheduler: 'cosine' is not a torch LRScheduler"),
    ({"loss_fn": "mse"}, "loss_fn: 'mse' cannot be called"),
    ({"loss_fn": None}, "the default training_step computes loss_fn(model(inputs), targets)"),
    ({"train_dataloader": None}, "train_dataloader: there is nothing to train on"),
    ({"train_dataloader": points()}, "train_dataloader: "),
    ({"train_dataloader": iter(batches())}, "which can be read only once"),
    ({"val_dataloader": (b for b in batches())}, "which can be read only once"),
    ({"val_dataloader": object()}, "cannot be iterated"),
    ({"val_dataloader": [batches(), batches()]}, "val_dataloader={'near': ..., 'far': ...}"),
    ({"train_dataloader": {"a": batches()}}, "training reads one: join the datasets"),
    ({"model": line().half(), "precision": "fp16"}, "model.weight (float16), model.bias (float16)"),
    ({"resume": "must"}, "resume='must': a run without run_dir has nothing to resume from"),
    ({"resume": "lates"}, "resume='lates': there is no such checkpoint, and no such mode"),
    ({"resume": Resume(init_from="/nowhere")}, "init_from='/nowhere': there is no such file"),
]


@pytest.mark.parametrize(("changes", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_a_setting_that_cannot_work(changes: dict[str, Any], text: str) -> None:
    assert text in message(ConfigError, **changes)


def test_all_mistakes_are_said_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    text = message(
        ConfigError,
        epochs=0,
        precision="int8",
        early_stop=2,
        loss_fn=None,
        callbacks=[Callback],
        optimizer=torch.optim.SGD(line().parameters(), lr=1.0),
        run_dir=tmp_path / "run",
    )
    found = ("epochs=0", "precision=", "early_stop", "loss_fn", "callbacks", "in no optimizer")
    assert [part for part in found if part not in text] == []
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_configure_and_what_it_makes_after() -> None:
    made: list[str] = []

    class Makes(Trainer):
        def configure(self) -> None:
            made.append("model")
            self.model = line()
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.loss_fn = nn.MSELoss()
            self.train_dataloader = self.loader

    def run(loader: Any = None, **changes: Any) -> Any:
        trainer = Makes(progress=False, **{"epochs": 1, **changes})
        trainer.loader = loader
        return trainer.fit()

    with pytest.raises(ConfigError, match="epochs=0"):
        run(epochs=0)
    assert made == []
    with pytest.raises(ConfigError, match="nothing to train on"):
        run()
    assert run(batches()).complete


def test_a_seed_by_position_is_told_its_name() -> None:
    with pytest.raises(ConfigError, match=r"a seed is given by name, train\(seed=42\)"):
        Trainer(**settings()).train(42)  # pyright: ignore[reportArgumentType]


def test_every_count_of_the_constructor_is_checked() -> None:
    """A new whole-number setting that nobody checks would fail late."""
    import inspect

    annotated = {
        name
        for name, parameter in inspect.signature(Trainer).parameters.items()
        if str(parameter.annotation) in ("int", "int | None")
    }
    assert annotated == set(checks._COUNTS)


def test_a_world_that_does_not_fit_the_layout() -> None:
    assert "start 4 processes" in message(ConfigError, parallel=Parallel(dp_replicate=4))
    both = Parallel(dp_replicate=2, dp_shard=3)
    assert "dp_shard=3 does not fit 1 process: start 6" in message(ConfigError, parallel=both)
    assert "start a multiple of 2" in message(ConfigError, parallel=Parallel(dp_shard=2))


def test_what_sharded_models_do_not_have_yet_is_refused() -> None:
    parallel = Parallel(dp_shard=2, cpu_offload=True)
    text = message(ConfigError, parallel=parallel, precision="fp16")
    assert "does not exist yet with parallel.cpu_offload" in text


# Parameters


def test_a_parameter_in_no_optimizer_is_named() -> None:
    model = nn.Sequential(line(), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    text = message(ConfigError, model=model, optimizer=optimizer)
    assert "in no optimizer: model.1.weight, model.1.bias" in text
    assert "requires_grad_(False)" in text
    model[1].requires_grad_(False)
    assert fitted(model=model, optimizer=optimizer).result.complete


def test_a_parameter_in_two_optimizers_is_named() -> None:
    model = line()
    both = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name in "ab"}
    text = message(ConfigError, model=model, optimizer=both)
    assert "in more than one optimizer or group: model.weight, model.bias" in text


def test_a_parameter_of_no_model_is_counted() -> None:
    model = line()
    optimizer = torch.optim.SGD([*model.parameters(), *line().parameters()], lr=0.1)
    assert "an optimizer has 2 parameters that no model of this trainer has" in message(
        ConfigError, model=model, optimizer=optimizer
    )


def test_two_components_of_one_name_are_refused() -> None:
    trainer = Trainer(**settings())
    trainer.others = {"model": line()}
    with pytest.raises(ConfigError, match="two components are called 'model'"):
        trainer.fit()


def test_a_part_of_a_model_under_a_second_name_is_no_second_model(tmp_path: Path) -> None:
    model = nn.Sequential(line(), nn.Linear(1, 1))
    trainer = Trainer(**settings(model=model, run_dir=tmp_path))
    trainer.head, trainer.again = model[1], model
    trainer.fit()
    assert list(trainer.named_models()) == ["model"]
    assert trainer.head is model[1]


# Losses and logged values


class Returns(Trainer):
    """Returns what is made of the true loss."""

    make: Any

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return type(self).make(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda loss: None, "training_step returned nothing: return the mean loss"),
        (lambda loss: loss.item(), "of type float; it returns the mean loss"),
        (lambda loss: loss.backward(), "The loop calls backward() and the optimizer"),
        (lambda loss: (loss, 1), "of type tuple"),
        (lambda loss: loss.detach(), "a loss without a gradient"),
        (lambda loss: loss.backward() or loss, "Does training_step call backward() itself? It ret"),
        (
            lambda loss: loss.backward(retain_graph=True) or loss,
            "leaves gradients on model.weight, ",
        ),
        (lambda loss: loss * torch.ones(3), "a tensor of shape (3,); the loss is one number"),
        (lambda loss: {"optimizer": None}, "returned nothing for 'optimizer'"),
        (lambda loss: {"optimizer": loss.detach()}, "without a gradient for 'optimizer'"),
        (lambda loss: {}, "no loss"),
        (lambda loss: {"mse": loss}, "with 'mse', and the loop takes the loss from its 'loss'"),
        (lambda loss: loss.backward() or loss.detach(), "training_step leaves gradients on"),
    ],
)
def test_a_loss_that_is_none(make: Any, text: str) -> None:
    trainer = type("Mine", (Returns,), {"make": staticmethod(make)})
    said = message(LossError, trainer)
    assert text in said
    assert "in step 1, batch 0" in said


@pytest.mark.parametrize("what", ["optimizer", "lr_scheduler"])
def test_a_step_of_its_own_in_training_step(what: str) -> None:
    """Refused in the first window; afterwards nothing is left on the optimizer."""

    class Steps(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            getattr(self, what).step()
            return loss

    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    made = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    said = message(LossError, Steps, **made)
    assert "itself, and the loop does so too: leave it out, and return the loss" in said
    assert "override step(window) with self.backward(loss) and self.optimizer_step()" in said
    assert not optimizer._optimizer_step_pre_hooks
    own = type("Own", (Steps,), {"step": own_step})  # one's own step() may
    assert fitted(own, **made, resume="never").result.complete


def test_a_step_of_its_own_in_a_later_batch_is_refused_too() -> None:
    """At batch 7 of 10; a hook may step, and the loop's own steps are as without the guard."""

    class Later(Trainer):
        at: int | None = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == self.at:
                self.optimizer.step()
            return loss

        def on_step_end(self, metrics: dict[str, Any]) -> None:
            self.optimizer.zero_grad()
            self.optimizer.step()  # without gradients, which changes nothing

    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps the step
    before = optimizer.step
    trainer = Later(**settings(model, optimizer=optimizer, lr_scheduler=scheduler))
    trainer.at = 6
    with pytest.raises(LossError, match="steps the optimizer itself, and the loop does so too"):
        trainer.fit()
    assert trainer.global_step == 6
    assert optimizer.step is before  # nothing is left of the guard
    optimizer.step()

    expected = line()
    by_hand = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9)
    x, y = points().tensors
    for k in range(10):
        rows = slice(k % 5 * 4, k % 5 * 4 + 4)
        by_hand.zero_grad()
        nn.functional.mse_loss(expected(x[rows]), y[rows]).backward()
        by_hand.step()
    assert torch.equal(fitted(Later).model.weight, expected.weight)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_clearing_in_a_later_window_is_refused_too(what: str) -> None:
    """In the second epoch; a parameter that no loss reached clears nothing."""

    class Later(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3 and self.window.position == 1:
                getattr(self, what).zero_grad()
            return super().training_step(batch, batch_idx)

    class Skips(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model.weight.sum() if batch_idx % 2 else self.model.bias.sum()

    said = message(LossError, Later, gradient_accumulation_steps=2, epochs=2)
    assert "the gradients of the window's micro-batches before this one were cleared" in said
    assert "leave zero_grad() out of training_step and of hooks" in said
    assert fitted(Later).result.complete  # with one micro-batch a window it clears nothing
    assert fitted(Skips, gradient_accumulation_steps=2).result.complete


@pytest.mark.parametrize("accumulation", [1, 2])
def test_clearing_gradients_within_a_window_is_refused(accumulation: int) -> None:
    """It would drop the micro-batch before; with one a window it drops nothing."""

    class Clears(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.optimizer.zero_grad()
            return super().training_step(batch, batch_idx)

    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = {"model": model, "optimizer": optimizer, "gradient_accumulation_steps": accumulation}
    if accumulation == 1:
        assert fitted(Clears, **made).result.complete
    else:
        assert "leave zero_grad() out" in message(LossError, Clears, **made)
    assert "zero_grad" not in vars(optimizer)


def own_step(self: Trainer, window: Any) -> None:
    for batch, batch_idx in window:
        self.backward(Trainer.training_step(self, batch, batch_idx))
    self.optimizer.step()


def test_a_loss_of_one_element_is_one_number() -> None:
    trainer = type("Mine", (Returns,), {"make": staticmethod(lambda loss: loss.reshape(1, 1))})
    assert same(weights(fitted(trainer)), weights(fitted()))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    trainer = type("Mine", (Returns,), {"make": staticmethod(lambda loss: loss * torch.inf)})
    text = message(NonFiniteError, trainer, run_dir=tmp_path)
    assert "step 1 is not finite" in text
    assert "samples [0, 1, 2, 3]" in text
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "weight"),
    [("high", None), (None, None), (torch.ones(2), None), (1j, None), (1.0, "many"), ([1.0], None)],
)
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_logged_value_that_is_no_number(value: Any, weight: Any, where: str) -> None:
    class Logs(Trainer):
        pass

    def step(self: Trainer, batch: Any, batch_idx: int) -> Any:
        self.log("mine", value, weight=weight)

    setattr(Logs, where, step)
    assert "log('mine', ...)" in message(MetricError, Logs, val_dataloader=batches(8))


@pytest.mark.parametrize("name", ["step", "epoch", "samples", "items"])
def test_a_logged_name_that_every_row_has(name: str) -> None:
    class Logs(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(name, 1.0)

    assert "rename yours" in message(MetricError, Logs, val_dataloader=batches(8))


# The disk: nothing that is there is lost


@pytest.mark.parametrize("blocked", ["run", "run/checkpoints", "run/metrics.jsonl", "run/run.json"])
def test_a_run_folder_that_cannot_be_written(blocked: str, tmp_path: Path) -> None:
    """A file stands where a folder should be, or a folder where a file should."""
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        path.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(PacelineError) as caught:
        fitted(run_dir=tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before


def test_a_run_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"run_dir.*Permission denied"):
        fitted(run_dir=tmp_path / "run")


def test_a_checkpoint_of_another_model_lists_names_and_shapes(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path)
    before = contents(tmp_path)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        fitted(model=model, run_dir=tmp_path, epochs=3)
    text = str(caught.value)
    for part in ("missing from the checkpoint: 0.weight", "only in the checkpoint: weight"):
        assert part in text
    with pytest.raises(
        MismatchError, match=r"weight: float32\[1, 3\] in the checkpoint, float32\[1, 4\]"
    ):
        fitted(model=line(4), train_dataloader=wide(20), run_dir=tmp_path, epochs=3)
    assert same(model.state_dict(), untouched)
    after = contents(tmp_path)
    for name in before:
        assert name in ("run.json",) or after[name] == before[name], name


def test_a_checkpoint_whose_optimizer_does_not_fit_changes_no_weight(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path)
    model = line()
    groups = [{"params": [model.bias]}, {"params": [model.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match="optimizer 'optimizer' does not fit"):
        fitted(model=model, optimizer=optimizer, run_dir=tmp_path, epochs=3)
    assert same(model.state_dict(), before)


def test_a_run_that_fails_keeps_the_rows_and_checkpoints_it_has(tmp_path: Path) -> None:
    class Fails(Trainer):
        def on_step_end(self, metrics: dict[str, Any]) -> None:
            if self.global_step == 8:
                raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fitted(Fails, run_dir=tmp_path, log_every=1)
    assert checkpoints(tmp_path) == ["step_00000005"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7]  # an epoch's, too


def test_no_space_for_a_checkpoint_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.checkpoint.files import Disk

    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 10)
    steps: list[int] = []
    trainer = Trainer(**settings(run_dir=tmp_path))
    trainer.on_train_start = lambda: steps.append(1)
    with pytest.raises(CheckpointError, match="are free"):
        trainer.fit()
    assert steps == []


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("train_step", "training_step"),
        ("compute_loss", "loss"),
        ("configure_optimizers", "configure"),
        ("validation_stpe", "validation_step"),
        ("_train_epoch", "epoch"),
        ("eval_forward", "validation_step"),
        ("on_epoch_begin", "on_train_epoch_start"),
        ("prepare_data", "configure"),
        ("on_test_begin", "on_validation_start"),
        ("teardown", "on_teardown"),
    ],
)
def test_a_method_of_another_system_s_name_is_told_ours(name: str, ours: str) -> None:
    """Given a method that means one of ours, then it is refused, unless another one calls it."""
    kind = type("Migrated", (Trainer,), {name: lambda self, *_: torch.zeros(())})
    assert f"Migrated defines {name}, which nothing calls; here it is {ours}." in message(
        ConfigError, kind
    )


def test_a_callback_s_and_an_attribute_s_names_of_other_systems_are_told_ours() -> None:
    kind = type("Migrated", (Trainer,), {"val_dataloader": lambda self: batches()})
    names = ("after_train_iter", "set_model", "setup")
    callback = type("Hook", (Callback,), dict.fromkeys(names, lambda self: None))
    said = message(ConfigError, kind, callbacks=[callback()])
    assert "Migrated defines the method val_dataloader, which nothing calls" in said
    assert "Hook defines after_train_iter, which nothing calls; here it is on_train_batch" in said
    assert "Hook defines set_model, which nothing calls; here it is on_setup" in said
    assert "Hook defines setup, which nothing calls; here it is on_setup" in said


@pytest.mark.parametrize("base", [Trainer, Callback])
def test_another_system_s_hook_is_told_the_event_and_not_the_nearest_word(base: type) -> None:
    """`on_step_begin` is nearest to `on_step_end`, which would run at the other end of a step."""
    hooks = {
        "on_train_batch_begin": "on_train_batch_start",
        "on_step_begin": "on_train_batch_start",
        "on_validation_epoch_end": "on_validation_end",
        "on_epoch_end": "on_train_epoch_end",
    }
    theirs = type("Theirs", (base,), dict.fromkeys(hooks, lambda self, *_: None))
    if base is Trainer:
        said = message(ConfigError, theirs)
    else:
        said = message(ConfigError, callbacks=[theirs()])
    for name, ours in hooks.items():
        assert f"Theirs defines {name}, which is no event; here it is {ours}." in said


class Helped(Trainer):
    def compute_loss(self, batch: Any) -> torch.Tensor:
        return self.loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.compute_loss(batch)


def test_a_helper_keeps_its_name() -> None:
    assert fitted(Helped).global_step == 10


class Endless(Sampler):
    """Orders that follow each other, as samplers for runs of so many steps have them."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(20)


def test_an_endless_sampler_is_refused_before_it_fills_the_memory() -> None:
    loader = batches(sampler=Endless())
    assert "Endless yields more than 10080" in message(DataError, train_dataloader=loader)
