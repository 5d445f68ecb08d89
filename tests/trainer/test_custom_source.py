"""A training source of the user's own: resumed exactly, stopped while it collects, refused."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_runs import EPOCHS, Sent, train, trainer_of

from builders import code_forgotten
from endings import ending, saved_steps
from paceline import CheckpointPolicy, Draw, Resume, StopCollecting
from paceline.checkpoint import load_tree
from paceline.checkup import fits, preview
from paceline.errors import ConfigError, DataError, ResumeError
from paceline.recipe import load_recipe
from paceline.testing import Ranks, rows
from small import message

SIZES = [1, 2]


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """How runs end that nobody breaks off, by the number of ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    for size in SIZES:
        (folder / str(size)).mkdir()
        ranks(train, size, folder / str(size), None)
    return {size: whole_ending(folder / str(size)) for size in SIZES}


def whole_ending(folder: Path) -> dict[str, Any]:
    """The end of a run, with every rank's place in its data."""
    step = saved_steps(folder / "run")[-1]
    tree = load_tree(folder / "run" / "checkpoints" / f"step_{step:08d}")
    places = {rank: repr(state["data"]) for rank, state in tree["rank"].items()}
    return {**ending(folder / "run"), "places": places}


def test_ranks_with_uneven_episodes_and_epochs_end_together(unbroken: dict[int, Any]) -> None:
    """Rank 0 has 3 windows an epoch and rank 1 has 4, with 1 to 3 episodes of any length each."""
    assert unbroken[1]["progress"]["global_step"] == 3 * EPOCHS
    assert unbroken[2]["progress"]["global_step"] == 4 * EPOCHS
    assert unbroken[2]["progress"]["samples"] > unbroken[1]["progress"]["samples"]
    first, second = unbroken[2]["places"].values()
    assert first != second


@pytest.mark.parametrize("size", SIZES)
def test_a_run_killed_while_it_collects_goes_on_exactly(
    ranks: Ranks, unbroken: dict[int, Any], tmp_path: Path, size: int
) -> None:
    kill = Sent(signal.SIGKILL, sender=size - 1, target=size - 1)
    killed = ranks.outcomes(train, size, tmp_path, kill)
    assert killed[-1].code == -signal.SIGKILL
    ranks(train, size, tmp_path, None)
    assert whole_ending(tmp_path) == unbroken[size]


@pytest.mark.parametrize(
    ("size", "sent"),
    [
        (1, Sent(signal.SIGTERM, lasting=60)),
        (1, Sent(signal.SIGTERM, window=0, lasting=60)),  # in the epoch's first
        (2, Sent(signal.SIGTERM, 1, 1, lasting=60)),
        (2, Sent(signal.SIGTERM, 1, 0, lasting=60)),  # to one that waits for the other's window
        (2, Sent(signal.SIGTERM, 1, 0, window=3, lasting=60)),  # ... and has none left
        (2, Sent(signal.SIGTERM, 0, 0, lasting=1.5, asks=False)),
    ],
    ids=["alone", "first-window", "collecting", "waiting", "ended", "never-asks"],
)
def test_a_signal_while_it_collects_stops_all_ranks_before_that_window(
    ranks: Ranks, unbroken: dict[int, Any], tmp_path: Path, size: int, sent: Sent
) -> None:
    stopped = ranks.outcomes(train, size, tmp_path, sent)
    took = time.time() - (tmp_path / "sent").stat().st_mtime
    assert [one.code for one in stopped] == [75] * size, stopped
    assert took < (4 if sent.asks else 6), "0.3 s of them before the signal"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stopped_by"] == "signal SIGTERM"
    windows = 3 if size == 1 else 4
    assert saved_steps(tmp_path / "run")[-1] == record["step"] == windows + sent.window
    ranks(train, size, tmp_path, None)
    assert whole_ending(tmp_path) == unbroken[size]


