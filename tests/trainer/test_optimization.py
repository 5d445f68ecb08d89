"""Accumulation, clipping, precision, compilation and schedulers: the mathematics of a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Sampler

from paceline import Callback, MetricMonitor, Trainer, Window
from paceline.errors import ConfigError, MetricError
from paceline.world.dtensors import clip_gradients
from small import batches, fitted, line, points, same, settings, step_rows, weights


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_accumulation_equals_the_large_batch_short_window_included(size: int) -> None:
    # 23 rows in windows of 10: the last window has 3 rows, in micro-batches of unequal size
    large = fitted(train_dataloader=batches(23, 10))
    small = fitted(train_dataloader=batches(23, size), gradient_accumulation_steps=10 // size)
    assert small.global_step == large.global_step == 6
    assert close(weights(small), weights(large))


def test_global_batch_size_sets_the_accumulation() -> None:
    large = fitted(train_dataloader=batches(23, 10))
    assert close(
        weights(fitted(train_dataloader=batches(23, 5), global_batch_size=10)), weights(large)
    )
    with pytest.raises(ConfigError, match="multiple of 4 x 1 = 4"):
        fitted(train_dataloader=batches(23, 4), global_batch_size=10)


class Masked(Trainer):
    """Items are the entries that a mask leaves, unequally many in each row."""

    def count_items(self, batch: Any) -> Any:
        return batch[2].sum()

    def loss(self, batch: Any) -> torch.Tensor:
        x, y, mask = batch
        return ((self.model(x) - y) ** 2)[mask].mean()


def test_windows_are_means_over_items_as_the_trainer_counts_them() -> None:
    x, y = points(24).tensors
    mask = (torch.arange(24) % 5 != 0)[:, None]
    data = torch.utils.data.TensorDataset(x, y, mask)
    large = fitted(Masked, train_dataloader=DataLoader(data, 8))
    small = fitted(Masked, train_dataloader=DataLoader(data, 2), gradient_accumulation_steps=4)
    assert close(weights(small), weights(large))
    assert small.progress.items == 2 * mask.sum()


def test_accumulation_goes_on_after_a_validation() -> None:
    """With an epoch shorter than the loader, each epoch has as many steps as the first."""
    steps: list[int] = []
    trainer = Trainer(
        **settings(
            train_dataloader=batches(80, 2),
            val_dataloader=batches(8),
            epoch_length=20,
            epochs=3,
            gradient_accumulation_steps=4,
        )
    )
    trainer.on_train_epoch_end = lambda: steps.append(trainer.global_step)
    trainer.fit()
    assert steps == [5, 10, 15]


class CountsClears(torch.optim.SGD):
    """Has a `zero_grad` of its own, which leaves zeros as torch once did."""

    clears = 0

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.clears += 1
        super().zero_grad(set_to_none=False)


def test_gradients_go_before_each_window_and_after_each_step_by_an_optimizers_own_zero_grad() -> (
    None
):
    """Torch's own leaves None; one that is overridden, or put on the object, is called."""
    model = line()
    plain = fitted(model=model)
    assert plain.global_step == 10
    assert all(p.grad is None for p in model.parameters())
    model = line()
    own = fitted(model=model, optimizer=CountsClears(model.parameters(), lr=0.05, momentum=0.9))
    assert own.optimizer.clears == 2 * 10
    assert [p.grad.abs().sum().item() for p in model.parameters()] == [0, 0]
    assert same(weights(own), weights(plain))
    model, calls = line(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    clear = optimizer.zero_grad
    optimizer.zero_grad = lambda: (calls.append(1), clear())
    fitted(model=model, optimizer=optimizer)
    assert len(calls) == 2 * 10


def test_clipping_is_that_of_torch(tmp_path: Path) -> None:
    trainer = fitted(max_grad_norm=0.3, epochs=1, run_dir=tmp_path, log_every=1)
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    norms: list[float] = []
    for x, y in batches():
        nn.functional.mse_loss(model(x), y).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(trainer.model.weight, model.weight)
    assert [row["grad_norm"] for row in step_rows(tmp_path)] == norms  # before clipping
    assert max(norms) > 0.3


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words, self.line = nn.Embedding(5, 3, sparse=sparse), line()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.words(x).mean(1))


@pytest.mark.parametrize("changes", [{"max_grad_norm": 0.1}, {"on_nonfinite": "skip"}])
def test_sparse_gradients_are_clipped_and_checked_as_dense_ones(changes: dict[str, Any]) -> None:
    """By hand with a dense embedding, and words that a batch has more than once."""
    x, y = torch.arange(24).reshape(8, 3) % 5, points(8).tensors[1]
    by_hand = Words(sparse=False)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for i in range(0, 8, 2):
        optimizer.zero_grad()
        nn.functional.mse_loss(by_hand(x[i : i + 2]), y[i : i + 2]).backward()
        if "max_grad_norm" in changes:
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
    model = Words(sparse=True)
    fitted(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=DataLoader(torch.utils.data.TensorDataset(x, y), 2),
        epochs=1,
        **changes,
    )
    assert close(model.state_dict(), by_hand.state_dict())


