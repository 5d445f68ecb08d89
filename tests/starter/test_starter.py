"""`paceline new`: the project works as it was written, and nothing that exists is touched."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from command import Paceline
from paceline.errors import ConfigError
from paceline.starter import new_project
from paceline.testing import Ranks


def be_pytest(folder: Path) -> None:
    """Makes this forked process what `pytest` in a folder would be."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider"]))


def test_a_project_has_a_recipe_a_module_a_test_and_a_readme(tmp_path: Path) -> None:
    files = new_project("spirals", tmp_path / "made/for/it")
    assert [str(p.relative_to(tmp_path / "made/for/it")) for p in files] == [
        "spirals/recipe.yaml",
        "spirals/spirals.py",
        "spirals/test_spirals.py",
        "spirals/README.md",
    ]
    assert not [p for p in files if "__NAME__" in p.read_text()]
    assert len(files[-1].read_text().splitlines()) <= 16


def test_its_test_passes_as_generated(tmp_path: Path, ranks: Ranks) -> None:
    new_project("spirals", tmp_path)
    [done] = ranks.outcomes(be_pytest, 1, tmp_path / "spirals")
    assert done.code == 0, done.output
    assert "1 passed" in done.output


def test_its_test_fails_where_a_resume_is_not_exact(tmp_path: Path, ranks: Ranks) -> None:
    """Given a model with a cache that no checkpoint has, then the generated test tells."""
    new_project("spirals", tmp_path)
    with (tmp_path / "spirals/spirals.py").open("a") as file:
        file.write(
            "\n\ndef forward(self, x):\n"
            "    self.calls = [*getattr(self, 'calls', []), x]\n"
            "    return nn.Sequential.forward(self, x) * len(self.calls)\n\n\n"
            "Net.forward = forward\n"
        )
    [done] = ranks.outcomes(be_pytest, 1, tmp_path / "spirals")
    assert done.code == 1
    assert "1 failed" in done.output


def test_its_readme_shows_only_what_works(tmp_path: Path, ranks: Ranks) -> None:
    *_, readme = new_project("spirals", tmp_path)
    commands = readme.read_text().split("```sh\n")[1].split("```")[0].splitlines()
    paceline = Paceline(tmp_path / "spirals", ranks)
    for command in (commands[0].replace(" #", " --dry-run #"), *commands):
        program, *words = shlex.split(command, comments=True)
        if program == "paceline":
            code, out, err = paceline(*words)
            assert code == 0, out + err
        else:
            assert program == "pytest"  # `test_its_test_passes_as_generated`
    runs = tmp_path / "spirals/runs/spirals"
    assert json.loads((runs / "baseline/run.json").read_text())["best"] > 0.95  # a guess is 1/3
    assert list((runs / "baseline/exports").glob("*.safetensors"))


def test_it_is_clean_code(tmp_path: Path) -> None:
    new_project("spirals", tmp_path)
    for words in (("check", "--select=E,F,W,I,B,UP,SIM,RUF"), ("format", "--check")):
        command = [sys.executable, "-m", "ruff", *words, "--isolated", "--no-cache", "spirals"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "spirals").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        new_project("spirals", tmp_path)
    assert list((tmp_path / "spirals").iterdir()) == []
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        new_project("taken", tmp_path)
    with pytest.raises(ConfigError, match="cannot be created"):
        new_project("spirals", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("my-net", "'my_net'"),
        ("3d Net", "'project_3d_net'"),
        ("_hidden", "'hidden'"),
        ("größe", "'gr_e'"),
        ("../up", "'up'"),
        ("", "a letter first."),
        ("class", "'class_project'"),
        ("json", "'json_project'"),
        ("torch", "'torch_project'"),
        ("paceline", "'paceline_project'"),
    ],
)
def test_a_name_that_would_not_work_gets_a_suggestion(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        new_project(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
