"""P13 Nothing behind the user's back: no implicit change of numbers, every decision in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, Trainer
from paceline.errors import ConfigError


def make_trainer(**settings: Any) -> Regression:
    model = settings.pop("model", None) or make_model()
    return Regression(
        model=model,
        loggers=[],
        progress=False,
        **{
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
            "train_dataloader": loader(Noisy()),
            "epochs": 1,
            **settings,
        },
    )


def plan(trainer: Trainer) -> str:
    return "\n".join(f"{line['decision']} [{line['setting']}]" for line in trainer.plan.as_list())


def test_a_loader_that_does_not_shuffle_is_not_shuffled() -> None:
    trainer = make_trainer(train_dataloader=loader(Noisy(), shuffle=False))
    trainer.train(seed=3)
    assert [i for step in trainer.seen.values() for i in step] == list(range(97))
    assert "as stored (the loader says shuffle=False)" in plan(trainer)


def test_what_drop_last_leaves_out_is_counted() -> None:
    trainer = make_trainer(train_dataloader=loader(Noisy(), drop_last=True))
    trainer.train()
    assert sum(map(len, trainer.seen.values())) == 90
    assert "drop_last leaves out 7 of 97 samples" in plan(trainer)


def test_a_sampler_of_the_users_own_is_kept_and_said() -> None:
    sampler = WeightedRandomSampler([0.0] * 90 + [1.0] * 7, 20)
    trainer = make_trainer(train_dataloader=DataLoader(Noisy(), 5, sampler=sampler))
    trainer.train()
    seen = [i for step in trainer.seen.values() for i in step]
    assert len(seen) == 20
    assert min(seen) >= 90
    assert "WeightedRandomSampler's own" in plan(trainer)


@pytest.mark.parametrize("name", ["train_dataloader", "optimizer", "on_nonfinite", "callbacks"])
def test_what_a_run_has_read_is_not_changed_within_it(name: str) -> None:
    """Given a run that has begun, when a hook assigns what the run has read, then it is told so
    and nothing is ignored; afterwards it may be assigned."""
    trainer, refused = make_trainer(), []
    value = getattr(trainer, name)

    def assign(metrics: Any) -> None:
        try:
            setattr(trainer, name, value)
        except ConfigError as error:
            refused.append(str(error))

    trainer.on_step_end = assign
    trainer.train()
    assert len(refused) == trainer.global_step
    assert f"{name}: the run that is open read it at its start" in refused[0]
    setattr(trainer, name, value)


def test_what_is_read_at_each_use_may_be_changed_within_a_run() -> None:
    trainer = make_trainer()
    trainer.on_step_end = lambda metrics: setattr(trainer, "max_steps", 3)
    assert trainer.train().global_step == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.optimizer.update(sgd=None), "optimizer['sgd']: the run that is open read it"),
        (lambda t: t.val_dataloader.update(far=t.train_dataloader), "val_dataloader['far']"),
        (lambda t: setattr(t, "log_every", 0), "log_every=0: expected at least 1"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused_when_it_is_set(
    change: Any, said: str
) -> None:
    """Given components in dictionaries, when a hook changes an entry, or a setting to nonsense."""
    model = make_model()
    optimizer = {"sgd": torch.optim.SGD(model.parameters(), lr=0.01)}
    far = {"far": loader(Noisy(8))}
    trainer = make_trainer(model=model, optimizer=optimizer, val_dataloader=far, max_steps=1)
    trainer.on_train_start = lambda: change(trainer)
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert said in str(caught.value)
    trainer.optimizer["sgd"] = optimizer["sgd"]  # now it may be


def test_a_callback_that_would_never_be_called_is_not_added() -> None:
    trainer = make_trainer()
    trainer.on_train_start = lambda: trainer.callbacks.append(Callback())
    with pytest.raises(ConfigError, match="callbacks"):
        trainer.train()
    trainer.callbacks.append(Callback())  # now it would be


def test_every_line_of_the_plan_names_its_setting(tmp_path: Path) -> None:
    trainer = make_trainer(run_dir=tmp_path, val_dataloader=loader(Noisy(23)))
    trainer.train()
    lines = trainer.plan.as_list()
    assert len(lines) >= 6
    assert all(line["setting"] for line in lines)


def test_the_numbers_are_those_of_a_loop_written_by_hand() -> None:
    """Given no dropout and shuffle=False, the weights are bitwise those of a plain loop: the
    learning rate, the loss and the batches are what the user wrote."""
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    ours, theirs = make_model(dropout=0), make_model(dropout=0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for _ in range(2):
        for inputs, targets in DataLoader(data, 8):
            nn.functional.mse_loss(theirs(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    Trainer(
        model=ours,
        optimizer=torch.optim.AdamW(ours.parameters(), lr=0.01),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(data, 8),
        epochs=2,
        progress=False,
    ).train()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
