"""P10 Opening a run executes nothing: checkpoints are safetensors and JSON, and no pickle."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import paceline
from builders import Noisy, Regression, loader, make_model
from command import Paceline
from paceline.checkpoint import CheckpointPolicy, NativeEngine, load_tree, verify
from paceline.errors import CheckpointError
from paceline.runs import find_runs
from paceline.runs.text import cell
from paceline.testing import Ranks
from paceline.world.world import World

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


BELL = "\x1b]0;gone\x07\x1b[2J\u202e"
RECIPE = f"""\
code: hostile.py
model: {{_target_: os.system, _args_: [touch exploded]}}
trainer: {{_target_: hostile.Trainer, huge: {10**400}, odd: !!binary aGk=}}
"{BELL.encode("unicode_escape").decode()}": "${{oc.env:HOME}}"
"""
HOSTILE_YAML = {
    "python": "!!python/object/apply:os.system ['touch exploded']",
    "laughs": "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]",
    "deep": "[" * 50_000,
    "cycle": "&a [*a]",
    "long number": "a: 0x" + "f" * 20_000,
    "long key": "1" + "0" * 5000 + ": 1",
    "bytes": "\x00\x01",
}


def hostile_run(folder: Path, recipe: str = RECIPE) -> Path:
    """A run folder whose every file wishes its reader ill."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hostile.py").write_text("open('exploded', 'w')")
    (folder / "recipe.yaml").write_text(recipe)
    record = {
        "status": "complete" + BELL,
        "step": 10**400,
        "best": "1" * 10_000,
        "metrics": {BELL: BELL, "../../etc/passwd": -(10**300), "nested": {"a": {"b": 1}}},
        "started": BELL,
        "ended": {"a": 1},
        "starts": {"not": "a list"},
        "_target_": "os.system",
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_listing_hostile_runs_runs_nothing_and_sends_the_terminal_nothing_raw(
    tmp_path: Path, ranks: Ranks
) -> None:
    """Given escape sequences in every name and value, when runs are listed, then they are shown
    escaped, as text."""
    command = Paceline(tmp_path, ranks)
    hostile_run(tmp_path / "runs" / f"evil{BELL}")
    (tmp_path / "runs" / f"broken{BELL}").mkdir()
    (tmp_path / "runs" / f"broken{BELL}" / "run.json").write_text("{")
    one = f"runs/evil{BELL}"
    for words in (
        ["runs"],
        ["runs", "runs", "--json"],
        ["runs", "--columns", f"name,trainer.huge,trainer.odd,{BELL},model._target_"],
        ["runs", "--sort", BELL],
        ["runs", "--diff", one, f"runs/broken{BELL}"],
        ["runs", "nested.a.c=1"],  # its error names the nearest keys
        ["runs", f"{BELL}=1"],
    ):
        _, *sent = command(*words)
        assert "Traceback" not in sent[1], sent
        for text in sent:
            assert all(c.isprintable() or c == "\n" for c in text), text
    assert "evil" in command("runs")[1]
    assert "damaged" in command("runs")[1]
    assert not list(tmp_path.rglob("exploded"))


@pytest.mark.parametrize("recipe", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_a_hostile_recipe_is_read_as_text_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile_run(tmp_path / "run", recipe)
    [run] = find_runs(tmp_path)
    assert len(run.recipe) <= 1
    assert all(cell("", value).isprintable() for value in run.recipe.values())
    assert not list(tmp_path.rglob("exploded"))


def test_links_and_pipes_in_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    """Given a recipe and a record that are links to other files, then neither is shown."""
    secret = tmp_path / "secret"
    secret.write_text('{"status": "complete", "password": "xyzzy"}')
    run = hostile_run(tmp_path / "runs/a")
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to(secret)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/run.json").symlink_to(secret)
    (tmp_path / "runs/c").mkdir()
    os.mkfifo(tmp_path / "runs/c/run.json")
    (tmp_path / "runs/loop").symlink_to(tmp_path / "runs")
    found = {run.name: run for run in find_runs(tmp_path / "runs")}
    assert {name: run.status for name, run in found.items() if name != "a"} == {
        "b": "damaged",
        "c": "damaged",
    }
    assert found["a"].recipe == {}
    assert "xyzzy" not in str([run.values for run in found.values()])


def hostile_checkpoint(run: Path, models: dict) -> None:
    saver = NativeEngine(run / "checkpoints", CheckpointPolicy(), World())
    saver.save({"models": models}, 1, synchronous=True, info={"metrics": {BELL: 1.0}})
    saver.close()


def test_an_export_stays_in_its_folder_and_runs_nothing(tmp_path: Path, ranks: Ranks) -> None:
    """Given a model called `../../../evil`, or a linked exports folder, then no file appears."""
    command = Paceline(tmp_path, ranks)
    hostile_checkpoint(hostile_run(tmp_path / "runs/a"), {"../../../evil": {"w": torch.ones(2)}})
    hostile_checkpoint(hostile_run(tmp_path / "runs/b"), {"model": {BELL: torch.ones(2)}})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/b/exports").symlink_to(tmp_path / "elsewhere")
    hostile_checkpoint(hostile_run(tmp_path / "runs/c"), {"model": {BELL: BELL}})
    for run in "abc":
        code, _, err = command("export", f"runs/{run}")
        assert code in (1, 2)
        assert "Traceback" not in err, err
        assert all(c.isprintable() or c == "\n" for c in err)
    assert command("export", "runs/b", "--to", "mine")[0] == 0
    assert sorted(p.name for p in tmp_path.rglob("*_step_*")) == ["model_step_00000001.safetensors"]
    assert not list(tmp_path.rglob("exploded"))
    assert not list(tmp_path.rglob("*evil*"))
