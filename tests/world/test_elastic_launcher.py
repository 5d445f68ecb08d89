"""The launcher itself, with small programs in place of `python -m paceline`."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from paceline.errors import ConfigError, PacelineError, in_a_line
from paceline.testing import Outcome, Ranks, free_port
from paceline.world.launch import _Agent, launch
from paceline.world.rendezvous import ONE_MACHINE, Rendezvous

PRELUDE = f"""\
#!{sys.executable} -IS
import os, signal, sys, time
rank = os.environ["RANK"]
def say(text):
    with open("said" + rank, "a") as file:
        file.write(text + "\\n")
def said(rank):
    return open("said" + str(rank)).read() if os.path.exists("said" + str(rank)) else ""
def wait_for(text, rank):
    while text not in said(rank):
        time.sleep(0.01)
"""


@pytest.fixture
def launched(ranks: Ranks, tmp_path: Path) -> Any:
    """Launches two workers that run a program."""

    def run(program: str, *argv: str, max_restarts: int = 0) -> Outcome:
        (tmp_path / "worker").write_text(PRELUDE + program)
        (tmp_path / "worker").chmod(0o755)
        [outcome] = ranks.outcomes(be_launcher, 1, tmp_path, 2, argv, ONE_MACHINE, max_restarts)
        return outcome

    return run


def be_launcher(
    folder: Path, nproc: int, argv: tuple[str, ...], machines: Rendezvous, max_restarts: int
) -> int:
    os.chdir(folder)
    sys.executable = str(folder / "worker")
    return launch(nproc, argv, machines=machines, max_restarts=max_restarts)


@pytest.mark.parametrize(
    ("number", "heard"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGINT, 2)]
)
def test_a_signal_to_the_launcher_goes_to_every_worker(
    launched: Any, tmp_path: Path, number: int, heard: int
) -> None:
    """Given a signal that comes twice, then each worker hears it once, but a second Ctrl-C too."""
    outcome = launched(
        f"""
signal.signal({number:d}, lambda *_: say("heard"))
say("ready")
wait_for("ready", 1)
for _ in range(2):
    if rank == "0":
        os.kill(os.getppid(), {number:d})
    time.sleep(0.4)
sys.exit(75)
"""
    )
    assert outcome.value == 75
    for rank in (0, 1):
        assert (tmp_path / f"said{rank}").read_text() == "ready\n" + heard * "heard\n"


def test_a_rank_that_leaves_later_than_the_others_is_left_the_time(launched: Any) -> None:
    assert launched("time.sleep(1.5 * (rank == '0'))\nsys.exit(75)").value == 75


def test_ranks_that_would_wait_for_one_that_left_before_they_met_are_ended(launched: Any) -> None:
    """Given a worker that a signal reached alone, when it says that it left, all stop with 75."""
    program = """