def test_clipping_is_no_part_of_a_graph_and_takes_several_dtypes() -> None:
    """Gradients that are differentiated again themselves, in two precisions."""
    clipped: list[list[torch.Tensor]] = []
    for clip in (clip_gradients, torch.nn.utils.clip_grad_norm_):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, dtype=d)) for d in (torch.float32, torch.double)]
        with warnings.catch_warnings(action="ignore"):  # of the cycle that these gradients make
            sum(p.pow(3).sum() for p in parameters).backward(create_graph=True)
        gradients = [p.grad for p in parameters if p.grad is not None]
        graphs = [gradient.grad_fn for gradient in gradients]
        clip(parameters, 0.3)
        assert [gradient.grad_fn for gradient in gradients] == graphs
        assert all(graph is not None for graph in graphs)
        clipped.append([gradient.detach() for gradient in gradients])
        for p in parameters:
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*clipped, strict=True))


class KeepsDtypes(Callback):
    """Notes what the loss and the first layer's output are made of."""

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()
        self._hook: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        self._hook = trainer.model.register_forward_hook(
            lambda module, inputs, output: self.seen.add(output.dtype)
        )

    def on_teardown(self, trainer: Trainer) -> None:
        self._hook.remove()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision(precision: str, dtype: torch.dtype) -> None:
    watch = KeepsDtypes()
    x, y = points().tensors
    trainer = fitted(
        precision=precision, callbacks=[watch], epochs=30, val_dataloader=batches(), max_grad_norm=9
    )
    assert watch.seen == {dtype}  # in training and in validation
    assert trainer.model.weight.dtype == torch.float32
    assert nn.functional.mse_loss(trainer.model(x), y) < 1e-2


def scale(trainer: Trainer, value: float, grows_every: int = 2000) -> None:
    """Sets the loss scale, which begins too large for these data, and how soon it doubles."""
    state = trainer.optimization.scaler.state_dict()
    state.update(scale=value, growth_interval=grows_every)
    trainer.optimization.scaler.load_state_dict(state)


def test_scaled_gradients_are_unscaled_before_anybody_looks() -> None:
    norms: dict[str, list[float]] = {"fp16": [], "fp32": []}
    for precision, seen in norms.items():
        trainer = Trainer(**settings(precision=precision, epochs=1))
        trainer.on_before_optimizer_step = lambda optimizer, seen=seen: seen.append(
            optimizer.param_groups[0]["params"][0].grad.norm().item()
        )
        if precision == "fp16":
            trainer.on_train_start = lambda trainer=trainer: scale(trainer, 128.0)
        trainer.fit()
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=1e-2)


def test_optimizers_that_share_a_backward_share_its_scale() -> None:
    """The scale that grows after the first optimizer's step is not the second's."""

    class Both(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return {name: nn.functional.mse_loss(m(x), y) for name, m in self.model.items()}

        def on_train_start(self) -> None:
            scale(self, 1.0, grows_every=1)

    models = {"a": line(), "b": line()}
    trainer = fitted(
        Both,
        model=models,
        optimizer={n: torch.optim.SGD(m.parameters(), lr=0.1) for n, m in models.items()},
        precision="fp16",
        loss_fn=None,
    )
    assert torch.equal(models["a"].weight, models["b"].weight)
    assert trainer.optimization.scaler.get_scale() == 2.0**10  # once a window


def test_an_optimizer_may_step_twice_in_a_window_under_fp16() -> None:
    class Twice(Trainer):
        def step(self, window: Window) -> None:
            for batch, batch_idx in window:
                for _ in range(2):
                    with self.autocast:
                        loss = self.training_step(batch, batch_idx)
                    self.backward(loss)
                    self.optimizer_step()

        def on_train_start(self) -> None:
            if self.optimization.scaler is not None:
                scale(self, 1.0, grows_every=4)

    half, full = fitted(Twice, precision="fp16"), fitted(Twice)
    for name, value in weights(half).items():
        assert torch.allclose(value, weights(full)[name], atol=0.02)


def test_the_loss_scale_survives_a_resume(tmp_path: Path) -> None:
    class Grows(Trainer):
        def on_train_start(self) -> None:
            if self.global_step == 0:
                scale(self, 8.0, grows_every=3)

    whole = fitted(Grows, precision="fp16", run_dir=tmp_path / "whole")
    fitted(Grows, precision="fp16", run_dir=tmp_path / "part", epochs=1)
    part = fitted(Grows, precision="fp16", run_dir=tmp_path / "part")
    assert part.optimization.scaler.state_dict() == whole.optimization.scaler.state_dict()
    assert same(weights(part), weights(whole))


def test_compiled_models_keep_their_names_and_train_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    trainer = fitted(compile=True, run_dir=tmp_path)
    assert trainer.model in compiled
    monkeypatch.undo()

    compiles = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiles(self, backend="eager"))
    trainer = fitted(compile=True, run_dir=tmp_path / "compiled", val_dataloader=batches(8))
    assert list(weights(trainer)) == ["model.weight", "model.bias"]
    assert same(weights(trainer), weights(fitted()))
    resumed = fitted(run_dir=tmp_path / "compiled", val_dataloader=batches(8), epochs=3)  # in eager
    assert resumed.global_step == 15


