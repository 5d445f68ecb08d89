"""What a run makes while it trains comes back when it is resumed.

Each expected value is computed by a loop in plain torch that is never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paceline import Callback, CheckpointPolicy, Trainer
from paceline.errors import MismatchError, StateError
from paceline.testing.tracing import StopAt
from small import batches, line, points, settings

STEPS = 10  # two epochs of five


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    before: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Two epochs over the points, in order; `before` is called as each begins."""
    x, y = points().tensors
    for step in range(STEPS):
        if step % 5 == 0:
            before(step // 5)
        at = slice(4 * (step % 5), 4 * (step % 5) + 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[at]), y[at]).backward()
        optimizer.step()


def resumed(
    make: Callable[[], dict[str, Any]], run_dir: Path, *stops: int, kind: type[Trainer] = Trainer
) -> Any:
    """The trainer at the end of a run that was stopped at each of the steps."""
    for stop in (*stops, None):
        made = make()
        made["callbacks"] = [*made.get("callbacks", []), *([StopAt(stop)] if stop else [])]
        trainer = kind(**settings(run_dir=run_dir, **made))
        trainer.fit(seed=1)
    return trainer


class Keeps(nn.Module):
    """A line with a state of one kind, which is counted or changed in each step.

    Args:
        kind: of what it keeps.
    """

    line: nn.Linear

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.line = line()
        self.kind, self.calls = kind, 0
        self.register_buffer("bank", torch.zeros(0, 3))
        self.register_buffer("mean", None)
        self.register_buffer("wide", torch.zeros(1).expand(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.bank = torch.cat([self.bank, x])[-30:]
            self.mean = x.mean(0)
            if self.calls == 2:
                self.register_buffer("later", x.sum(0))
        return self.line(x)

    def get_extra_state(self) -> Any:
        return {
            "a dictionary": {"calls": self.calls, 7: (self.calls,)},
            "a number": self.calls,
            "text": str(self.calls),
            "a list": [self.calls],
            "a tensor that grows": torch.ones(self.calls),
            "None": None,
        }[self.kind]

    def set_extra_state(self, state: Any) -> None:
        self.calls = {
            "a dictionary": lambda: state[7][0],
            "a number": lambda: state,
            "text": lambda: int(state),
            "a list": lambda: state[0],
            "a tensor that grows": lambda: len(state),
            "None": lambda: 3,
        }[self.kind]()


@pytest.mark.parametrize(
    "kind", ["a dictionary", "a number", "text", "a list", "a tensor that grows", "None"]
)
def test_extra_state_and_buffers_that_change(kind: str, tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        return {"model": Keeps(kind)}

    hand = Keeps(kind)
    by_hand(hand, torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9))

    model = resumed(make, tmp_path, 3).model

    assert model.calls == STEPS
    assert torch.equal(model.line.weight, hand.line.weight)
    for name in ("bank", "mean", "wide", "later"):
        assert torch.equal(getattr(model, name), getattr(hand, name)), name


def test_a_buffer_that_was_made_in_another_shape_is_refused(tmp_path: Path) -> None:
    """Only training may change a buffer: a model that was built anew with another one differs."""

    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.line = line()
            self.register_buffer("scale", torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(x) * self.scale.sum()

    Trainer(**settings(model=Wide(3), run_dir=tmp_path, max_steps=2)).fit()

    with pytest.raises(MismatchError, match=r"scale: float32\[3\] in the checkpoint.*\[4\] here"):
        Trainer(**settings(model=Wide(4), run_dir=tmp_path)).fit()


class Counted(torch.optim.SGD):
    """Its rate falls with a count, which its own state_dict() gives."""

    n = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.n += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / self.n)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "n": self.n}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.n = state.pop("n")
        super().load_state_dict(state)


class Shared(torch.optim.SGD):
    """Its rate falls with a count, under a key of its own in `state`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        shared: Any = self.state["shared"]  # pyright: ignore[reportArgumentType]
        shared["n"] = shared.get("n", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / shared["n"])


class Lookahead(torch.optim.Optimizer):
    """An inner optimizer and slow weights."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner, self.n = torch.optim.Adam(parameters, lr=lr), 0
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.n += 1
        if self.n % 3 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "n": self.n, "slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.n, self.param_groups = state_dict["n"], self.inner.param_groups
        for slow, value in zip(self.slow, state_dict["slow"], strict=True):
            slow.copy_(value)


@pytest.mark.parametrize("kind", [Counted, Shared, Lookahead])
def test_an_optimizer_with_a_state_of_its_own(kind: Any, tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        model = line()
        return {"model": model, "optimizer": kind(model.parameters(), lr=0.05)}

    hand = make()
    by_hand(hand["model"], hand["optimizer"])

    assert torch.equal(resumed(make, tmp_path, 4).model.weight, hand["model"].weight)


class TwoLines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = line(), nn.Linear(1, 1)
        nn.init.constant_(self.head.weight, 0.5)
        nn.init.zeros_(self.head.bias)
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(self.body(x), 0.0, self.body.training))


class Thaw(Callback):
    """In the second epoch the body is trained as well, in a group of its own, in eval mode."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        thaw(trainer.current_epoch, trainer.model, trainer.optimizer)


def thaw(epoch: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    if epoch == 1:
        model.body.requires_grad_(True)
        model.body.eval()
        group = {"params": list(model.body.parameters()), "lr": 0.01}
        optimizer.add_param_group(group)


def test_what_is_trained_changes_while_training(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        model = TwoLines()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "callbacks": [Thaw()]}

    hand = make()
    model, optimizer = hand["model"], hand["optimizer"]
    by_hand(model, optimizer, lambda epoch: thaw(epoch, model, optimizer))

    trainer = resumed(make, tmp_path, 6, 8)

    assert torch.equal(trainer.model.body.weight, model.body.weight)
    assert torch.equal(trainer.model.head.weight, model.head.weight)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.05, 0.01]
    assert not trainer.model.body.training


class Perceptual(Trainer):
    """Makes a network of random weights at the first validation, to measure with."""

    values: list[float]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "judge"):
            self.judge = nn.Linear(1, 3).requires_grad_(False)
        if batch_idx == 0:
            vars(self).setdefault("values", []).append(float(self.judge.weight[0]))
        self.log("val/judged", self.judge(self.model(batch[0])).square().mean())


def test_a_model_that_is_made_while_training(tmp_path: Path) -> None:
    """Given a network from the first validation, when the run is resumed, it is the same one."""

    def make() -> dict[str, Any]:
        return {"model": line(), "val_dataloader": batches(), "validate_every": 2}

    whole = resumed(make, tmp_path / "whole", kind=Perceptual)

    trainer = resumed(make, tmp_path / "parts", 5, kind=Perceptual)

    assert len(set(whole.values)) == 1
    assert trainer.values == whole.values[2:]


class Draws(Trainer):
    """Draws numbers from generators of its own in each step."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.torch, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self._python = random.Random(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * draw(self.torch, self.numpy, self._python)


def draw(one: torch.Generator, two: np.random.Generator, three: random.Random) -> float:
    return float(torch.rand((), generator=one)) + float(two.random()) + three.random()


def test_generators_that_are_attributes(tmp_path: Path) -> None:
    trainer = resumed(lambda: {"model": line()}, tmp_path, 4, kind=Draws)

    by_hand = torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)
    drawn = [draw(*by_hand) for _ in range(STEPS + 1)]
    assert draw(trainer.torch, trainer.numpy, trainer._python) == drawn[-1]


