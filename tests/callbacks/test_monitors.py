"""Gradient norms, learning rates, speeds and the time limit."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from fake_trainer import FakeTrainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.callbacks import GradientMonitor, LearningRate, Throughput, TimeLimit
from paceline.callbacks.gradient_monitor import gradient_norm
from paceline.callbacks.throughput import peak_memory
from paceline.errors import ConfigError

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, which would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads a value"
        return func(*args, **(kwargs or {}))


def named(trainer, prefix: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for step, name, value in trainer.logged:
        if name.startswith(prefix):
            found.setdefault(name, []).append((step, float(value)))
    return found


def flat_norm(gradients) -> float:
    return torch.cat([g.flatten().double() for g in gradients]).norm().item()


def test_the_gradient_norm_is_logged_and_noted_each_step() -> None:
    expected: list[float] = []
    monitor = GradientMonitor()
    trainer = FakeTrainer(monitor)
    assert monitor.state_dict() == {}, "so that a run without one resumes without a word"
    original = trainer.fire

    def watch(event: str, *arguments) -> None:
        if event == "on_before_optimizer_step":
            expected.append(flat_norm(p.grad for p in trainer.model.parameters()))
        original(event, *arguments)

    trainer.fire = watch
    trainer.start().step(3)
    assert [value for _, value in named(trainer, "grad_norm")["grad_norm"]] == pytest.approx(
        expected
    )
    assert [norm.item() for norm in trainer.norms] == pytest.approx(expected)
    assert monitor.state_dict().keys() == {"largest"}, "also where a row has just taken it"


def test_every_and_per_layer() -> None:
    trainer = FakeTrainer(GradientMonitor(every=2, per_layer=True)).start().step(5)
    logged = named(trainer, "grad_norm")
    assert set(logged) == {"grad_norm", "grad_norm/0", "grad_norm/2", "grad_norm/3"}
    assert [step for step, _ in logged["grad_norm"]] == [1, 3]  # counted once they are done: 2, 4
    layers = [logged[f"grad_norm/{i}"][0][1] for i in (0, 2, 3)]
    assert sum(x * x for x in layers) ** 0.5 == pytest.approx(logged["grad_norm"][0][1])


def test_two_optimizers_have_a_norm_each() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizers = {
        "a": torch.optim.SGD(model[0].parameters(), lr=0.1),
        "b": torch.optim.SGD(model[1].parameters(), lr=0.2),
    }
    trainer = FakeTrainer(GradientMonitor(), model=model, optimizers=optimizers).start().step(2)
    assert set(named(trainer, "grad_norm")) == {"grad_norm/a", "grad_norm/b"}


def test_a_non_finite_norm_reaches_the_policy_without_being_read() -> None:
    trainer = FakeTrainer(GradientMonitor(per_layer=True)).start()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.model[0].weight.grad[0, 0] = torch.inf
    with NoReads():
        trainer.fire("on_before_optimizer_step", trainer.optimizers["optimizer"])
    assert trainer.norms[0].isinf()


def test_parameters_without_gradients_are_left_out() -> None:
    trainer = FakeTrainer(GradientMonitor()).start()
    trainer.fire("on_before_optimizer_step", trainer.optimizers["optimizer"])
    assert trainer.norms == trainer.logged == []
    trainer.model[0].bias.grad = torch.full((4,), 2.0)
    trainer.fire("on_before_optimizer_step", trainer.optimizers["optimizer"])
    assert trainer.norms[0].item() == 4.0


def test_gradient_norm_of_unusual_gradients() -> None:
    half = torch.full((100,), 6e4, dtype=torch.float16)
    assert gradient_norm([half]).item() == pytest.approx(half.float().norm().item())
    sparse = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,), check_invariants=True)
    assert gradient_norm([sparse, torch.tensor([4.0])]).item() == 5.0
    assert gradient_norm([torch.tensor([3 + 4j])]).item() == 5.0
    assert gradient_norm([torch.ones(4, dtype=torch.float64), torch.ones(5)]).item() == 3.0


def grouped(**settings) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1, **settings},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3},
    ]
    return torch.optim.SGD(groups, lr=1.0)


def rates(trainer: FakeTrainer) -> dict[str, float]:
    return {name: value for name, value in trainer.row.items() if name.startswith("lr")}


def test_each_parameter_group_has_the_rate_of_its_step_in_the_row() -> None:
    optimizer = grouped(name="body")
    trainer = FakeTrainer(LearningRate(), log_every=2)
    trainer.optimizers["optimizer"] = optimizer
    trainer.start().step()
    assert trainer.row == {}
    optimizer.param_groups[0]["lr"] = 0.05
    trainer.step()
    assert rates(trainer) == {"lr/body": 0.05, "lr/1": 0.3}


def test_a_rate_that_the_row_has_anyway_is_not_repeated() -> None:
    trainer = FakeTrainer(LearningRate()).start().step(2)
    assert rates(trainer) == {}
    trainer.optimizers["other"] = grouped()
    trainer.start().step(2)
    assert rates(trainer) == {"lr/other/0": 0.1, "lr/other/1": 0.3}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is moved."""
    held = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: held.now)
    monkeypatch.setattr(time, "perf_counter", lambda: held.now)
    return held


