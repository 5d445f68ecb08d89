"""What Paceline itself compares when a run resumes: each key, on trainers built in Python."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from paceline import Callback, Parallel, Resume, Trainer
from paceline.errors import ResumeError
from paceline.testing import StopAt
from paceline.trainer.identity_keys import FIRST_PARTS
from small import fitted, line, points


class Scaled(Dataset):
    """Rows times `scale`, with noise; `offset` is nobody's argument."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, n: int = 20) -> None:
        self.scale, self._offset, self.n = scale, offset, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((3,), self.scale * i / 20 + self._offset) + 0.1 * torch.randn(3)
        return x, x[:1]


class Rows(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(3), torch.ones(1))] * 32)


class Weighs(Trainer):
    def __init__(self, *, factor: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.factor = factor


@dataclass
class Shape:
    scale: float = 1.0
    epochs: int = 2


class Shaped(nn.Linear):
    """A line, scaled and bent as its arguments say."""

    def __init__(self, shape: Shape | SimpleNamespace | Namespace, bend: Any = torch.tanh) -> None:
        super().__init__(3, 1)
        self.shape, self.bend = shape, bend


def focal(gamma: float) -> dict[str, Any]:
    return {"loss_fn": lambda outputs, targets: ((outputs - targets).abs() ** gamma).mean()}


class Shifted(Sampler):
    def __init__(self, shift: int) -> None:
        self._shift = shift

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter((i + self._shift) % 20 for i in range(20))


def frozen(*, bias: bool) -> dict[str, Any]:
    model = line()
    model.bias.requires_grad_(not bias)
    return {"model": model}


def under(schedule: Callable[[torch.optim.Optimizer], Any]) -> dict[str, Any]:
    model = line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": sgd, "lr_scheduler": schedule(sgd)}


def warm(steps: int) -> dict[str, Any]:
    def rate(step: int) -> float:
        return min(1.0, (step + 1) / steps)

    return under(lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, rate))


def cycle(rise: float) -> dict[str, Any]:
    one = torch.optim.lr_scheduler.OneCycleLR
    return under(lambda sgd: one(sgd, 0.1, total_steps=20, pct_start=rise))


def first(samples: list[Any]) -> Any:
    return default_collate(samples)


def second(samples: list[Any]) -> Any:
    return default_collate(samples)


def loads(dataset: Any, **options: Any) -> dict[str, Any]:
    return {"train_dataloader": DataLoader(dataset, 4, **options)}


def modelled(*modules: nn.Module) -> dict[str, Any]:
    return {"model": nn.Sequential(line(), *modules)}


def weighted(*weights: float) -> dict[str, Any]:
    weight = torch.tensor(weights)
    return {"loss_fn": partial(nn.functional.binary_cross_entropy_with_logits, pos_weight=weight)}


def sampled(weight: float) -> dict[str, Any]:
    return loads(points(), sampler=WeightedRandomSampler([1.0] * 19 + [weight], 20))


def scheduled(interval: str) -> dict[str, Any]:
    model = line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 3)
    return {
        "model": model,
        "optimizer": sgd,
        "lr_scheduler": schedule,
        "lr_scheduler_interval": interval,
    }


