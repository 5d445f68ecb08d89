"""What a run keeps of its recipe and code: no credential, nothing of other runs, nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from paceline.checkup.preflight import told as told_in_a_line
from paceline.checkup.settings import settings_of
from paceline.errors import RecipeError
from paceline.log.traceback import told_in_full
from paceline.recipe import build_trainer, load_model, load_recipe
from paceline.runs import differences, find_runs

HUB = """

class Hub(Callback):
    def __init__(self, api_key: str = "", url: str = "", pad_token: str = "", fail: bool = False):
        self.api_key, self.fail = api_key, fail

    def on_train_end(self, trainer):
        if self.fail:
            raise RuntimeError(f"401 from https://x.y/?q={self.api_key}")
"""
KEY, SHAPED, PAD = "hunter2hunter2", "hf_abcdefghijklmnop", "<pad>"


@pytest.fixture
def hub(recipe, tmp_path: Path):
    """A recipe with a credential; builds a trainer."""
    path = recipe(callbacks=[{"_target_": "toy.Hub", "pad_token": PAD}])
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + HUB)

    def build(*overrides: str, path: Path = path):
        return build_trainer(load_recipe(path, overrides))

    return build


def test_no_credential_is_written_and_the_kept_recipe_asks_for_it(hub, tmp_path: Path) -> None:
    url = "callbacks.0.url=https://me:word@hub.org/x"
    given = (f"callbacks.0.api_key={KEY}", url, f"run.project={SHAPED}")
    with pytest.raises(RuntimeError) as caught:
        hub(*given[:2], "callbacks.0.fail=true").fit(seed=0)
    for told in (told_in_full(caught.value), told_in_a_line(caught.value)):
        assert "401 from https://x.y/?q=***" in told
        assert KEY not in told
    run = tmp_path / "runs/toy/baseline"
    written = "".join((run / name).read_text() for name in ("recipe.yaml", "run.json"))
    assert KEY not in written
    assert "word@" not in written
    assert "401 from" in json.loads((run / "run.json").read_text())["stopped_by"]
    kept = yaml.safe_load((run / "recipe.yaml").read_text())["callbacks"][0]
    assert (kept["api_key"], kept["url"], kept["pad_token"]) == ("???", "???", PAD)
    with pytest.raises(RecipeError, match=r"callbacks\.0\.api_key: '\?\?\?' stands for a value"):
        hub(path=run / "recipe.yaml")
    assert load_model(run).layers[0].out_features == 4  # a model needs none


def test_a_mistake_and_a_comparison_show_no_credential(hub, tmp_path: Path) -> None:
    given = [f"callbacks.0.api_key={KEY[:5]}", f"callbacks.0.url=https://me:{KEY}@hub.org"]
    previewed = settings_of(load_recipe(tmp_path / "toy.yaml", given).composed)
    assert KEY[:5] not in repr(previewed)
    with pytest.raises(RecipeError) as caught:
        hub("callbacks.0.api_key=[short]", f"callbacks.0.fail={SHAPED}", f"model.api_key={KEY}")
    assert not any(secret in str(caught.value) for secret in ("short", SHAPED, KEY))
    hub("run.name=one", "trainer.epochs=1").fit(seed=0)
    hub("run.name=two", "trainer.epochs=1").fit(seed=0)
    for name in ("one", "two"):  # as older versions wrote it
        file = tmp_path / f"runs/toy/{name}/recipe.yaml"
        file.write_text(file.read_text().replace(PAD, f"{PAD}\n  api_key: secret-of-{name}"))
    lines = differences(*find_runs(tmp_path / "runs"))
    shown = {line.key: (line.left, line.right) for line in lines}
    assert shown["callbacks.0.api_key"] == ("***", "***")


def test_a_package_is_kept_without_the_runs_in_it(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(code="toy")
    package = tmp_path / "toy"
    package.mkdir()
    (tmp_path / "toy.py").rename(package / "__init__.py")
    (package / "names.json").write_text("[]")
    (package / "large.bin").write_bytes(bytes(2 << 20))
    (package / ".venv").mkdir()
    (package / ".venv/a.py").touch()
    monkeypatch.chdir(package)  # the run's folder is then in the package
    for epochs in (1, 2):
        build_trainer(load_recipe(path, [f"trainer.epochs={epochs}"])).fit(seed=0)
    kept = package / "runs/toy/baseline/code"
    files = sorted(str(file.relative_to(kept)) for file in kept.rglob("*.*") if file.is_file())
    assert files == ["toy/__init__.py", "toy/names.json"]
    assert load_model(package / "runs/toy/baseline").layers[0].out_features == 4
