"""What a shell is answered when the user presses Tab."""

from __future__ import annotations

import pytest

from paceline.cli.app import app


def bash(line: str) -> dict[str, str]:
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    return {**asked, "_PACELINE_COMPLETE": "complete_bash"}


def zsh(line: str) -> dict[str, str]:
    return {"_TYPER_COMPLETE_ARGS": line, "_PACELINE_COMPLETE": "complete_zsh"}


def fish(line: str) -> dict[str, str]:
    asked = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return {**asked, "_PACELINE_COMPLETE": "complete_fish"}


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (bash("paceline tr"), "train"),
        (bash("paceline train fit.yaml --res"), "--resume"),
        (bash("paceline export runs/fit --weights av"), "averaged"),
        (bash("paceline train fi"), ""),  # so that the shell itself completes the file's name
        (zsh("paceline pref"), "preflight"),
        (fish("paceline export runs/fit --ch"), "--checkpoint"),
    ],
)
def test_a_shell_completes_commands_options_and_choices(asked, answer, monkeypatch, capsys):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        app(prog_name="paceline")
    assert ended.value.code == 0
    said = capsys.readouterr().out.strip()
    assert said == answer if "COMP_WORDS" in asked else answer in said
