"""Several models and optimizers: adversarial steps, losses by name, nothing that mixes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader

from paceline import CheckpointPolicy, Trainer, Window
from paceline.errors import ConfigError, DataError, LossError, NonFiniteError
from paceline.testing import assert_resumes_exactly
from small import batches, fitted, line, points, same, settings, weights


def networks() -> dict[str, nn.Module]:
    """A generator from noise to three numbers, and a critic of three numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return {
            "generator": nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)),
            "critic": nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1)),
        }


def optimizers(models: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    return {name: torch.optim.Adam(m.parameters(), lr=0.01) for name, m in models.items()}


def verdict(logits: torch.Tensor, real: bool) -> torch.Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


class Gan(Trainer):
    """Models from dictionaries, alternating steps."""

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.model["generator"], self.model["critic"]

    def step(self, window: Window) -> None:
        generator, critic = self.networks()
        for (real, _), _ in window:
            fake = generator(torch.randn(len(real), 2))
            self.backward(verdict(critic(real), True) + verdict(critic(fake.detach()), False))
            self.optimizer_step("critic")
            self.backward(verdict(critic(fake), True))
            self.optimizer_step("generator")


class ConfiguredGan(Gan):
    """The same, with everything made in configure()."""

    def configure(self) -> None:
        models = networks()
        self.generator_net, self.critic_net = models["generator"], models["critic"]
        made = optimizers(models)
        self.generator, self.critic = made["generator"], made["critic"]

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.generator_net, self.critic_net


def gan(kind: type[Gan] = Gan, **changes: Any) -> Gan:
    models = networks()
    given = {"model": models, "optimizer": optimizers(models)} if kind is Gan else {}
    common = {"train_dataloader": batches(shuffle=True), "epochs": 3, "progress": False}
    return kind(**{**given, **common, **changes})


def by_hand(trainer: Gan) -> dict[str, torch.Tensor]:
    """The same steps as plain PyTorch writes them, on the batches and noise that `trainer` saw."""
    models = networks()
    made = optimizers(models)
    generator, critic = models["generator"], models["critic"]
    for real, fake_input, masks in trainer.seen:
        torch.set_rng_state(masks)
        fake = generator(fake_input)
        made["critic"].zero_grad()
        (verdict(critic(real), True) + verdict(critic(fake.detach()), False)).backward()
        made["critic"].step()
        made["generator"].zero_grad()
        verdict(critic(fake), True).backward()
        made["generator"].step()
    return {f"{n}.{k}": v for n, m in models.items() for k, v in m.state_dict().items()}


class WatchedGan(Gan):
    """Remembers what each step saw."""

    def step(self, window: Window) -> None:
        self.seen = getattr(self, "seen", [])
        generator, critic = self.networks()
        for (real, _), _ in window:
            noise = torch.randn(len(real), 2)
            self.seen.append((real, noise, torch.get_rng_state()))
            fake = generator(noise)
            self.backward(verdict(critic(real), True) + verdict(critic(fake.detach()), False))
            self.optimizer_step("critic")
            self.backward(verdict(critic(fake), True))
            self.optimizer_step("generator")


def test_an_adversarial_step_is_that_of_plain_pytorch() -> None:
    models = networks()
    trainer = WatchedGan(
        model=models,
        optimizer=optimizers(models),
        train_dataloader=batches(shuffle=True),
        epochs=2,
        progress=False,
    )
    trainer.fit()
    assert trainer.global_step == 10
    assert same(weights(trainer), by_hand(trainer))


def test_given_as_dictionaries_and_made_in_configure_are_the_same() -> None:
    given, made = gan(), gan(ConfiguredGan)
    given.fit(seed=3)
    made.fit(seed=3)
    names = {"generator_net": "generator", "critic_net": "critic"}
    renamed = {
        names[key.split(".", 1)[0]] + "." + key.split(".", 1)[1]: value
        for key, value in weights(made).items()
    }
    assert same(weights(given), renamed)
    assert list(made.named_optimizers()) == ["generator", "critic"]


@pytest.mark.parametrize(("kind", "step"), [(Gan, 1), (Gan, 5), (ConfiguredGan, 7)])
def test_a_gan_resumes_exactly(kind: type[Gan], step: int, tmp_path: Path) -> None:
    def build(run_dir: Path) -> Gan:
        policy = CheckpointPolicy(every_steps=2)
        return gan(kind, run_dir=run_dir, checkpoint=policy, log_every=2)

    assert_resumes_exactly(build, tmp_path, stop_at=step, seed=9)


def test_gradients_that_a_step_leaves_end_with_its_window() -> None:
    """A critic gets gradients from the generator's loss; they are not the critic's to keep."""
    trainer = gan()
    left: list[Any] = []
    trainer.on_train_batch_start = lambda batch, batch_idx: left.extend(
        p.grad for m in trainer.named_models().values() for p in m.parameters()
    )
    trainer.fit()
    assert left
    assert all(gradient is None for gradient in left)


def test_gradients_of_a_single_optimizer_that_is_not_stepped_end_with_the_window() -> None:
    class Rests(Trainer):
        def step(self, window: Window) -> None:
            for batch, batch_idx in window:
                self.backward(self.training_step(batch, batch_idx))
            if self.global_step % 2:
                self.optimizer_step()

    trainer = fitted(Rests, epochs=None, max_steps=2)
    model = line()
    mse_loss(model(points().tensors[0][4:8]), points().tensors[1][4:8]).backward()
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9).step()
    assert torch.equal(trainer.model.weight, model.weight)