# The key, and the settings of the run that began and of the one that is to resume it.
CHANGES: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "a module's argument": (
        "models.model.Dropout.p: 0.1 then, 0.5 now",
        lambda: modelled(nn.Dropout(0.1)),
        lambda: modelled(nn.Dropout(0.5)),
    ),
    "another activation": (
        "models.model.modules",
        lambda: modelled(nn.ReLU()),
        lambda: modelled(nn.Tanh()),
    ),
    "a field of its configuration": (
        "models.model.Shaped.shape.scale: 1.0 then, 2.0 now",
        lambda: {"model": Shaped(Shape())},
        lambda: {"model": Shaped(Shape(2.0, epochs=3))},
    ),
    "a word of the command line that it was given": (
        "models.model.Shaped.shape.scale: 1.0 then, 2.0 now",
        lambda: {"model": Shaped(Namespace(scale=1.0, epochs=2, resume_from=None))},
        lambda: {"model": Shaped(Namespace(scale=2.0, epochs=3, resume_from="latest"))},
    ),
    "a field of a namespace": (
        "models.model.Shaped.shape.scale: 1.0 then, 2.0 now",
        lambda: {"model": Shaped(SimpleNamespace(scale=1.0))},
        lambda: {"model": Shaped(SimpleNamespace(scale=2.0))},
    ),
    "a function that it was given": (
        "models.model.Shaped.bend: ",
        lambda: {"model": Shaped(Shape())},
        lambda: {"model": Shaped(Shape(), torch.sigmoid)},
    ),
    "what takes gradients": (
        "models.model.frozen: '[]' then, \"['bias']\" now",
        lambda: frozen(bias=False),
        lambda: frozen(bias=True),
    ),
    "what a closure holds": (
        "loss_fn.gamma: 2.0 then, 3.0 now",
        lambda: focal(2.0),
        lambda: focal(3.0),
    ),
    "a schedule's function": (
        "lr_scheduler.lr_lambdas.0.steps: 4 then, 9 now",
        lambda: warm(4),
        lambda: warm(9),
    ),
    "the phases of a cycle": (
        "lr_scheduler.schedule_phases",
        lambda: cycle(0.3),
        lambda: cycle(0.5),
    ),
    "an argument that is kept privately": (
        "data.sampler.shift: 0 then, 1 now",
        lambda: loads(points(), sampler=Shifted(0)),
        lambda: loads(points(), sampler=Shifted(1)),
    ),
    "which samples a subset has": (
        "data.dataset.indices",
        lambda: loads(Subset(points(), [0, 1, 2, 3, 4, 5, 6])),
        lambda: loads(Subset(points(), [0, 2, 1, 3, 4, 5, 6])),
    ),
    "the trainer's argument": (
        "trainer.factor: 1.0 then, 2.0 now",
        lambda: {"kind": Weighs},
        lambda: {"kind": Weighs, "factor": 2.0},
    ),
    "the loss's weights": (
        "loss_fn.pos_weight: 1.0 then, 3.0 now",
        lambda: weighted(1.0),
        lambda: weighted(3.0),
    ),
    "the loss's tensors": (
        "loss_fn.pos_weight: '[1.0]' then, '[3.0]' now",
        lambda: {"loss_fn": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0]))},
        lambda: {"loss_fn": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))},
    ),
    "a dataset's argument": (
        "data.dataset.scale: 1.0 then, -7.0 now",
        lambda: loads(Scaled()),
        lambda: loads(Scaled(-7.0)),
    ),
    "what a dataset holds": (
        "data.content",
        lambda: loads(Scaled()),
        lambda: loads(Scaled(offset=1.0)),
    ),
    "what it holds, read by workers": (
        "data.content",
        lambda: loads(Scaled()),
        lambda: loads(Scaled(offset=1.0), num_workers=1),
    ),
    "the rows of a TensorDataset": (
        "data.content",
        lambda: loads(points()),
        lambda: loads(points(seed=6)),
    ),
    "the validation data": (
        "validation.content",
        lambda: {"val_dataloader": DataLoader(points(), 4)},
        lambda: {"val_dataloader": DataLoader(points(seed=6), 4)},
    ),
    "a sampler's weights": (
        "data.sampler.weights: 'sha256",
        lambda: sampled(1.0),
        lambda: sampled(2.0),
    ),
    "the collate function": (
        "data.collate_fn: 'test_identity.first' then, 'test_identity.second' now",
        lambda: loads(points(), collate_fn=first),
        lambda: loads(points(), collate_fn=second),
    ),
    "when the scheduler steps": (
        "lr_scheduler_interval: 'step' then, 'epoch' now",
        lambda: scheduled("step"),
        lambda: scheduled("epoch"),
    ),
    "accumulation of iterated data": (
        "data.gradient_accumulation_steps: 1 then, 4 now",
        lambda: loads(Rows()),
        lambda: {**loads(Rows()), "gradient_accumulation_steps": 4},
    ),
    "batches of iterated data": (
        "data.batch_size: 4 then, 2 now",
        lambda: loads(Rows()),
        lambda: {"train_dataloader": DataLoader(Rows(), 2)},
    ),
    "epochs of iterated data": (
        "data.epoch_length: None then, 6 now",
        lambda: loads(Rows()),
        lambda: {**loads(Rows()), "epoch_length": 6},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_with_its_key(change: str, tmp_path: Path) -> None:
    expected, before, after = CHANGES[change]
    fitted(run_dir=tmp_path, callbacks=[StopAt(1)], **before())
    with pytest.raises(ResumeError) as caught:
        fitted(run_dir=tmp_path, **after())
    assert f"\n  {expected}" in str(caught.value)


def test_what_may_change_does_and_what_may_not_if_it_is_accepted(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, callbacks=[StopAt(2)], **loads(Scaled()))
    more = {**loads(Scaled(), num_workers=1, pin_memory=True), "log_every": 1, "epochs": 3}
    more["val_dataloader"] = DataLoader(points(), 8)
    fitted(run_dir=tmp_path, callbacks=[StopAt(3)], **more)
    accept = Resume(accept=("data.dataset.scale", "data.content"))
    again = fitted(run_dir=tmp_path, resume=accept, **more | loads(Scaled(2.0)))
    assert again.result.complete


class Clocked(nn.Linear):
    """A line that knows when it was made, in a flag or a number of its own."""

    made = 0

    def __init__(self) -> None:
        super().__init__(1, 1)
        Clocked.made += 1
        self.made_at, self.is_first = float(Clocked.made), Clocked.made % 2 == 1


class Collated(TensorDataset):
    def __init__(self, *tensors: torch.Tensor, rows: Any) -> None:
        super().__init__(*tensors)
        self.rows = rows

    def collate(self, samples: list[Any]) -> Any:
        return default_collate(samples)


class Warms(Trainer):
    """Its schedule is a method of its own, or a function that calls it."""

    def __init__(self, *, bound: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.bound = bound

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / 4)

    def configure(self) -> None:
        rate = self.rate if self.bound else (lambda step: self.rate(step))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)


