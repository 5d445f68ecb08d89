"""A step that was not finite is taken once more, exactly, and the module it comes from is named."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import CheckpointPolicy, Trainer
from paceline.checkup import replay_failure
from paceline.checkup.nonfinite_origin import Seen
from paceline.errors import ConfigError, NonFiniteError, PacelineError
from paceline.log import Sink
from paceline.trainer.nonfinite import kept_failures
from paceline.world.world import World
from small import checkpoints, points, same, settings, weights

STEP = 4  # whose window has row 14, the only one with a zero


def data() -> DataLoader:
    x, y = points().tensors
    x = x.clone()
    x[14, 0] = 0.0
    return DataLoader(TensorDataset(x, y), 4)


class Log(nn.Module):
    """Minus infinity for a zero, and NaN from there on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.log(x.abs())
        return x * (low - low)


class Root(nn.Module):
    """Finite for a zero, with an infinite gradient there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt((self.scale * x).abs())


class Masked(nn.Module):
    """Has minus infinities by intention, which are gone behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x[:, None, :] * x[:, :, None]
        scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)
        return x + 0.01 * (scores.softmax(-1) @ x[:, :, None])[..., 0]


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Masked(), nn.Dropout(0.3), part])
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.parts[2](x) + self.parts[1](self.parts[0](x)))


class Fit(Trainer):
    """Logs a metric that is not finite, which has no part in it; keeps the weights of the step."""

    check_gradients = True
    before: dict[str, Any]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("train/odd", torch.log(torch.zeros(())))
        if self.global_step == STEP - 1:
            self.before = weights(self)
        return super().training_step(batch, batch_idx)


