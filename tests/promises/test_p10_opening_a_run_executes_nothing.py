"""P10 Opening a run executes nothing: checkpoints are safetensors and JSON, and no pickle."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import paceline
from builders import Noisy, Regression, loader, make_model
from paceline.checkpoint import load_tree, verify
from paceline.errors import CheckpointError

SOURCE = Path(paceline.__file__).parent


def train(folder: Path) -> Path:
    model = make_model()
    Regression(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        train_dataloader=loader(Noisy()),
        max_steps=3,
        progress=False,
        run_dir=folder,
    ).train()
    [checkpoint] = (folder / "checkpoints").glob("step_*")
    return checkpoint


def test_every_file_of_a_checkpoint_is_safetensors_or_json(tmp_path: Path) -> None:
    for file in train(tmp_path).iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                assert opened.keys()
        else:
            json.loads(file.read_text())


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_a_pickle_in_a_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a pickle in place of any file, when the checkpoint is opened, then one clear error."""
    monkeypatch.chdir(tmp_path)
    check_pickles(tmp_path)


def check_pickles(tmp_path: Path) -> None:
    folder = train(tmp_path)
    for name in [file.name for file in folder.iterdir()]:
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            verify(folder)
        if name != "manifest.json":  # which only verifying reads
            with pytest.raises(CheckpointError):
                load_tree(folder)
        (folder / name).write_bytes(held)
    assert not Path("exploded").exists()
    verify(folder)


def test_the_source_holds_no_way_to_run_a_file() -> None:
    """No pickle, eval or exec anywhere, and torch.load only with weights_only=True."""
    offences = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                if {"pickle", "dill", "cloudpickle", "joblib", "marshal"} & set(names):
                    offences.append((path.name, node.lineno))
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                safe = any(
                    k.arg == "weights_only" and getattr(k.value, "value", None) is True
                    for k in node.keywords
                )
                if called in ("eval", "exec") or (called == "torch.load" and not safe):
                    offences.append((path.name, node.lineno))
    assert offences == []
