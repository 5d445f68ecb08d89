"""What a recipe's components are must not change between a stop and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paceline import Resume
from paceline.errors import ResumeError
from paceline.recipe import build_trainer, load_recipe
from paceline.testing import StopAt

MORE = """

class Pair(Dataset):
    def __init__(self, points, pad_token: str = "a", api_key: str = "", root: str = "") -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int):
        return self.points[i]


class Deep(Net):
    def __init__(self, width: int, p: float = 0.0, act: str = "tanh") -> None:
        super().__init__(width)
        self.chance = p


def build(width: int, slope: float = 1.0):
    return nn.Sequential(nn.Linear(1, width), nn.LeakyReLU(slope), nn.Linear(width, 1))


def weighed(outputs, targets, weight: float = 1.0):
    return weight * (outputs - targets).square().mean()
"""


@pytest.fixture
def begun(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe whose run was stopped, and a function that resumes it with other values."""
    monkeypatch.setenv("POINTS", "here")
    data = {"_target_": "torch.utils.data.DataLoader", "batch_size": 4}
    points = {"_target_": "toy.Points"}
    path = recipe(
        width=4,
        model={"_target_": "toy.Deep", "width": "${width}"},
        loss_fn={"_target_": "toy.weighed"},
        train_dataloader=data | {"dataset": {"_target_": "toy.Pair", "points": points}},
        trainer={"_target_": "toy.Scaled", "epochs": 2, "progress": False},
    )
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + MORE)

    def run(*overrides: str, accept: tuple[str, ...] = (), stop: int = 3):
        trainer = build_trainer(load_recipe(path, overrides), resume=Resume(accept=accept))
        trainer.callbacks = [*trainer.callbacks, StopAt(stop)]
        trainer.fit(seed=0)
        return trainer

    return run


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.p=0.5", "model.p: nothing then, 0.5 now"),
        ("model.act=relu", "model.act: nothing then, 'relu' now"),
        ("width=5", "model.width: 4 then, 5 now"),
        ("model._target_=toy.Net", "model: 'toy.Deep' then, 'toy.Net' now"),
        ("loss_fn.weight=2.0", "loss_fn.weight: nothing then, 2.0 now"),
        ("loss_fn={_target_: torch.nn.L1Loss}", "loss_fn: 'toy.weighed' then, 'torch.nn"),
        ("optimizer.lr=0.5", "optimizer.lr: "),
        ("trainer.scale=2.0", "trainer.scale: nothing then, 2.0 now"),
        (
            "train_dataloader.dataset.pad_token=b",
            "train_dataloader.dataset.pad_token: nothing then, 'b' now",
        ),
        (
            "train_dataloader.dataset.points.noise=1.0",
            "train_dataloader.dataset.points.noise: nothing then, 1.0 now",
        ),
        ("train_dataloader.batch_size=2", "data.global_batch_size: 4 then, 2 now"),
        ("train_dataloader.shuffle=true", "data.order: 'sequential' then, 'shuffled' now"),
    ],
)
def test_a_changed_argument_is_refused_with_its_dotted_key(begun, override, expected) -> None:
    begun()
    with pytest.raises(ResumeError) as caught:
        begun(override)
    assert f"\n  {expected}" in str(caught.value)


def test_what_changes_no_number_may_change(begun, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, points = "train_dataloader.dataset", "train_dataloader.dataset.points"
    looked_up = f"{pair}.root=${{oc.env:POINTS}}"
    begun(looked_up)
    monkeypatch.setenv("POINTS", "there")  # another machine keeps them elsewhere
    defaults = ("model.p=0.0", f"{points}.n=20", f"{pair}.pad_token=a", f"{pair}.api_key=secret")
    free = ("train_dataloader.num_workers=0", "trainer.log_every=1", "trainer.epochs=3")
    assert begun(looked_up, *defaults, *free, stop=99).result.complete


def test_a_complete_run_refuses_another_recipe_and_keeps_its_own(begun, tmp_path: Path) -> None:
    begun(stop=99)
    kept = tmp_path / "runs/toy/baseline/recipe.yaml"
    text = kept.read_text()
    with pytest.raises(ResumeError, match=r"model\.p: nothing then, 0\.5 now"):
        begun("model.p=0.5")
    assert kept.read_text() == text
    assert yaml.safe_load(text)["model"] == {"_target_": "toy.Deep", "width": "${width}"}
