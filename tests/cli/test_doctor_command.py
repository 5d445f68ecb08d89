"""`paceline doctor`: its exit codes and its JSON."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from paceline.cli.main import main


def test_a_terminal_without_utf8_is_a_warning_and_code_0(paceline):
    code, out, err = paceline("doctor", "--no-self-test", PYTHONIOENCODING="ascii")
    assert code == 0, err
    assert "WARN  encoding" in out
    assert "P1 exact resume" not in out


def test_json_is_alone_on_stdout(paceline):
    code, out, _ = paceline("doctor", "--no-self-test", "--json", COLUMNS="20")
    assert code == 0
    assert json.loads(out)["passed"] is True


def test_the_self_test_passes(paceline, tmp_path):
    code, out, err = paceline("doctor", "--json", TMPDIR=str(tmp_path))
    assert code == 0, err
    passed = {c["name"]: c["detail"] for c in json.loads(out)["checks"] if c["status"] == "PASS"}
    assert {"P1 exact resume", "P5 a flipped bit"} <= {*passed}
    assert "7 and 6, each once" in passed["P4 every sample once"]
    assert not list(tmp_path.glob("paceline-doctor-*"))


def test_a_self_test_that_fails_is_code_1(monkeypatch, capsys):
    def taken(self: socket.socket, address: object) -> None:
        raise ZeroDivisionError("a defect on purpose")

    monkeypatch.setattr(socket.socket, "bind", taken)
    monkeypatch.setattr(sys, "argv", ["paceline", "doctor"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "FAIL  P4 every sample once: ZeroDivisionError: a defect on purpose" in said
