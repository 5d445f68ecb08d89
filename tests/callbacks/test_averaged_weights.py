"""The average is right, survives a resume, and leaves no trace in the trained weights."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_trainer import FakeTrainer
from torch import nn

from paceline.callbacks import AveragedWeights
from paceline.errors import ConfigError, MismatchError


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_formula(warmup: bool, every: int) -> None:
    ema = AveragedWeights(0.9, every=every, warmup=warmup)
    trainer = FakeTrainer(ema).start()
    expected = {k: v.double() for k, v in weights(trainer.model).items()}
    updates = 0
    for step in range(1, 13):
        trainer.step()
        if step % every == 0:
            decay = min(0.9, (1 + updates) / (10 + updates)) if warmup else 0.9
            for name, value in weights(trainer.model).items():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            updates += 1
    averaged = ema.averaged_state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(averaged[name], weights(trainer.model)[name])


def test_training_is_the_same_without_it() -> None:
    plain, averaged = FakeTrainer().start(), FakeTrainer(AveragedWeights(0.9)).start()
    for trainer in (plain, averaged):
        trainer.step(3).validate().step(3).validate().end()
    assert same(weights(plain.model), weights(averaged.model))


def test_validation_sees_the_average_and_the_trained_weights_come_back_bitwise() -> None:
    ema = AveragedWeights(0.9)
    trainer = FakeTrainer(ema).start().step(5)
    before, average = weights(trainer.model), ema.averaged_state_dict()
    seen: list[dict[str, torch.Tensor]] = []
    trainer.while_validating = lambda: seen.append(weights(trainer.model))
    trainer.validate()
    assert all(torch.equal(seen[0][name], average[name]) for name in seen[0])
    assert not same(seen[0], before)
    assert same(weights(trainer.model), before)


def test_without_evaluate_validation_sees_the_trained_weights() -> None:
    trainer = FakeTrainer(AveragedWeights(0.9, evaluate=False)).start().step(5)
    before = weights(trainer.model)
    trainer.while_validating = lambda: None if same(weights(trainer.model), before) else 1 / 0
    trainer.validate()


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("on_exception", (ValueError(),)),
        ("on_save_checkpoint", ({},)),
        ("on_teardown", ()),
        ("on_train_batch_start", (None, 0)),
    ],
)
def test_the_trained_weights_come_back_when_validation_is_broken_off(
    event: str, arguments: tuple
) -> None:
    trainer = FakeTrainer(AveragedWeights(0.9)).start().step(5)
    before = weights(trainer.model)

    def fail() -> None:
        raise ValueError("in validation")

    trainer.while_validating = fail
    with pytest.raises(ValueError, match="in validation"):
        trainer.validate()
    assert not same(weights(trainer.model), before)
    trainer.fire(event, *arguments)
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_average_is_bitwise_the_uninterrupted_one(stop: int) -> None:
    """With `every=3`, a stop after 1 or 2 steps is one before any update."""
    whole = AveragedWeights(0.9, every=3)
    FakeTrainer(whole).start().step(9)

    first = AveragedWeights(0.9, every=3)
    trainer = FakeTrainer(first).start().step(stop)
    saved = copy.deepcopy(first.state_dict())

    second = AveragedWeights(0.9, every=3)
    resumed = FakeTrainer(second, model=copy.deepcopy(trainer.model))
    resumed.global_step = stop
    resumed.start([saved]).step(9 - stop)
    assert same(second.averaged_state_dict(), whole.averaged_state_dict())
    assert second.state_dict()["updates"] == 3


def test_weights_loaded_after_setup_are_where_the_average_starts() -> None:
    ema = AveragedWeights(0.9)
    trainer = FakeTrainer(ema)
    trainer.fire("on_setup")
    with torch.no_grad():  # a warm start
        for parameter in trainer.model.parameters():
            parameter.fill_(7.0)
    trainer.fire("on_train_start")
    assert all((average == 7).all() for average in ema.state_dict()["average"].values())


def test_training_further_keeps_the_average() -> None:
    ema = AveragedWeights(0.9)
    trainer = FakeTrainer(ema).start().step(5).end()
    before = ema.averaged_state_dict()
    trainer.start()
    assert same(ema.averaged_state_dict(), before)


def test_frozen_weights_join_when_they_are_unfrozen() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedWeights(0.9)
    trainer = FakeTrainer(ema, model=model, optimizers={"optimizer": optimizer}).start().step(2)
    assert set(ema.state_dict()["average"]) == {"model.1.weight", "model.1.bias"}
    model.requires_grad_(True)
    trainer.fire("on_train_epoch_start")
    assert torch.equal(ema.state_dict()["average"]["model.0.weight"], model[0].weight)
    trainer.step(2)
    saved = copy.deepcopy(ema.state_dict())

    model[0].requires_grad_(False)  # as a model is built, before a hook unfreezes it
    resumed = AveragedWeights(0.9)
    FakeTrainer(resumed, model=model, optimizers={"optimizer": optimizer}).start([saved])
    assert same(resumed.state_dict()["average"], saved["average"])


def test_bfloat16_averages_do_not_stand_still() -> None:
    model = nn.Linear(3, 1).bfloat16()
    ema = AveragedWeights(0.9999, warmup=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = FakeTrainer(ema, model=model, optimizers={"o": optimizer}).start()
    before = ema.state_dict()["average"]["model.weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    trainer.global_step = 1
    trainer.fire("on_step_end", {})
    moved = ema.state_dict()["average"]["model.weight"] - before
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.1, atol=0)
    assert ema.averaged_state_dict()["weight"].dtype == torch.bfloat16
    live = model.weight.detach().clone()
    trainer.fire("on_validation_start")
    trainer.fire("on_validation_end")
    assert torch.equal(model.weight, live)


def test_tied_weights_are_averaged_under_both_names_and_buffers_are_present() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.two(self.one(x)))

    model, ema = Tied(), AveragedWeights(0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FakeTrainer(ema, model=model, optimizers={"o": optimizer}).start().step(4)
    exported = ema.averaged_state_dict()
    assert exported.keys() == model.state_dict().keys()
    average = ema.state_dict()["average"]["model.one.weight"]
    assert torch.equal(exported["one.weight"], average)
    assert torch.equal(exported["two.weight"], average)
    assert torch.equal(exported["norm.running_mean"], model.norm.running_mean)
    exported["one.weight"].zero_()
    exported["norm.running_mean"].fill_(9.0)
    assert not (model.norm.running_mean == 9).any()
    assert average.any(), "an export is a copy"


def test_a_checkpoint_of_another_model_lists_every_mismatch() -> None:
    ema = AveragedWeights()
    FakeTrainer(ema).start()
    state = copy.deepcopy(ema.state_dict())
    state["average"]["model.0.weight"] = torch.zeros(2, 2)
    state["average"]["model.0.bias"] = state["average"]["model.0.bias"].double()
    state["average"]["model.9.bias"] = state["average"].pop("model.2.bias")
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(MismatchError) as caught:
        ema.load_state_dict(state)
    message = str(caught.value)
    assert "model.2.bias is missing" in message
    assert "model.9.bias belongs to no model" in message
    assert "model.0.weight is float32[2, 2], here float32[4, 3]" in message
    assert "model.0.bias is float64[4], here float32[4]" in message
    assert same(ema.state_dict()["average"], before["average"])


def test_applied() -> None:
    ema = AveragedWeights(0.9)
    trainer = FakeTrainer(ema).start().step(4)
    before, average = weights(trainer.model), ema.averaged_state_dict()

    def evaluate() -> None:
        with ema.applied():
            assert torch.equal(trainer.model[0].weight, average["0.weight"])
            raise ValueError("in a test")

    with pytest.raises(ValueError, match="in a test"):
        evaluate()
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        AveragedWeights(**settings)