@pytest.mark.parametrize("bound", [False, True])
def test_functions_of_the_trainer_or_a_dataset_bring_no_settings_of_theirs(
    bound: bool, tmp_path: Path
) -> None:
    def run(**changes: Any) -> Warms:
        dataset = Collated(*points().tensors, rows=torch.ones(100))
        given = {
            **modelled(Clocked(), line(1)),
            **loads(dataset, collate_fn=dataset.collate),
            **changes,
        }
        return fitted(Warms, run_dir=tmp_path, bound=bound, **given)

    run(callbacks=[StopAt(2)])
    layout = Parallel(activation_checkpointing="full")
    again = run(epochs=3, log_every=1, parallel=layout, callbacks=[StopAt(12)])
    assert again.global_step == 12
    known = again.state_dict()["identity"]
    within = ("lr_scheduler.lr_lambdas.0.", "data.collate_fn.")
    assert not [key for key in known if key.startswith(within)]


def test_a_complete_run_with_other_data_is_refused_too(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, **loads(Scaled()))
    with pytest.raises(ResumeError, match=r"data\.dataset\.scale"):
        fitted(run_dir=tmp_path, **loads(Scaled(2.0)))


class Counted(TensorDataset):
    """Draws from a generator of its own, so that a sample is another one each time."""

    generator = torch.Generator()

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + torch.rand(3, generator=self.generator), y


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (Rows(), "it can only be iterated"),
        (Counted(*points().tensors), "a sample is another one each time"),
    ],
)
def test_the_plan_says_what_cannot_be_compared(dataset: Any, why: str) -> None:
    plan = [str(each) for each in fitted(epochs=1, **loads(dataset)).plan]
    expected = f"what data holds is not compared at a resume: {why}"
    assert f"{expected}  [run_identity() of the dataset]" in plan


def test_reading_samples_moves_no_generator(tmp_path: Path) -> None:
    def weight(dataset: Dataset) -> torch.Tensor:
        return fitted(epochs=1, **loads(dataset)).model.weight

    class Stateful(Scaled):  # whose samples are therefore not read beforehand
        def state_dict(self) -> dict[str, Any]:
            return {}

    assert torch.equal(weight(Scaled()), weight(Stateful()))