def test_backward_for_one_optimizer_leaves_the_others_gradients_alone() -> None:
    class Together(Gan):
        """Both losses in one pass over several micro-batches, one step of each at the end."""

        def step(self, window: Window) -> None:
            generator, critic = self.networks()
            for (real, _), _ in window:
                fake = generator(real[:, :2])
                self.backward(verdict(critic(real), True), "critic")
                self.backward(verdict(critic(fake.detach()), False), "critic")
                self.backward(verdict(critic(fake), True), "generator")
            self.optimizer_step()

    models = networks()
    models["critic"][1].p = 0.0
    trainer = Together(
        model=models,
        optimizer=optimizers(models),
        train_dataloader=batches(8),
        gradient_accumulation_steps=2,
        epochs=1,
        progress=False,
    )
    trainer.fit()
    models = networks()
    models["critic"][1].p = 0.0
    made, real = optimizers(models), points(8).tensors[0]
    fake = models["generator"](real[:, :2])
    critic = models["critic"]
    (verdict(critic(real), True) + verdict(critic(fake.detach()), False)).backward()
    held = [p.grad for p in critic.parameters()]
    verdict(critic(fake), True).backward(inputs=list(models["generator"].parameters()))
    assert all(p.grad is g for p, g in zip(critic.parameters(), held, strict=True))
    for optimizer in made.values():
        optimizer.step()
    theirs = {f"{n}.{k}": v for n, m in models.items() for k, v in m.state_dict().items()}
    for name, value in weights(trainer).items():
        assert torch.allclose(value, theirs[name], atol=1e-6), name


