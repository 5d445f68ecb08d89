"""Runs of a trainer with factories: from Python, from the command line, stopped and resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Callback, Trainer
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, ResumeError
from paceline.factories import get_config
from paceline.recipe import build_trainer, load_model, load_recipe
from paceline.testing import StopAt, assert_resumes_exactly, bits
from paceline.trainer.settings import Resume
from small import batches, line

Write = Callable[..., Path]
EVALUATED = {
    "micro_batch_size": 4,
    "sources": [{"type": "rows", "rows": 16}],
    "eval_sources": {"near": {"type": "rows", "rows": 8}},
}


def build(path: Path, run_dir: Path) -> Trainer:
    """With dropout, a worker, warm-up and validation: 4 windows an epoch, 2 on two ranks."""
    changes = [f"run.dir={run_dir}", "+data.num_workers=1", "+lr_scheduler.warmup=25%"]
    return build_trainer(load_recipe(path, changes))


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_resumes_exactly(recipe: Write, tmp_path: Path, size: int) -> None:
    path = recipe(data=EVALUATED).absolute()
    assert_resumes_exactly(partial(build, path), tmp_path / "runs", stop_at=3, ranks=size)


def test_from_python_it_is_the_run_of_the_command(recipe: Write, paceline: Any) -> None:
    """Its seed is the recipe's, and it takes another folder and further callbacks."""
    engines = [{"type": "paceline"}, {"type": "sums", "at_end": True}]
    path = recipe(seed=5, checkpoint=engines, data=EVALUATED)
    code, out, err = paceline("train", "r.yaml", "run.dir=by_command")
    assert code == 0, out + err
    trained = load_tree(_newest("by_command"))["models"]
    config = get_config(path)  # which imports the code
    seen: list[int] = []

    class Seen(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            seen.append(trainer.global_step)

    trainer = sys.modules["mine"].Mine(config, run_dir="by_python", callbacks=[Seen()])
    result = trainer.train()
    assert (result.global_step, trainer.seed, seen) == (12, 5, list(range(1, 13)))
    assert bits(load_tree(_newest("by_python"))["models"]) == bits(trained)
    kept = sorted(p.name for p in Path("by_python").iterdir() if p.is_dir() or p.suffix == ".yaml")
    assert kept == ["checkpoints", "code", "exports", "recipe.yaml"]
    assert not Path("run").exists()
    assert bits(load_model("by_python").state_dict()) == bits(trainer.model.state_dict())


def _newest(run: str) -> Path:
    return sorted(Path(run, "checkpoints").glob("step_*"))[-1]


def test_every_command_takes_such_a_recipe(recipe: Write, paceline: Any, tmp_path: Path) -> None:
    recipe(data=EVALUATED, seeds=[1, 2], checkpoint={"keep_last": None, "every_epochs": 1})
    code, out, err = paceline("train", "r.yaml", "--nproc", "2")
    assert code == 0, out + err
    for seed in (1, 2):
        record = json.loads((tmp_path / "run" / f"seed_{seed}" / "run.json").read_text())
        assert (record["status"], record["step"], record["world_size"]) == ("complete", 6, 2)
    commands = [
        ["evaluate", "run/seed_1"],
        ["preview", "r.yaml", "~seeds", "+seed=1"],
        ["preflight", "r.yaml", "~seeds", "+seed=1"],
        ["preflight", "r.yaml", "~seeds", "+seed=1", "--on", "64xH100-80GB"],
    ]
    evaluated, previewed, checked, on_paper = paceline.together(commands)
    assert (evaluated[0], "val/near/loss" in evaluated[1]) == (0, True), evaluated
    assert "bit by bit" in evaluated[1] + evaluated[2]
    assert (previewed[0], "data.sources.0.rows" in previewed[1]) == (0, True), previewed
    assert (checked[0], "near: 8 samples" in checked[1]) == (0, True), checked
    assert (on_paper[0], "on each rank" in on_paper[1]) == (0, True), on_paper


def test_without_a_recipe_it_is_any_trainer(recipe: Write) -> None:
    """It ends with the bits of a Trainer that has the same loss."""
    get_config(recipe())
    mine = sys.modules["mine"]

    class Plain(Trainer):
        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return (self.model(x) - y).square().mean()

    found = []
    for kind in (Plain, mine.Mine):
        model = line()
        made = torch.optim.SGD(model.parameters(), lr=0.05)
        trainer = kind(
            model=model, optimizer=made, train_dataloader=batches(), epochs=2, progress=False
        )
        trainer.fit(seed=1)
        found.append(bits(model.state_dict()))
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match=r"expected a config, which `get_config` makes"):
        mine.Mine({"model": {}})


@pytest.fixture
def stopped(recipe: Write) -> Callable[..., str]:
    """A run that was stopped at step 3, and a function that resumes it with changes."""
    path = recipe()

    def run(*changes: str, stop: int = 3, accept: tuple[str, ...] = ()) -> str:
        trainer = build_trainer(load_recipe(path, changes), resume=Resume(accept=accept))
        trainer.callbacks.append(StopAt(stop))
        try:
            trainer.train()
        except ResumeError as error:
            return str(error)
        assert trainer.global_step == stop
        return ""

    assert run() == ""
    return run


def test_what_changes_the_result_must_not_change_and_what_does_not_may(stopped: Any) -> None:
    for change, key in {
        "trainer.scale=2": "trainer.scale",
        "+data.noise=0.5": "data.noise",
        "+data.seed=1": "data.seed",
        "data.sources.0.rows=17": "data.sources.0.rows",
        "+data.sources.0.weight=2": "data.sources.0.weight",
        "optimizer.lr=0.5": "lr",
        "+lr_scheduler.warmup=50%": "warmup",
    }.items():
        text = stopped(change, stop=5)
        assert key in text, change
    free = [
        "+data.num_workers=1", "+data.note=other", "+trainer.remark=other",
        "+trainer.skip_validation=true", "trainer.scale=0.5", "+data.noise=0.0",
        "data.sources.0.rows=16", "+model.type=tiny",
    ]  # fmt: skip
    assert stopped(*free, stop=5) == ""
    assert stopped("trainer.scale=2", stop=6, accept=("trainer.scale",)) == ""


def test_what_is_missing_is_said(recipe: Write) -> None:
    path = recipe()
    text = (path.parent / "mine.py").read_text()
    (path.parent / "mine.py").write_text(text.replace("    model_factory: Tiny | None\n", ""))
    for changes, message in (
        (["~model"], r"optimizer: the trainer has no model .*`model:` \(.*tiny, wide\)"),
        (["model.type=tiny", "~data"], "data: there are no samples"),
    ):
        changes = [f"+{c}" if "=" in c else c for c in changes]
        with pytest.raises(ConfigError, match=message):
            build_trainer(load_recipe(path, changes)).train()
