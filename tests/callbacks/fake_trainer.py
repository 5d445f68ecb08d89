"""A trainer small enough to see through, which fires the real events in the real order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from paceline.log.plan import Plan
from paceline.trainer.callback import Callback
from paceline.trainer.events import Events, Hooks


class FakeTrainer(Hooks):
    """Regression of noise by SGD: `steps` optimizer steps, a row each `log_every`, no data."""

    def __init__(
        self,
        *callbacks: Callback,
        model: nn.Module | None = None,
        optimizers: dict[str, torch.optim.Optimizer] | None = None,
        log_every: int = 2,
        is_main: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)
        )
        self.optimizers = optimizers or {
            "optimizer": torch.optim.SGD(self.model.parameters(), lr=0.1)
        }
        self.world = SimpleNamespace(is_main=is_main)
        self.device = torch.device("cpu")
        self.pipeline = None
        self.global_step = self.current_epoch = 0
        self.epochs, self.training_horizon = 2, 8
        self.log_every = log_every
        self.recorder = SimpleNamespace(every=log_every)
        self.validation: Any = {None: SimpleNamespace(length=2)}
        self.max_val_batches = None
        self.progress = SimpleNamespace(samples=0, items=0, rates={}, begun=True)
        self.local_batches = 0
        self.row: dict[str, Any] = {}
        self.logged: list[tuple[int, str, Any]] = []
        self.timing: list[tuple[str, float]] = []
        self.norms: list[torch.Tensor] = []
        self.stops: list[str] = []
        self.callbacks = callbacks
        self.plan = Plan()
        self.source = SimpleNamespace(windows_per_epoch=3)
        self.events = Events(self, callbacks)
        self.while_validating: Callable[[], None] = lambda: None

    def is_overridden(self, name: str) -> bool:
        return True  # a validation measures what its test says

    def named_models(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers

    def log(self, name: str, value: Any, weight: Any = None) -> None:
        self.logged.append((self.global_step, name, value))

    def log_timing(self, name: str, value: float) -> None:
        self.timing.append((name, value))

    def note_gradient_norm(self, norm: torch.Tensor) -> None:
        self.norms.append(norm)

    def request_stop(self, reason: str) -> None:
        self.stops.append(reason)

    def fire(self, event: str, *arguments: Any) -> None:
        for hook in getattr(self.events, event):
            hook(*arguments)

    def start(self, state: Iterable[dict[str, Any]] = ()) -> FakeTrainer:
        self.fire("on_setup")
        for callback, saved in zip(self.callbacks, state, strict=False):
            callback.load_state_dict(saved)
        self.fire("on_train_start")
        return self

    def step(self, steps: int = 1) -> FakeTrainer:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.global_step)
            inputs = torch.randn(8, 3, generator=generator)
            loss = self.model(inputs).square().mean()
            loss.backward()
            for name, optimizer in self.optimizers.items():
                self.fire("on_before_optimizer_step", optimizer)
                self.progress.rates[name] = [group["lr"] for group in optimizer.param_groups]
                optimizer.step()
                optimizer.zero_grad()
            self.global_step += 1
            self.progress.samples += 8
            self.progress.items += 16
            due = self.global_step % self.log_every == 0
            counters = {"step": self.global_step, "epoch": 0, "samples": self.progress.samples}
            counters["items"] = self.progress.items
            self.row = {**counters, "train/loss": loss.item()} if due else {}
            self.fire("on_step_end", self.row)
        return self

    def validate(self) -> FakeTrainer:
        self.fire("on_validation_start")
        for batch_idx in range(2):
            self.fire("on_validation_batch_start", None, batch_idx)
            self.while_validating()
            self.fire("on_validation_batch_end", None, batch_idx)
        self.fire("on_validation_end")
        self.fire("on_metrics", {"val/loss": 0.25})
        return self

    def end(self) -> FakeTrainer:
        self.current_epoch = self.epochs
        self.fire("on_train_end")
        self.fire("on_teardown")
        return self