class Twins(Trainer):
    """Two lines, each with its own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        left, right = self.model["left"], self.model["right"]
        return {"left": mse_loss(left(x), y), "right": (right(x) - 2 * y).abs().mean()}


def twins(kind: type[Trainer] = Twins, **changes: Any) -> Trainer:
    models = {"left": line(), "right": line(seed=2)}
    return kind(
        **settings(
            model=models,
            **{
                "optimizer": {
                    "left": torch.optim.SGD(models["left"].parameters(), lr=0.1),
                    "right": torch.optim.Adam(models["right"].parameters(), lr=0.1),
                },
                "loss_fn": None,
                **changes,
            },
        )
    )


def test_independent_losses_train_as_two_trainers_would(tmp_path: Path) -> None:
    both = twins(run_dir=tmp_path, log_every=1)
    both.fit()

    class Right(Trainer):
        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return (self.model(x) - 2 * y).abs().mean()

    left = line()
    only_left = fitted(model=left, optimizer=torch.optim.SGD(left.parameters(), lr=0.1))
    right = line(seed=2)
    only_right = fitted(Right, model=right, optimizer=torch.optim.Adam(right.parameters(), lr=0.1))
    assert torch.equal(both.model["left"].weight, only_left.model.weight)
    assert torch.equal(both.model["right"].weight, only_right.model.weight)
    row = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert '"train/loss/left"' in row
    assert '"lr/right"' in row


def test_losses_that_are_not_independent_are_refused() -> None:
    class Mixed(Twins):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            left = self.model["left"](x)
            return {"left": mse_loss(left, y), "right": mse_loss(self.model["right"](x), left)}

    with pytest.raises(LossError, match="loss for 'right' also reaches parameters of 'left'"):
        twins(Mixed).fit()


def test_a_loss_for_an_optimizer_that_is_not_there_is_refused() -> None:
    class Wrong(Twins):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"top": super().training_step(batch, batch_idx)["left"]}

    with pytest.raises(LossError, match="names 'top'; the optimizers are left, right"):
        twins(Wrong).fit()


def test_an_optimizer_step_names_one_that_is_there() -> None:
    class Wrong(Gan):
        def step(self, window: Window) -> None:
            list(window)
            self.optimizer_step("discriminator")

    with pytest.raises(ConfigError, match=r"'discriminator'.*name one of generator, critic"):
        gan(Wrong, model=(m := networks()), optimizer=optimizers(m)).fit()


def test_each_scheduler_follows_its_own_optimizer() -> None:
    class Uneven(Twins):
        def step(self, window: Window) -> None:
            for batch, batch_idx in window:
                self.backward(self.training_step(batch, batch_idx))
            self.optimizer_step("left")
            if self.global_step % 2:
                self.optimizer_step("right")

    trainer = twins(Uneven, epochs=None, max_steps=4)
    trainer.lr_scheduler = {
        name: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for name, optimizer in trainer.optimizer.items()
    }
    trainer.fit()
    assert trainer.learning_rates == {"left": 0.1 * 0.5**4, "right": 0.1 * 0.5**2}


def test_a_window_is_read_once() -> None:
    class Twice(Trainer):
        def step(self, window: Window) -> None:
            list(window)
            list(window)

    with pytest.raises(DataError, match="read once"):
        fitted(Twice)


def test_a_window_that_is_passed_over_takes_its_batches_with_it() -> None:
    class Skips(Trainer):
        def step(self, window: Window) -> None:
            if self.global_step != 1:
                for (x, _), _ in window:
                    seen.append(x)

    seen: list[torch.Tensor] = []
    fitted(Skips, epochs=1)
    x = points().tensors[0]
    assert torch.equal(torch.cat(seen), torch.cat([x[:4], x[8:]]))


class Closure(Trainer):
    """Gives LBFGS a closure; one of its evaluations may be NaN."""

    bad = -1  # the evaluation
    calls = 0

    def step(self, window: Window) -> None:
        for batch, _ in window:

            def closure(batch: Any = batch) -> torch.Tensor:
                loss = self.loss(batch)
                if self.calls == self.bad:
                    loss = loss * math.nan
                self.calls += 1
                self.backward(loss)
                return loss

            self.optimizer_step(closure=closure)


LBFGS: dict[str, Any] = {"max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"}


def lbfgs(kind: type[Closure] | type[Trainer] = Closure, bad: int = -1, **changes: Any) -> Any:
    model = line()
    optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS)
    data = DataLoader(points(), 10)
    trainer = kind(
        **settings(model, optimizer=optimizer, train_dataloader=data, max_grad_norm=0.5, **changes)
    )
    trainer.bad = bad
    return trainer


def lbfgs_by_hand(steps: Iterable[int]) -> tuple[nn.Linear, list[float], list[int]]:
    """The model, the first loss of each step and how often the loss has been computed till then."""
    model, losses, calls = line(), [], [0]
    optimizer = torch.optim.LBFGS(model.parameters(), **LBFGS)
    for step in steps:
        x, y = (part[step % 2 * 10 :][:10] for part in points().tensors)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            calls[-1] += 1
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        calls.append(calls[-1])
        losses.append(optimizer.step(closure).item())  # pyright: ignore
    return model, losses, calls


def test_lbfgs_with_a_closure_ends_as_a_loop_by_hand_and_logs_each_step_once() -> None:
    model, losses, calls = lbfgs_by_hand(range(4))
    trainer = lbfgs(log_every=1)
    result = trainer.fit()
    assert torch.equal(trainer.model.weight, model.weight)
    assert trainer.calls == calls[-1] > 8
    assert result.history["train/loss"] == losses


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_closure_that_is_not_finite_leaves_the_weights_of_before(policy: str) -> None:
    """Given a NaN in the third evaluation of step 2, when it is skipped, step 3 comes after 1."""
    first, _, calls = lbfgs_by_hand([0])
    trainer = lbfgs(bad=calls[-1] + 2, on_nonfinite=policy)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"step 2 is not finite.*\n.*loss nan"):
            trainer.fit()
        assert torch.equal(trainer.model.weight, first.weight)
        return
    trainer.fit()
    assert torch.equal(trainer.model.weight, lbfgs_by_hand([0, 2, 3])[0].weight)


def test_where_a_closure_does_not_work_says_so() -> None:
    with pytest.raises(ConfigError, match=r"LBFGS needs a closure; .*optimizer_step\(closure="):
        lbfgs(Trainer).fit()
    with pytest.raises(ConfigError, match="takes one micro-batch a window, and this has 2"):
        lbfgs(gradient_accumulation_steps=2).fit()
    with pytest.raises(ConfigError, match="does not exist yet on ranks or in fp16"):
        lbfgs(precision="fp16").fit()


class Sometimes(Trainer):
    """Trains the critic in every other window alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        losses = {"near": mse_loss(self.model["near"](x), y)}
        if batch_idx % 2 == 0:
            losses["far"] = mse_loss(self.model["far"](x), y)
        return losses