class Fails(Trainer):
    """Its first validation fails, until it is mended."""

    mended = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.mended:
            raise KeyError("labels")
        super().validation_step(batch, batch_idx)


class Counting(nn.Module):
    """A line under noise of its own generator, which counts its steps, and scales by them."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.drop = line(), nn.Dropout(0.0)
        self.generator, self.calls = torch.Generator().manual_seed(4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        noise = 0.1 * torch.randn(x.shape, generator=self.generator)
        return self.line(x + noise) * (1 + 0.1 * self.calls) * (1 - self.drop.p)


class Ema:
    """An average of a weight, with a state of its own."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class Averaging(Trainer):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.ema = Ema()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.model.drop.p, self.max_grad_norm = 0.5, 0.25

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.ema.value = 0.9 * self.ema.value + float(self.model.line.weight.detach()[0, 0])


class Remembers(Callback):
    """Keeps what no checkpoint holds."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.seen.append(trainer.model.line.bias.detach().clone())


def test_attributes_that_training_changes(tmp_path: Path) -> None:
    """Given a rate and a setting that a hook has changed, when the run stops in that epoch."""
    hand, average = Counting(), 0.0
    x, y = points().tensors
    sgd = torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        hand.drop.p = 0.5 * (step >= 5)
        at = slice(4 * (step % 5), 4 * (step % 5) + 4)
        sgd.zero_grad()
        nn.functional.mse_loss(hand(x[at]), y[at]).backward()
        if step >= 5:
            nn.utils.clip_grad_norm_(hand.parameters(), 0.25)
        sgd.step()
        average = 0.9 * average + float(hand.line.weight.detach()[0, 0])

    def make() -> dict[str, Any]:
        return {"model": Counting(), "callbacks": [Remembers()]}

    trainer = resumed(make, tmp_path, 3, 7, kind=Averaging)

    assert torch.equal(trainer.model.line.weight, hand.line.weight)
    assert trainer.ema.value == average
    assert trainer.model.calls == STEPS
    said = "training changes seen of callbacks.Remembers: no checkpoint holds it"
    assert said in str([str(each) for each in trainer.plan])
    assert said in (tmp_path / "run.json").read_text()


class Late(Trainer):
    """Makes its average as training starts, and changes a model's number in the seventh step."""

    back_at: tuple[float, int] | None = None

    def on_train_start(self) -> None:
        self.ema = Ema()

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.ema.value += 1
        if self.global_step == 7 and self.back_at is None and self.on_nonfinite == "rewind":
            self.named_models()["model"].seen = 7
            self.request_rewind(6)

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        if hasattr(self, "ema"):
            self.back_at = self.ema.value, self.named_models()["model"].seen