def test_a_row_has_the_rate_of_each_group_where_they_differ(tmp_path: Path) -> None:
    """Given a group that is to be as fast as the other after its warm-up."""
    model = line()
    groups = [{"params": [model.weight], "name": "body"}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.25)
    schedule = LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5 if step == 0 else 1.0])
    settings = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "max_steps": 2}
    fitted(**settings, log_every=1, run_dir=tmp_path)
    rates = [{k: v for k, v in row.items() if k.startswith("lr")} for row in step_rows(tmp_path)]
    assert rates == [{"lr": 0.25, "lr/body": 0.25, "lr/1": 0.125}, {"lr": 0.25}]


def test_schedulers_of_interval_step_and_epoch() -> None:
    for interval, factor in (("step", 0.5**4), ("epoch", 0.5**2)):
        model = line()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        trainer = fitted(
            model=model,
            optimizer=optimizer,
            lr_scheduler=StepLR(optimizer, 1, 0.5),
            lr_scheduler_interval=interval,
            gradient_accumulation_steps=3,  # 5 batches: 2 windows an epoch
        )
        assert trainer.learning_rates == {"optimizer": 1e-2 * factor}


def test_an_epoch_scheduler_does_not_step_where_max_steps_ends_an_epoch_early() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = fitted(
        model=model,
        optimizer=optimizer,
        lr_scheduler=StepLR(optimizer, 1, 0.5),
        lr_scheduler_interval="epoch",
        max_steps=7,
    )
    assert (trainer.current_epoch, trainer.learning_rates) == (1, {"optimizer": 0.5e-2})


def plateau(**changes: Any) -> dict[str, Any]:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return settings(
        model=model,
        optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer, factor=0.1, patience=0),
        **{"lr_scheduler_interval": "metric", "val_dataloader": batches(8), "epochs": 4, **changes},
    )


class Scripted(Trainer):
    """Validates to given numbers."""

    numbers = (3.0, 2.0, 2.5, 1.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.numbers[self.current_epoch])
        self.log("val/score", -self.numbers[self.current_epoch])


def test_a_metric_scheduler_gets_the_validation_loss_or_the_monitored_metric() -> None:
    trainer = Scripted(**plateau())
    trainer.fit()
    assert trainer.learning_rates["optimizer"] == pytest.approx(1e-3)
    trainer = Scripted(**plateau(metric_monitor=MetricMonitor("val/score", mode="min")))
    trainer.fit()
    assert trainer.learning_rates["optimizer"] == pytest.approx(1e-5)  # never less than at first


def test_a_metric_scheduler_survives_a_resume(tmp_path: Path) -> None:
    def run(folder: str, epochs: int) -> Trainer:
        trainer = Scripted(**plateau(run_dir=tmp_path / folder, epochs=epochs))
        trainer.fit()
        return trainer

    whole = run("whole", 4)
    run("part", 2)
    part = run("part", 4)
    assert part.learning_rates == whole.learning_rates
    assert part.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