def pair() -> dict[str, nn.Module]:
    return {"near": line(), "far": line(seed=2)}


def descents(models: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    return {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_optimizer_may_have_no_gradients_in_a_window(precision: str) -> None:
    """Given five windows, when a model has a loss in three of them, then it is trained by these."""
    models, alone = pair(), pair()["far"]
    trainer = fitted(
        Sometimes,
        model=models,
        optimizer=descents(models),
        loss_fn=None,
        precision=precision,
        epochs=1,
    )
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for i, (x, y) in enumerate(batches()):
        if i % 2 == 0:
            optimizer.zero_grad()
            mse_loss(alone(x), y).backward()
            optimizer.step()
    assert trainer.global_step == 5
    # In fp16 the first steps are skipped, in search of a scale.
    assert precision == "fp16" or torch.equal(models["far"].weight, alone.weight)


class Together(Trainer):
    """One loss for two of three optimizers, which the third made the inputs of."""

    def step(self, window: Window) -> None:
        for (x, y), _ in window:
            made = self.model["maker"](x)
            loss = mse_loss(self.model["near"](made), y) + mse_loss(self.model["far"](made), y)
            self.backward(loss, only=["near", "far"])
        self.optimizer_step()


def test_a_loss_may_be_for_several_optimizers() -> None:
    models = {**pair(), "maker": nn.Linear(3, 3)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    fitted(Together, model=models, optimizer=descents(models), loss_fn=None, epochs=1)
    moved = {name for name, m in models.items() if not same(m.state_dict(), before[name])}
    assert moved == {"near", "far"}