def make(part: type[nn.Module], run_dir: Path, **changes: Any) -> Fit:
    torch.manual_seed(0)
    return Fit(
        **settings(
            Net(part()),
            train_dataloader=data(),
            run_dir=run_dir,
            checkpoint=CheckpointPolicy(every_steps=2),
            **changes,
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def failed(part: type[nn.Module], run_dir: Path, **changes: Any) -> Fit:
    trainer = make(part, run_dir, **changes)
    with pytest.raises(NonFiniteError):
        trainer.fit(seed=3)
    return trainer


@pytest.mark.parametrize(
    ("part", "phase", "operation", "value"),
    [(Log, "forward", "torch.log", "-inf"), (Root, "backward", "SqrtBackward0", "-inf")],
)
def test_the_module_is_named_and_the_run_is_only_read(
    part: type[nn.Module], phase: str, operation: str, value: str, tmp_path: Path
) -> None:
    """Given a run with dropout that failed, its weights at the step are the same bit by bit."""
    run = failed(part, tmp_path / "run")
    before = contents(tmp_path)
    again = make(part, tmp_path / "run")
    replay = replay_failure(again, tmp_path / "run")
    assert same(again.before, run.before)
    assert contents(tmp_path) == before  # also beside the run
    assert replay.reproduced
    assert (replay.step, replay.from_step) == (STEP, 2)
    (seen,) = replay.ranks
    origin = seen.origin
    assert origin is not None
    assert (origin.phase, origin.module, origin.value) == (phase, "model.parts.2", value)
    assert operation in str(origin.operation)
    assert seen.samples == (12, 13, 14, 15)
    assert bool(seen.losses) == (phase == "forward")
    place = str(origin.place).rpartition(":")
    assert place[0] == __file__
    assert (
        operation[:4].lower() in Path(__file__).read_text().splitlines()[int(place[2]) - 1].lower()
    )
    said = str(replay)
    for words in (
        f"step {STEP} of {tmp_path}/run, from step_00000002, after 1 step trained again:",
        f"first became non-finite in the {phase} pass of module model.parts.2: {operation}",
        "samples [12, 13, 14, 15]",
    ):
        assert words in said


def test_a_step_that_is_finite_now_is_said_to_be(tmp_path: Path) -> None:
    """Here from the start of the run, since no checkpoint is there."""
    failed(Log, tmp_path, on_nonfinite="raise", log_every=1)
    for checkpoint in (tmp_path / "checkpoints").glob("step_*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    trainer = make(Log, tmp_path)
    trainer.train_dataloader = DataLoader(points(), 4)
    replay = replay_failure(trainer, tmp_path)
    assert (replay.reproduced, replay.checkpoint, replay.from_step) == (False, None, 0)
    assert "the failure does not occur again" in str(replay)


def test_what_a_replay_says_names_the_run_and_not_its_own_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a run that skips, an earlier failure is said once more; its batch is the run's."""
    run = tmp_path / "run"
    make(Log, run, on_nonfinite="skip").fit(seed=3)
    shutil.rmtree(run / "checkpoints")  # so that the replay comes by the earlier one
    capfd.readouterr()
    replay_failure(make(Log, run, on_nonfinite="skip"), run)
    said = "".join(capfd.readouterr())
    assert ".replay-" not in said
    assert f"the batch is kept in {run}/nonfinite_step_{STEP}_rank_0" in said


class Rows(Sink):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def write(self, row: dict[str, Any]) -> None:
        self.found.append(row)


def test_accumulated_windows_and_those_that_a_rewind_has_passed_over(tmp_path: Path) -> None:
    """Given row 14 in step 2 and again in step 5, and the checkpoints before them removed."""
    how = {"gradient_accumulation_steps": 2, "on_nonfinite": "rewind"}
    run = make(Log, tmp_path, **how)
    run.checkpoint_policy = CheckpointPolicy(every_steps=1)
    run.fit(seed=3)
    assert run.progress.skips == [1, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    again = make(Log, tmp_path, **how, log_every=1, loggers=[(rows := Rows())])
    replay = replay_failure(again, tmp_path)
    assert (replay.step, replay.from_step, replay.reproduced) == (5, 0, True)
    assert not rows.found
    assert again.progress.skips == [1]


def test_the_checkpoint_before_a_failure_is_kept_until_another_failure(tmp_path: Path) -> None:
    """Given a policy that keeps one checkpoint, and row 14 in step 4 and again in step 9."""
    how = {"on_nonfinite": "stop", "epochs": 2}
    make(Log, tmp_path, **how).fit(seed=3)
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000004"]
    make(Log, tmp_path, **{**how, "on_nonfinite": "skip"}).fit(seed=3)
    assert checkpoints(tmp_path) == ["step_00000008", "step_00000010"]
    replay = replay_failure(make(Log, tmp_path, **how), tmp_path)
    assert (replay.step, replay.from_step, replay.reproduced) == (9, 8, True)


def test_what_was_not_finite_to_begin_with_is_named(tmp_path: Path) -> None:
    x, y = points().tensors
    x = x.clone()
    x[14] = math.nan
    loader = DataLoader(TensorDataset(x, y), 4)

    def bad() -> Fit:
        trainer = make(nn.Identity, tmp_path)
        trainer.train_dataloader = loader
        return trainer

    with pytest.raises(NonFiniteError):
        bad().fit(seed=3)
    said = str(replay_failure(bad(), tmp_path))
    assert "not finite to begin with: batch 3[0]" in said
    assert "no operation made it of finite numbers" in said


def test_the_step_is_known_where_no_value_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where the failure is found steps later; the run then stops."""
    monkeypatch.setattr(World, "reads_are_free", property(lambda self: False))
    run = make(Log, tmp_path, on_nonfinite="stop", log_every=5)
    run.fit(seed=3)
    assert run.result.stopped_by == "non-finite"
    assert kept_failures(tmp_path) == {STEP: [0]}
    replay = replay_failure(make(Log, tmp_path, on_nonfinite="stop", log_every=5), tmp_path)
    assert [str(seen.origin and seen.origin.module) for seen in replay.ranks] == ["model.parts.2"]


def test_what_cannot_be_replayed_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no failure to replay.*\.$"):
        replay_failure(make(Log, tmp_path), tmp_path / "none")
    failed(Log, tmp_path)
    trainer = make(Log, tmp_path)
    trainer.max_steps = 3
    with pytest.raises(PacelineError, match="ended before step 4, at step 3"):
        replay_failure(trainer, tmp_path)


def test_ranks_that_only_got_anothers_nan_are_silent() -> None:
    from paceline.checkup.replay import Replay

    bad = Seen(1, {0: math.nan}, "model.a", None, (), (), (3,))
    told = Seen(0, {}, "model.a", None, (), (), (2,))
    said = str(Replay(Path("r"), 1, None, 0, (told, bad), 2))
    assert "rank 1: loss nan of batch 0; samples [3]" in said
    assert "rank 0" not in said
