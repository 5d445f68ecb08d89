"""`paceline train`: its exit codes, and what it prints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("trainer.epochs=1000", "trainer.pause=0.05")


def test_help_is_quick_because_torch_is_not_imported():
    code = (
        "import sys, paceline.cli.main; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_trains_and_started_again_says_that_it_is_complete(paceline):
    code, out, err = paceline("train", "toy.yaml", "trainer.progress=true")
    assert code == 0
    assert "hello from rank 0" in out
    assert "paceline: complete at step 32 (epochs) in runs/p/n." in err
    code, out, err = paceline("train", "runs/p/n/recipe.yaml")
    assert code == 0
    assert "hello" not in out
    assert "is complete" in err


def test_a_grown_horizon_goes_on_and_fresh_starts_again(paceline, tmp_path: Path):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    assert paceline("train", "toy.yaml", "trainer.epochs=2")[0] == 0
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["step"], len(record["starts"])) == (32, 1)
    assert paceline("train", "toy.yaml", "trainer.epochs=1", "--fresh")[0] == 0
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["step"], len(record["starts"])) == (16, 0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "toy.yaml", "trainer.epoch=3"], "did you mean 'epochs'"),
        (["train", "nothing.yaml"], "no recipe file"),
        (["train", "toy.yaml", "--nproc", "0"], "nproc"),
        (["train"], "RECIPE"),
        (["trian", "toy.yaml"], "trian"),
        (["train", "toy.yaml", "--fresh", "--resume", "must"], "exclude"),
        (["train", "toy.yaml", "--resume", "must"], "no"),
        (["train", "toy.yaml", "--nproc", "2", "trainer.epoch=3"], "did you mean 'epochs'"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(paceline, tmp_path, words, expected):
    code, _, err = paceline.launch(*words)
    assert code == 2, err
    assert expected in err
    assert "Traceback" not in err
    assert err.count("did you mean") <= 1
    assert not (tmp_path / "runs/p/n/checkpoints").exists()


def test_a_changed_setting_is_refused_unless_accepted(paceline):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    words = ("train", "toy.yaml", "trainer.epochs=2", "optimizer.lr=0.2")
    code, _, err = paceline(*words)
    assert code == 2
    assert "--accept optimizer.lr" in err
    assert paceline(*words, "--accept", "optimizer.lr")[0] == 0


def test_init_from_starts_from_another_runs_weights(paceline):
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    code, _, err = paceline("train", "toy.yaml", "run.name=warm", "--init-from", "runs/p/n")
    assert code == 0
    assert "weight" in err


def test_a_dry_run_prints_the_recipe_and_builds_nothing(paceline, tmp_path: Path):
    code, out, _ = paceline("train", "toy.yaml", "optimizer.lr=0.7", "--dry-run")
    assert code == 0
    assert "lr: 0.7" in out
    assert "plan: the run is written to runs/p/n  [run.dir]" in out
    assert not (tmp_path / "runs").exists()


def test_garbage_is_collected_while_a_run_trains(paceline, tmp_path: Path):
    with (tmp_path / "toy.py").open("a") as file:
        file.write("import gc\nFit.on_train_end = lambda self: print('collects', gc.isenabled())\n")
    code, out, err = paceline("train", "toy.yaml")
    assert code == 0, err
    assert "collects True" in out


def test_a_failure_in_the_users_code_is_code_1_with_its_stack(paceline):
    code, _, err = paceline("train", "toy.yaml", "trainer.bad=0", "trainer.how=raise")
    assert code == 1
    assert "ValueError: a fault on purpose" in err
    assert "toy.py" in err


def test_a_full_disk_is_code_1_and_one_message(paceline):
    words = ("train", "toy.yaml", "trainer.bad=0", "trainer.how=fill_disk")
    code, _, err = paceline(*words)
    assert code == 1
    assert "the checkpoint of step 32 could not be written: a checkpoint needs" in err
    assert "0.1 kB are free" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_75(paceline, wait_for, tmp_path: Path, number: int):
    process = paceline.start("train", "toy.yaml", "trainer.progress=true", *SLOW)
    wait_for("three0")
    process.signal(number)
    code, _, err = process.end()
    assert code == 75
    assert f"({signal.Signals(number).name})" in err.replace("signal ", "")
    assert "saved in runs/p/n: the same call resumes from there" in err
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert record["status"] == "stopped"
    assert list((tmp_path / "runs/p/n/checkpoints").glob("step_*/manifest.json"))


SEEDS = ("train", "toy.yaml", "seeds=[1,2,3]")


def test_seeds_with_a_signal_stop_as_one_and_go_on_with_the_same_command(paceline, wait_for):
    process = paceline.start(*SEEDS, *SLOW[1:], "trainer.epochs=3")
    wait_for("three0")
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 75, err
    assert "seed 2" not in err
    code, out, err = paceline(*SEEDS, "trainer.epochs=3", "--accept", "trainer.pause")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[-6:]] == [
        "seed",
        "1",
        "2",
        "3",
        "mean",
        "std",
    ]


def test_a_seed_that_fails_on_one_of_two_processes_ends_the_command(paceline):
    words = (*SEEDS[:2], "seeds=[1,2]", "trainer.bad=0", "trainer.how=raise")
    code, _, err = paceline.launch(*words, "--nproc", "2")
    assert code == 1, err
    lines = err.splitlines()
    assert "ValueError: a fault on purpose" in lines
    assert err.count("Traceback") == 1  # of rank 0, with the user's own frames
    assert err.count('  File "') == 1
    ended = "rank 1 ended, as the others did, because rank 0 failed: ValueError: a fault on purpose"
    assert lines.count(ended) + err.count("rank 1 was killed by SIGTERM") == 1
    assert len(lines) < 15
    assert "seeds after it wait: seeds=[2]" in err
    assert "seed 2, 2 of 2" not in err


def test_seeds_on_two_processes_print_once(paceline, tmp_path: Path):
    code, out, err = paceline(*SEEDS[:2], "seeds=[1,2]", "--nproc", "2")
    assert code == 0, err
    assert out.count("mean") == 1
    for seed in (1, 2):
        record = json.loads((tmp_path / f"runs/p/n/seed_{seed}/run.json").read_text())
        assert (record["status"], record["world_size"], record["seed"]) == ("complete", 2, seed)
    assert paceline(*SEEDS[:2], "seeds=[1,2]", "--nproc", "2")[2].count("already complete") == 2
