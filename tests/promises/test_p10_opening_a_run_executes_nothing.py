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


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    model = make_model()
    Regression(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        train_dataloader=loader(Noisy()),
        max_steps=3,
        progress=False,
        run_dir=tmp_path,
    ).train()
    return tmp_path


def test_every_file_of_a_checkpoint_is_safetensors_or_json(run_dir: Path) -> None:
    [folder] = (run_dir / "checkpoints").glob("step_*")
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                assert opened.keys()
        else:
            json.loads(file.read_text())


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_a_pickle_in_a_checkpoint_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a pickle in place of any file, when the checkpoint is opened, then one clear error."""
    monkeypatch.chdir(run_dir)
    [folder] = (run_dir / "checkpoints").glob("step_*")
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