class Older(Callback):
    """Has a checkpoint know as little as those of older versions did."""

    def on_save_checkpoint(self, trainer: Trainer, state: dict[str, Any]) -> None:
        parts = state.pop("identity_parts")
        known = {key for name in FIRST_PARTS for key in parts.get(name, ())}
        state["identity"] = {key: v for key, v in state["identity"].items() if key in known}


def test_a_checkpoint_of_an_older_version_resumes_and_the_plan_says_what_is_not_known(
    tmp_path: Path,
) -> None:
    fitted(run_dir=tmp_path, callbacks=[Older(), StopAt(2)], **loads(Scaled()))
    resumed = fitted(run_dir=tmp_path, **loads(Scaled(2.0)))
    assert resumed.result.complete
    (said,) = [str(each) for each in resumed.plan if "not compared" in str(each)]
    assert all(part in said for part in ("code", "content of data", "data (object)"))


CODE = '''
"""A model and what it uses."""
import torch
from torch import nn
from identity_helper import WIDTH

FACTOR = 2.0

def scaled(x):
    return FACTOR * x

class Net(nn.Module):
    """Lines."""
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, WIDTH)

    def forward(self, x):
        from identity_late import shifted
        return scaled(shifted(self.line(x)))

def main():
    return 20  # epochs
'''
FILES = {
    "identity_net": CODE,
    "identity_helper": "WIDTH = 1\nUNUSED = 2\n",
    "identity_late": "def shifted(x):\n    return x + 0\n",
}
EDITS: dict[str, tuple[str, str, str, str | None]] = {
    "a constant": ("identity_net", "FACTOR = 2.0", "FACTOR = 3.0", "code.identity_net"),
    "a function it calls": ("identity_net", "FACTOR * x", "x * FACTOR", "code.identity_net"),
    "another file": ("identity_helper", "WIDTH = 1", "WIDTH = 2 - 1", "code.identity_helper"),
    "an import in a function": ("identity_late", "x + 0", "x + 1", "code.identity_late"),
    "comments and docstrings": ("identity_net", '"""Lines."""', "# lines\n    # more", None),
    "what nothing uses": ("identity_net", "return 20  # epochs", "return 21", None),
    "an unused constant": ("identity_helper", "UNUSED = 2", "UNUSED = 3", None),
}


def edited(folder: Path, edit: str | None) -> Any:
    """The model's class, as an import in a new process gives it."""
    folder.mkdir(exist_ok=True)
    for name, text in FILES.items():
        where, old, new, _ = EDITS[edit] if edit else ("", "", "", None)
        assert old in FILES.get(where, "")
        (folder / f"{name}.py").write_text(text.replace(old, new) if name == where else text)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module("identity_net").Net


@pytest.mark.parametrize("edit", EDITS)
def test_code_is_compared_as_far_as_the_run_uses_it(
    edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    run_dir, expected = tmp_path / "run", EDITS[edit][3]
    try:
        fitted(run_dir=run_dir, callbacks=[StopAt(2)], model=edited(tmp_path / "src", None)())
        again = partial(fitted, run_dir=run_dir, model=edited(tmp_path / "src", edit)())
        if expected is None:
            assert again().result.complete
            return
        with pytest.raises(ResumeError, match=rf"\n  {expected}: '\w+' then, '\w+' now\n"):
            again()
        assert again(resume=Resume(accept=("code",))).result.complete
    finally:
        for name in FILES:
            sys.modules.pop(name, None)


def test_a_credential_of_an_object_reaches_no_file_and_may_change(tmp_path: Path) -> None:
    class Fetched(Scaled):
        def __init__(self, hf_token: str) -> None:
            super().__init__()
            self.hf_token = hf_token

    class Reports(Callback):
        def __init__(self, api_key: str) -> None:
            self.api_key, self.sent = api_key, 0

        def state_dict(self) -> dict[str, Any]:
            return {"sent": self.sent}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.sent = state["sent"]

    for epochs, secret in enumerate(["horse" * 3, "staple" * 3], start=1):
        fitted(
            train_dataloader=DataLoader(Fetched(secret), 4),
            callbacks=[Reports(secret)],
            run_dir=tmp_path / "run",
            epochs=epochs,
        )
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"horse" * 2 not in written
    assert b"staple" * 2 not in written