if rank == "1":
    open(os.environ["PACELINE_LEFT"], "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
time.sleep(30)
"""
    outcome = launched(program)
    assert (outcome.value, outcome.output.strip()) == (75, "")
    assert outcome.seconds < 15


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3) if rank == '1' else time.sleep(60)", 3, "rank 1 exited with code 3"),
        (
            "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)",
            1,
            "paceline: rank 1 was killed by SIGKILL",
        ),
    ],
    ids=["done", "failed", "killed"],
)
def test_the_launcher_answers_with_the_code_of_whoever_failed_and_names_it(
    launched: Any, end: str, code: int, said: str
) -> None:
    outcome = launched(end)
    assert outcome.value == code
    assert (outcome.output.strip() == "") if said == "" else (said in outcome.output)


@pytest.mark.parametrize(
    ("code", "restarts", "answer", "starts"), [(3, 0, 3, 1), (3, 1, 0, 2), (75, 1, 75, 1)]
)
def test_workers_start_again_after_a_failure_but_not_after_a_clean_stop(
    launched: Any, tmp_path: Path, code: int, restarts: int, answer: int, starts: int
) -> None:
    # Each waits for the other, which is ended as soon as this one has failed.
    program = "say('start')\nwait_for('start', 1 - int(rank))\n"
    program += f"sys.exit({code} * (os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'))"
    assert launched(program, max_restarts=restarts).value == answer
    assert (tmp_path / "said0").read_text() == starts * "start\n"


def test_workers_get_the_words_as_they_were_written_and_know_who_started_them(
    launched: Any, tmp_path: Path
) -> None:
    words = ("train", "a b.yaml", "run.dir='a$$b'", "+x=${trainer.epochs}")
    parent = "os.environ['PACELINE_LAUNCHER'] == str(os.getppid())"
    assert launched(f"say(repr((sys.argv[1:], {parent})))", *words).value == 0
    assert (tmp_path / "said1").read_text() == repr((["-m", "paceline", *words], True)) + "\n"


def test_a_launcher_that_waits_for_others_can_be_stopped(ranks: Ranks, tmp_path: Path) -> None:
    waits, _ = ranks.outcomes(wait_and_stop, 2, tmp_path, free_port())
    assert waits.code == 75
    assert "SIGTERM before training began" in waits.output


def wait_and_stop(folder: Path, port: int) -> int:
    """Rank 0 waits for the launcher of another machine; rank 1 stops it."""
    if os.environ["RANK"] == "0":
        (folder / "pid").write_text(str(os.getpid()))
        return be_launcher(folder, 1, (), Rendezvous(2, f"localhost:{port}"), 0)
    while not (folder / "pid").exists() or not (pid := (folder / "pid").read_text()):
        time.sleep(0.01)
    while not catches(int(pid), signal.SIGTERM):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(int(pid), signal.SIGTERM)
    return 0


def test_a_launcher_that_is_stopped_before_it_waits_for_others_does_not_wait(
    ranks: Ranks, tmp_path: Path
) -> None:
    [stopped] = ranks.outcomes(be_stopped_early, 1, tmp_path, free_port())
    assert stopped.code == 75
    assert "SIGTERM before training began" in stopped.output


def be_stopped_early(folder: Path, port: int) -> int:
    def run(agent: Any, role: str = "default") -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return LocalElasticAgent.run(agent, role)

    _Agent.run = run  # type: ignore[method-assign]
    return be_launcher(folder, 1, (), Rendezvous(2, f"localhost:{port}"), 0)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"),
        (
            "open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write("
            '\'{"message": "KeyError: lr", "timestamp": 1}\')\nsys.exit(1)',
            "rank 1: KeyError: lr",
        ),
    ],
    ids=["killed", "told"],
)
def test_a_launcher_whose_rank_fails_ends_the_other_machines(
    ranks: Ranks, tmp_path: Path, end: str, said: str
) -> None:
    """Given ranks that would wait for each other, when one fails, then the launcher of the other
    machine ends at once and knows why."""
    program = f"if rank == '0':\n    time.sleep(60)\nsay('failing')\n{end}"
    (tmp_path / "worker").write_text(PRELUDE + program)
    (tmp_path / "worker").chmod(0o755)
    ended = ranks.outcomes(be_launcher_of_two, 2, tmp_path, free_port())
    assert [one.code for one in ended] == [0, 0], ended
    assert all(one.seconds < 20 for one in ended)
    other, own = sorted((one.value for one in ended), key=lambda value: isinstance(value, int))
    assert re.fullmatch(rf"PeerError: the launcher on \S+ has failed: {said}", other)
    assert own == 1


def be_launcher_of_two(folder: Path, port: int) -> int | str:
    """One of two machines with a rank each."""
    try:
        return be_launcher(folder, 1, (), Rendezvous(2, f"localhost:{port}"), 0)
    except PacelineError as error:
        return in_a_line(error)


def test_launchers_meet_under_the_name_they_are_given() -> None:
    mine = Rendezvous(2, "here:1", "mine").parameters()
    assert (mine.run_id, mine.endpoint) == ("mine", "here:1")
    names = [Rendezvous(2, "here:1").parameters().run_id for _ in range(2)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("nnodes", "endpoint", "said"),
    [(2, None, "give --rdzv-endpoint"), (2, "here", "it has to be HOST:PORT")],
)
def test_a_meeting_without_a_place_is_a_mistake(nnodes: int, endpoint: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rendezvous(nnodes, endpoint)