def test_throughput_measures_the_steps_since_the_row_before(clock) -> None:
    trainer = FakeTrainer(Throughput(), log_every=2)
    trainer.progress.samples = 1000  # of a run that was resumed
    trainer.start()
    clock.now += 3
    trainer.step()
    clock.now += 1
    trainer.step()
    clock.now += 2
    trainer.while_validating = lambda: setattr(clock, "now", clock.now + 50)
    trainer.validate().step(2)
    speeds: dict[str, list[float]] = {}
    for name, value in trainer.timing:
        speeds.setdefault(name, []).append(value)
    assert speeds["samples_per_second"] == [16 / 4, 16 / 2]
    assert speeds["items_per_second"] == [32 / 4, 32 / 2]
    assert speeds["step_seconds"] == [2.0, 1.0]
    assert speeds["peak_memory_bytes"][0] > 1e7


def test_only_the_first_rank_measures() -> None:
    trainer = FakeTrainer(Throughput(), log_every=1, is_main=False).start().step(2)
    assert trainer.timing == []


def test_peak_memory_grows_by_what_is_used() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(before // 4 + 2**22)  # float32: as much again as all there ever was
    assert peak_memory(torch.device("cpu")) - before > block.nbytes // 4


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        (TimeLimit("00:00:05"), 5),
        (TimeLimit("01:30:00"), 5400),
        (TimeLimit("2-00:00:01"), 172801),
        (TimeLimit("100:00:00"), 360000),
        (TimeLimit(90), 90),
        (TimeLimit(hours=1, minutes=0.5, seconds=2), 3632),
    ],
)
def test_the_limit_is_read(limit: TimeLimit, seconds: float) -> None:
    assert limit.seconds == seconds


@pytest.mark.parametrize("limit", ["5", "1:60:00", "00:00:00", "", 0, -1, None, float("nan")])
def test_an_impossible_limit_is_refused(limit) -> None:
    with pytest.raises(ConfigError, match="TimeLimit"):
        TimeLimit(limit)


def test_a_limit_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="either"):
        TimeLimit("00:01:00", seconds=5)


def test_the_run_stops_once_the_limit_has_passed_and_the_next_start_has_its_own(clock) -> None:
    limit = TimeLimit(seconds=10)
    trainer = FakeTrainer(limit).start().step(2)
    clock.now += 9.5
    assert trainer.step().validate().stops == []
    clock.now += 0.5
    assert trainer.step(3).validate().stops == ["time limit"]
    assert limit.state_dict() == {}
    trainer.start().step()
    assert trainer.stops == ["time limit"]
    clock.now += 10
    trainer.validate()
    assert trainer.stops == ["time limit"] * 2, "a validation is stopped, too"


def test_one_rank_asks_for_all(clock) -> None:
    trainer = FakeTrainer(TimeLimit(seconds=10), is_main=False).start()
    clock.now += 100
    assert trainer.step().stops == []
