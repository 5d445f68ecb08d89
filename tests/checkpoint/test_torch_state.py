"""Every optimizer and scheduler of torch goes on from stored state as if nothing had happened."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils

from paceline.checkpoint.codec import decode, encode


def through_json(state: Any) -> Any:
    tensors, skeleton = encode(state)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return decode(copies, json.loads(json.dumps(skeleton, allow_nan=False)))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False)
    )


def steps(
    net: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    count: range,
    sparse: bool = False,
) -> None:
    for i in count:

        def closure(seed: int = i) -> torch.Tensor:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            if sparse:
                for p in net.parameters():
                    p.grad = p.grad.to_sparse()  # type: ignore[union-attr]
            return loss

        loss = optimizer.step(closure)
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            scheduler.step(float(loss))
        elif scheduler is not None:
            scheduler.step()


@pytest.fixture(autouse=True)
def _no_variable_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some optimizers import torch's compiler, which sets this variable unless it is set."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_goes_on_bitwise(name: str) -> None:
    kind, sparse = OPTIMIZERS[name], name == "SparseAdam"
    extra = {"momentum": 0.9} if name == "SGD" else {}
    a, b = model(), model()
    first = kind(a.parameters(), lr=0.01, **extra)
    steps(a, first, None, range(3), sparse)

    b.load_state_dict(through_json(a.state_dict()))
    second = kind(b.parameters(), lr=0.5, **extra)
    second.load_state_dict(through_json(first.state_dict()))
    steps(a, first, None, range(3, 6), sparse)
    steps(b, second, None, range(3, 6), sparse)

    assert same(a, b)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=9),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, total_iters=2), lrs.MultiStepLR(o, [1, 2])], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, total_iters=4), lrs.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_in_this_file() -> None:
    known = {
        name
        for name, kind in vars(lrs).items()
        if inspect.isclass(kind) and issubclass(kind, lrs.LRScheduler)
    }
    assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_goes_on_bitwise(name: str) -> None:
    a, b = model(), model()
    first = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.SGD(b.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = SCHEDULERS[name](first)
        steps(a, first, one, range(3))

        two = SCHEDULERS[name](second)
        b.load_state_dict(through_json(a.state_dict()))
        second.load_state_dict(through_json(first.state_dict()))
        two.load_state_dict(through_json(one.state_dict()))
        rates = []
        for i in range(3, 8):
            steps(a, first, one, range(i, i + 1))
            steps(b, second, two, range(i, i + 1))
            rates.append((first.param_groups[0]["lr"], second.param_groups[0]["lr"]))

    assert all(x == y for x, y in rates)
    assert same(a, b)