def test_a_metric_scheduler_without_its_metric_says_what_there_is() -> None:
    class Other(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/los", 1.0)

    with pytest.raises(MetricError, match=r"'val/loss'.*val/los"):
        Other(**plateau()).fit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_dataloader": None}, r"metric.*val_dataloader"),
        ({"lr_scheduler_interval": "step"}, r"ReduceLROnPlateau.*'metric'"),
        ({"lr_scheduler_interval": "epoch"}, r"ReduceLROnPlateau.*'metric'"),
        ({"metric_monitor": MetricMonitor(mode="max")}, r"mode='min'.*gets 'val/loss'.*'max'"),
    ],
)
def test_a_metric_scheduler_needs_a_metric(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(**plateau(**changes)).fit()


def test_a_scheduler_that_takes_no_metric_is_refused_one() -> None:
    kept = plateau()
    kept["lr_scheduler"] = LinearLR(kept["optimizer"])
    with pytest.raises(ConfigError, match="LinearLR takes no metric"):
        Trainer(**kept).fit()


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    kept = settings()
    kept["lr_scheduler"] = LinearLR(torch.optim.SGD(line().parameters(), lr=1.0))
    with pytest.raises(ConfigError, match="lr_scheduler: it follows an optimizer that is not"):
        Trainer(**kept).fit()


class Endless:
    """Batches for ever, without a length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from batches()


class Counted:
    """Five batches, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


def ends(**changes: Any) -> tuple[int, int, str]:
    trainer = fitted(**changes)
    return trainer.current_epoch, trainer.global_step, trainer.result.stopped_by


@pytest.mark.parametrize("loader", [batches, Counted])
def test_where_a_run_ends(loader: Any) -> None:
    assert ends(train_dataloader=loader()) == (2, 10, "epochs")
    assert ends(train_dataloader=loader(), max_steps=7) == (1, 7, "max_steps")
    assert ends(train_dataloader=loader(), epochs=None, max_steps=12) == (2, 12, "max_steps")
    assert ends(train_dataloader=loader(), max_steps=10) == (2, 10, "epochs")
    assert ends(train_dataloader=loader(), epoch_length=2) == (2, 4, "epochs")
    assert ends(train_dataloader=loader(), epoch_length=7) == (2, 14, "epochs")
    assert ends(train_dataloader=loader(), gradient_accumulation_steps=2) == (2, 6, "epochs")


def test_an_endless_loader_ends_by_epoch_length_or_max_steps() -> None:
    assert ends(train_dataloader=Endless(), epoch_length=7) == (2, 14, "epochs")
    assert ends(train_dataloader=Endless(), max_steps=7) == (0, 7, "max_steps")


def test_the_horizon_is_known_when_training_starts() -> None:
    def horizon(**changes: Any) -> Any:
        trainer = Trainer(**settings(**changes))
        seen: list[Any] = []
        trainer.on_train_start = lambda: seen.extend(
            [trainer.train_batches, trainer.training_horizon, trainer.epochs]
        )
        trainer.fit()
        return tuple(seen)

    assert horizon() == (5, 10, 2)
    assert horizon(gradient_accumulation_steps=2) == (5, 6, 2)
    assert horizon(max_steps=4) == (5, 4, 2)
    assert horizon(epoch_length=7) == (7, 14, 2)
    assert horizon(train_dataloader=Counted()) == (None, None, 2)


@pytest.mark.parametrize("epoch_length", [3, 7, 10])
def test_epochs_shorter_or_longer_than_the_loader_repeat_and_omit_nothing(
    epoch_length: int,
) -> None:
    class Sees(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.extend(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    fitted(Sees, train_dataloader=batches(20, shuffle=True), epoch_length=epoch_length, epochs=10)
    passes = [sorted(seen[i : i + 20]) for i in range(0, len(seen) - 19, 20)]
    everything = sorted(points(20).tensors[0][:, 0].tolist())
    assert len(passes) == epoch_length * 10 * 4 // 20
    assert all(one == everything for one in passes)
    assert seen[:20] != seen[20:40]


def test_warmup_steps_are_the_schedulers_or_none() -> None:
    trainer = Trainer(**settings())
    assert trainer.warmup_steps == 0
    trainer.lr_scheduler = LinearLR(trainer.optimizer)
    trainer.lr_scheduler.warmup_steps = 5
    assert trainer.warmup_steps == 5


def test_a_loss_function_with_weights_is_trained_and_saved(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return ((output * self.scale - target) ** 2).mean()

    model, loss_fn = line(), Scaled()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    trainer = fitted(
        model=model,
        loss_fn=loss_fn,
        optimizer=torch.optim.SGD(parameters, lr=0.01),
        run_dir=tmp_path,
    )
    assert list(trainer.named_models()) == ["model", "loss_fn"]
    assert loss_fn.scale.item() != 1.0
    assert not math.isnan(loss_fn.scale.item())


class Fours(Sampler[list[int]]):
    """Batches of four rows, in order."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([*range(k, k + 4)] for k in range(0, 20, 4))

    def __len__(self) -> int:
        return 5


def test_the_plan_says_how_long_an_epoch_is_with_its_unit() -> None:
    """Samples, but batches where a batch sampler of one's own makes them."""
    for loader, sees in (
        (batches(), "4 samples: 1 x 4 on 1 rank; an epoch has 20 samples"),
        (DataLoader(points(), batch_sampler=Fours()), "1 batch: 1 x 1 on 1 rank; an epoch has 5 b"),
    ):
        plan = [line["decision"] for line in fitted(train_dataloader=loader).plan.as_list()]
        assert any(said.startswith(f"each optimizer step sees {sees}") for said in plan), plan
