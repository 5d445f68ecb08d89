"""run.json says what a run was and never holds a secret; the plan says what was decided."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest

from paceline.log import files
from paceline.log.plan import Plan
from paceline.log.provenance import git_state
from paceline.log.run_record import RunRecord, read_run
from paceline.log.secrets import is_credential, mask_command, mask_text, without_credentials


def test_what_is_certainly_a_credential_of_a_header() -> None:
    headers = ("x-token", "X-Api-Token", "authorization", "Proxy-Authorization", "Ocp-Apim-Key")
    assert all(map(is_credential, headers))
    kept = ("pad_token", "text_key", "eos_token", "sort_key", "token", "key", "tokenizer", "x-keys")
    assert not any(map(is_credential, kept))
    given = {"headers": {"x-token": "abc", "Accept": "json"}, "pad_token": "<pad>"}
    held = {"headers": {"x-token": "???", "Accept": "json"}, "pad_token": "<pad>"}
    assert without_credentials(given) == held


def started(run_dir: Path, **settings) -> RunRecord:
    record = RunRecord(run_dir)
    record.start(**{"seed": 3, "argv": ["python", "train.py"], **settings})
    return record


def test_a_run_explains_itself(tmp_path: Path) -> None:
    plan = Plan()
    plan.add("8 samples a step", "global_batch_size")
    record = started(tmp_path, plan=plan.as_list(), world_size=2)
    held = read_run(tmp_path)
    assert (held["status"], held["seed"], held["world_size"]) == ("running", 3, 2)
    assert held["command"] == ["python", "train.py"]
    assert held["plan"] == [{"decision": "8 samples a step", "setting": "global_batch_size"}]
    assert {"python", "torch", "paceline", "numpy", "platform"} <= held["versions"].keys()
    assert held["hardware"]["cores"]["usable"] >= 1
    assert held["hardware"]["memory_bytes"] > 0
    assert held["started"]
    assert held["ended"] is None

    record.update(best={"val/loss": 0.5})
    record.finish("stopped", "SIGTERM")
    held = read_run(tmp_path)
    assert (held["status"], held["stopped_by"], held["best"]) == (
        "stopped",
        "SIGTERM",
        {"val/loss": 0.5},
    )
    assert held["ended"] >= held["started"]


def test_earlier_starts_are_kept_and_a_killed_one_is_recognised(tmp_path: Path) -> None:
    started(tmp_path, seed=1).finish("stopped", "SIGTERM")
    started(tmp_path, seed=2)  # killed: never finished
    started(tmp_path, seed=3)
    held = read_run(tmp_path)
    assert [(start["seed"], start["status"]) for start in held["starts"]] == [
        (1, "stopped"),
        (2, "failed"),
    ]
    assert "killed" in held["starts"][1]["stopped_by"]
    assert all("starts" not in start for start in held["starts"])
    started(tmp_path, fresh=True)
    assert read_run(tmp_path)["starts"] == []


def test_a_damaged_record_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": ')
    started(tmp_path)
    assert read_run(tmp_path)["starts"] == []
    assert (tmp_path / "run.damaged.json").read_text() == '{"status": '


def test_a_crash_while_writing_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = started(tmp_path)
    before = (tmp_path / "run.json").read_bytes()

    def crash(*_: object) -> None:
        assert (tmp_path / "run.json").read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="No space"):
        record.update(best=1)
    record.finish("complete")  # a failing disk must not hide why the run ended
    assert (tmp_path / "run.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["run.json"]


def test_metrics_that_json_has_no_way_to_write_come_back(tmp_path: Path) -> None:
    record = started(tmp_path)
    record.update(metrics={"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.5})
    strict = {"parse_constant": lambda text: pytest.fail(f"{text} is no JSON")}
    assert json.loads((tmp_path / "run.json").read_text(), **strict)["metrics"]["c"] == "nan"
    back = read_run(tmp_path)["metrics"]
    assert [back["a"], back["b"], back["d"]] == [math.inf, -math.inf, 0.5]
    assert math.isnan(back["c"])


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such status: 'done'"):
        started(tmp_path).finish("done")


def test_without_a_run_folder_nothing_is_written() -> None:
    record = RunRecord(None)
    record.start(seed=0)
    record.update(best=1)
    record.finish("complete")
    assert record.record == {}


@pytest.mark.parametrize(
    "argument",
    [
        "--token=SECRET",
        "--hf-token=SECRET",
        "logger.api_key=SECRET",
        "+model.password=SECRET",
        "WANDB_API_KEY=SECRET",
        "storage=postgresql://user:SECRET@host/db",
        "loggers={token: SECRET, lr: 1}",
        'loggers={"token": "SECRET", "lr": 1}',
        "https://host/data?api_key=SECRET&page=2",
        "Authorization: Bearer SECRET",
        "x=hf_SECRETSECRETSECRETSECRET",
    ],
)
def test_secrets_are_masked(argument: str, tmp_path: Path) -> None:
    assert "SECRET" not in str(mask_command(["train", argument]))
    record = started(tmp_path, argv=["train", argument], plan=[argument])
    record.finish("failed", f"ValueError: cannot use {argument}")
    assert "SECRET" not in json.dumps(read_run(tmp_path))


def test_a_secret_with_spaces_is_masked_whole() -> None:
    assert mask_command(["+model.password=one two"]) == ["+model.password=***"]


def test_the_word_after_a_secret_option_is_masked() -> None:
    command = ["train", "--token", "abc", "--lr", "0.1", "--password", "--verbose"]
    assert mask_command(command) == [
        "train",
        "--token",
        "***",
        "--lr",
        "0.1",
        "--password",
        "--verbose",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512",
        "tokenizer=gpt2",
        "tokenizer: gpt2",
        "KeyError: 'val/loss'",
        "no such key: val/loss",
        "author=me",
        "https://host/a@b",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert mask_text(text) == text
    assert mask_command([text]) == [text]


def test_of_the_environment_only_the_listed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_PRIVATE_THING", "SECRET")
    started(tmp_path)
    assert read_run(tmp_path)["environment"]["OMP_NUM_THREADS"] == "3"
    assert "SECRET" not in (tmp_path / "run.json").read_text()


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "trunk")
    assert git_state(tmp_path) == {"commit": None, "branch": "trunk", "dirty": False}
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert (clean["branch"], clean["dirty"]) == ("trunk", False)
    (tmp_path / "code.py").write_text("2")
    git("checkout", "--detach")
    assert git_state(tmp_path) == {**clean, "branch": None, "dirty": True}


def test_a_machine_without_git_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_the_plan_lists_each_decision_once() -> None:
    plan = Plan()
    plan.add("accumulate 4 micro-batches", "gradient_accumulation_steps")
    plan.add("fp32")
    plan.add("fp32")
    plan.add("validates every 5", "validate_every", given=True)
    assert [str(line) for line in plan] == [
        "accumulate 4 micro-batches  [gradient_accumulation_steps]",
        "fp32",
        "validates every 5  [validate_every]",
    ]
    out = io.StringIO()
    plan.show(out)
    assert out.getvalue().splitlines() == [
        "plan: accumulate 4 micro-batches  [gradient_accumulation_steps]",
        "plan: fp32",
    ], "what the user has set is written down alone"


def test_on_a_terminal_the_plan_is_shown_too() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plan = Plan()
    plan.add("order [block 64]", "train_dataloader")
    out = Terminal()
    plan.show(out)
    assert re.sub(r"\x1b\[\d*m", "", out.getvalue()).splitlines() == [
        "Plan",
        "  order [block 64]  [train_dataloader]",
    ]


def test_a_record_nested_deeper_than_python_reads_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert started(tmp_path).record["starts"] == []
    assert (tmp_path / "run.damaged.json").exists()
