"""A run that starts from the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import CheckpointPolicy, Resume, Trainer
from paceline.errors import CheckpointError
from paceline.testing import StopAt
from small import checkpoints, fitted, line, same, settings, weights


def deeper() -> nn.Module:
    return nn.Sequential(line(), nn.Linear(1, 1))


def test_init_from_takes_weights_alone_and_says_which(tmp_path: Path, capsys: Any) -> None:
    source = fitted(model=deeper(), run_dir=tmp_path / "old")
    model = nn.Sequential(line(seed=9), nn.Linear(1, 2), nn.Linear(2, 1))
    seen: dict[str, Any] = {}
    trainer = Trainer(
        **settings(model=model, run_dir=tmp_path / "new", resume=Resume(init_from=tmp_path / "old"))
    )
    trainer.on_train_start = lambda: seen.update(
        weight=model[0].weight.clone(), step=trainer.global_step
    )
    trainer.fit()
    assert torch.equal(seen["weight"], source.model[0].weight)
    assert (seen["step"], trainer.local_batches) == (0, 10)
    said = capsys.readouterr().err
    assert "2 tensors loaded" in said
    assert "missing: model.1.weight, model.1.bias, model.2.weight, model.2.bias" in said
    assert "unexpected: model.1.weight, model.1.bias" in said


def test_init_from_is_for_a_new_run_alone(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path / "old", lr=0.5)
    start = Resume(init_from=tmp_path / "old" / "checkpoints" / "step_00000010")
    fitted(run_dir=tmp_path / "new", callbacks=[StopAt(3)], resume=start)
    resumed = fitted(run_dir=tmp_path / "new", resume=start)
    assert resumed.local_batches == 7
    assert same(weights(resumed), weights(fitted(run_dir=tmp_path / "whole", resume=start)))


def test_init_from_falls_back_on_an_older_intact_checkpoint(tmp_path: Path, capsys: Any) -> None:
    fitted(run_dir=tmp_path / "old", checkpoint=CheckpointPolicy(keep_last=None))
    folder = tmp_path / "old" / "checkpoints"
    next((folder / "step_00000010").glob("*.safetensors")).write_bytes(b"torn")
    fitted(run_dir=tmp_path / "new", resume=Resume(init_from=tmp_path / "old"))
    said = capsys.readouterr().err
    assert "an older checkpoint is looked for" in said
    assert "step_00000005: 2 tensors loaded" in said
    assert checkpoints(tmp_path / "old") == ["step_00000005", "step_00000010"]  # left alone


def test_init_from_what_has_nothing_in_common_is_refused(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path / "old")
    trainer = Trainer(
        **settings(
            model=(model := nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            resume=Resume(init_from=tmp_path / "old"),
        )
    )
    with pytest.raises(CheckpointError, match="no tensor there fits"):
        trainer.fit()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        fitted(resume=Resume(init_from=tmp_path / "empty"))
