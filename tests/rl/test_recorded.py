"""Recorded episodes are shown, and played again from the weights that had played them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_rollout_runs import trainer_of
from typer.testing import CliRunner

from paceline import CheckpointPolicy
from paceline.checkup.replay_rollout import replay_rollout
from paceline.cli.app import app
from paceline.errors import ConfigError, PacelineError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    policy = CheckpointPolicy(every_epochs=None, every_steps=3, save_best=False, keep_last=9)
    trainer_of(folder, checkpoint=policy).train(seed=3)
    return folder / "run"


def test_an_episode_is_played_again_bit_by_bit(run: Path) -> None:
    """From the checkpoint before its experience, and from the start; the run's folder stays."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for experience, episode in ((2, 3), (0, 1)):
        replayed = replay_rollout(trainer_of(None), run, experience, episode)
        assert replayed.reproduced
        assert (replayed.checkpoint is None) == (experience == 0)
        assert replayed.recorded["turns"][0]["version"] > 0 or experience == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    other = trainer_of(None)
    other.sampler.width = 2
    with pytest.raises(PacelineError, match=r"sampler\.width: 3 then, 2 now"):
        replay_rollout(other, run, 2, 3)
    with pytest.raises(ConfigError, match="has no episode 7:0; the last one is 2:4"):
        replay_rollout(trainer_of(None), run, 7, 0)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["rollouts", *map(str, arguments)])


def test_the_command_shows_the_best_episodes_of_an_experience(run: Path) -> None:
    shown = invoke(run, "--experience", 0, "--best", 2).output.splitlines()
    assert shown[0].startswith("experience 0: 5 episodes, mean reward 0.")
    assert len(shown) == 1 + 2 * (1 + 12)
    assert shown[1].startswith("0:")
    depths = [len(line) - len(line.lstrip()) for line in shown[2:6]]
    assert depths[1] == depths[2] > depths[0]
    lines = invoke(run, "--json").output.splitlines()
    assert [json.loads(line)["episode"] for line in lines] == [0, 1, 2, 3, 4]
    assert json.loads(lines[0])["experience"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experience", "9"], "no experience 9: they are 0 to 2"),
        (["--replay", "one"], "expected EXPERIENCE:EPISODE, such as 4:0"),
        (["trainer.epochs=3"], "have an effect with --replay only"),
    ],
)
def test_what_is_wrong_is_said(run: Path, arguments: list[str], said: str) -> None:
    result = invoke(run, *arguments)
    assert said in str(result.exception)