def test_an_object_that_is_made_as_training_starts(tmp_path: Path) -> None:
    """Given one that counts steps, when the run is resumed twice, or goes back, it counts on."""
    trainer = resumed(lambda: {"model": line()}, tmp_path / "resumed", 3, 7, kind=Late)
    assert trainer.ema.value == STEPS

    model = line()
    model.seen = 0
    made = {"run_dir": tmp_path / "back", "checkpoint": CheckpointPolicy(every_steps=5)}
    trainer = Late(**settings(model=model, on_nonfinite="rewind", **made))
    trainer.fit(seed=1)
    assert trainer.back_at == (5.0, 0)


def test_a_state_that_cannot_be_stored_says_how_to_leave_it_out(tmp_path: Path) -> None:
    trainer = Trainer(**settings(run_dir=tmp_path))
    trainer.ema = Ema()
    trainer.ema.value = object()
    with pytest.raises(StateError, match=r"objects\.ema\.value: an object cannot") as caught:
        trainer.fit()
    assert "begin its name with an underscore" in caught.value.__notes__[0]


def test_weights_that_training_ties_are_refused_by_name(tmp_path: Path) -> None:
    class Ties(Callback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            if trainer.current_epoch == 1:
                trainer.model[1].weight = trainer.model[0].weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    with pytest.raises(StateError, match="SGD trains a parameter that no model has any more"):
        Trainer(**settings(model=model, callbacks=[Ties()], run_dir=tmp_path)).fit()


def test_a_validation_that_fails_loses_no_step(tmp_path: Path) -> None:
    """Given a first validation that fails after an epoch, when it is mended and resumed."""
    hand = line()
    by_hand(hand, torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.9))
    given = {"val_dataloader": batches(), "run_dir": tmp_path}
    with pytest.raises(Exception, match="labels"):
        Fails(**settings(**given)).fit(seed=1)

    trainer = Fails(**settings(**given))
    trainer.mended = True
    first: list[int] = []
    trainer.on_validation_start = lambda: first.append(trainer.global_step)  # type: ignore
    trainer.fit(seed=1)

    assert torch.equal(trainer.model.weight, hand.weight)
    assert first == [5, 10]