def test_a_source_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its sizes, its length and its plan are those of the run."""
    trainer = trainer_of(tmp_path)
    trainer.train_dataloader = Fixed()
    trainer.train(seed=1)
    assert trainer.global_step == 2 * EPOCHS
    assert trainer.training_horizon == 2 * EPOCHS
    assert trainer.train_batches == 4
    assert [row["samples"] for row in rows(tmp_path / "run")][-1] == 2 * 5 * EPOCHS
    assert any("fixed rows" in str(line) for line in trainer.plan.as_list())


class Fixed:
    """The smallest source: two windows an epoch, of 2 and 3 rows."""

    micro_batches = 4
    windows_per_epoch = 2
    per_rank = False
    sizes = [2, 3]
    samples = 5

    def __init__(self, **identity: Any) -> None:
        self.identity: dict[str, Any] = identity
        self.plan = [("fixed rows", "rows")]
        self.window = 0
        self.epoch = 0

    def start_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.window = epoch, 0

    def draw(self) -> Draw | None:
        if self.window == 2:
            return None
        self.window += 1
        made = [(torch.ones(n, 8), torch.ones(n, 1)) for n in (2, 3)]
        return Draw(list(self.sizes), self.samples, made.__getitem__, lambda j: [])

    def at_end(self, *, keep: bool) -> bool:
        return self.window == 2

    def batches_done(self) -> int:
        return 2 * self.window

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window = state["epoch"], state["window"]

    def close(self) -> None:
        pass


def test_a_resumed_run_must_find_the_sources_settings_unchanged(tmp_path: Path) -> None:
    def start(gamma: float, epochs: int) -> None:
        trainer = trainer_of(tmp_path)
        trainer.train_dataloader = Fixed(gamma=gamma)
        trainer.train(epochs=epochs)

    start(0.9, 1)
    with pytest.raises(ResumeError, match=r"data\.gamma: 0\.9 then, 0\.8 now"):
        start(0.8, 2)
    start(0.9, 2)


class Forgetful(Fixed):
    """Draws what makes no window."""

    def __init__(self, gives: Any) -> None:
        super().__init__()
        self.gives = gives

    def draw(self) -> Draw | None:
        if isinstance(self.gives, type):
            raise self.gives
        return self.gives


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (None, "gave no window in epoch 0"),
        (Draw.of([]), "gave a window without a micro-batch"),
        (StopCollecting, "raised StopCollecting, but the run does not stop"),
        (Draw([3], 5, [torch.ones(3)].__getitem__, lambda j: []), "samples=5"),
        (Draw([-1], 3, [torch.ones(3)].__getitem__, lambda j: []), "samples=3"),
    ],
)
def test_a_draw_that_makes_no_window_is_an_error_that_says_why(gives: Any, said: str) -> None:
    assert said in message(DataError, train_dataloader=Forgetful(gives))


class Collecting(Fixed):
    """Collects, for an epoch, what the draws give; on even epochs there is nothing to collect."""

    def __init__(self, stop_in: int | None = None) -> None:
        super().__init__()
        self.windows, self.collected, self.stop_in = 0, -1, stop_in
        self.stopping: Any = None

    def open_source(self, size: Any, seed: int, world: Any, stopping: Any) -> Any:
        self.stopping = stopping
        return self

    def collect(self) -> None:
        if self.collected == self.epoch:
            return
        if self.stop_in == self.epoch:
            signal.raise_signal(signal.SIGTERM)
        if self.stopping():
            raise StopCollecting
        self.collected, self.windows = self.epoch, 2 * (self.epoch % 2)

    def draw(self) -> Draw | None:
        assert self.collected == self.epoch
        return super().draw() if self.window < self.windows else None

    def at_end(self, *, keep: bool) -> bool:
        return self.window >= self.windows

    def state_dict(self) -> dict[str, Any]:
        own = {"collected": self.collected, "windows": self.windows}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.collected, self.windows = state["collected"], state["windows"]


def test_an_epoch_for_which_nothing_was_collected_has_no_step(tmp_path: Path) -> None:
    """Epochs 0, 2 and 4 are empty: they end, are counted, validated and saved as all others are."""
    ended: list[tuple[int, int]] = []

    def start(folder: str, stop_in: int | None) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = trainer_of(tmp_path / folder)
        trainer.on_train_epoch_end = lambda: ended.append(
            (trainer.current_epoch, trainer.global_step)
        )
        trainer.train_dataloader = Collecting(stop_in)
        trainer.train(epochs=5, seed=1)
        return trainer

    whole = start("whole", None)
    assert ended == [(0, 0), (1, 2), (2, 2), (3, 4), (4, 4)]
    assert (whole.progress.empty_epochs, whole.global_step) == (3, 4)
    for epoch in range(5):
        folder = f"stopped in {epoch}"
        with pytest.raises(SystemExit, match="75"):
            start(folder, epoch)
        assert saved_steps(tmp_path / folder / "run")[-1] == 2 * (epoch // 2), "before that epoch"
        start(folder, None)
        assert ending(tmp_path / folder / "run") == ending(tmp_path / "whole" / "run")


class Half:
    """Some of a source."""

    windows_per_epoch = micro_batches = None
    per_rank, plan, identity = True, [], {}

    def start_epoch(self, epoch: int) -> None: ...
    def draw(self) -> None: ...
    def batches_done(self) -> int: ...


class MakesHalves:
    def open_source(self, size: Any, seed: int, world: Any, stopping: Any) -> Any:
        return Half()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Half(), "lacks at_end, state_dict, load_state_dict, close to be a source"),
        (MakesHalves(), "gave a Half, which lacks at_end, state_dict, load_state_dict, close"),
        (object(), "cannot be iterated"),
    ],
)
def test_what_is_no_source_yet_is_told_what_it_lacks(given: Any, said: str) -> None:
    assert said in message(ConfigError, train_dataloader=given)


def test_settings_that_a_source_would_not_hear_of_are_refused() -> None:
    for name in ("gradient_accumulation_steps", "global_batch_size", "epoch_length"):
        said = message(ConfigError, train_dataloader=Fixed(), **{name: 2})
        assert f"{name}: the source given as train_dataloader makes its own windows" in said
    assert "cannot be iterated" in message(ConfigError, val_dataloader=Fixed())


def test_a_stop_that_is_asked_for_as_a_draw_ends_leaves_that_window(tmp_path: Path) -> None:
    """The state that is saved is from before the draw."""

    class Asking(Fixed):
        def draw(self) -> Draw | None:
            if (self.epoch, self.window) == (1, 0):
                trainer.request_stop("enough")
            return super().draw()

    trainer = trainer_of(tmp_path)
    trainer.train_dataloader = Asking()
    trainer.checkpoint_policy = CheckpointPolicy(every_epochs=None, save_best=False)
    assert trainer.train().stopped_by == "enough"
    assert trainer.global_step == 2
    tree = load_tree(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert tree["data"] == {"epoch": 1, "window": 0}
    assert tree["callbacks"]["CountEpochs"] == {"begun": 2}
    assert trainer_of_again(tmp_path).callbacks[0].begun == EPOCHS


def trainer_of_again(folder: Path) -> Any:
    """The run, gone on to its end."""
    trainer = trainer_of(folder)
    trainer.train_dataloader = Fixed()
    trainer.resume = Resume(accept=("code",))
    trainer.train()
    return trainer


RECIPE = """
code: rows.py
trainer: {epochs: 3}
model: {_target_: torch.nn.Linear, in_features: 8, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
lr_scheduler: {_target_: torch.optim.lr_scheduler.CosineAnnealingLR}
train_dataloader: {_target_: rows.KIND}
"""
CODE = """
from test_custom_source import Fixed

class Rows(Fixed):
    pass

class Makes:
    windows_per_epoch = 2

    def open_source(self, size, seed, world, stopping):
        return Rows()
"""


@pytest.mark.parametrize("kind", ["Rows", "Makes"])
def test_a_recipe_names_a_source_and_its_checks_take_it(tmp_path: Path, kind: str) -> None:
    """The schedule's length, the preview and what a run would need on other hardware."""
    (tmp_path / "rows.py").write_text(CODE)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("KIND", kind))
    with code_forgotten():
        recipe = load_recipe(tmp_path / "r.yaml", [f"run.dir={tmp_path / 'run'}"])
        shown = preview(recipe)
        assert shown.problem == ""
        assert shown.training["steps in the run"] == "6"
        assert ("the schedule's T_max is 6 optimizer steps", "lr_scheduler.T_max") in shown.plan
        assert not [c for c in fits(recipe, "4xcpu-16GB").checks if c.status == "FAIL"]
