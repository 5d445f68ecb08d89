"""P6 A signal is a clean stop: all ranks at one boundary, saved, code 75, and exact from there."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from signal_runs import STEPS, Run, Sent, train, trainer_of

from endings import ending, saved_steps
from paceline.callbacks import time_limit
from paceline.checkpoint import load_tree, native_engine
from paceline.errors import Preempted
from paceline.testing import Outcome, Ranks
from paceline.trainer import stop
from paceline.world.signals import leave_at_once_on_signals

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """How runs end that nobody signals, by the number of ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    return train_unbroken(ranks, folder, 1) | train_unbroken(ranks, folder, 2)


def train_unbroken(ranks: Ranks, folder: Path, size: int) -> dict[int, Any]:
    folder = folder / f"unbroken-{size}"
    folder.mkdir()
    ranks(train, size, folder, Run(), Sent())
    return {size: ending(folder / "run")}


def codes(outcomes: list[Outcome]) -> list[int | None]:
    return [outcome.code for outcome in outcomes]


def output(outcomes: list[Outcome]) -> str:
    return "\n".join(f"--- rank {i}\n{one.output}" for i, one in enumerate(outcomes))


def check_clean_stop(
    ranks: Ranks,
    unbroken: Any,
    folder: Path,
    sent: Sent,
    run: Run | None = None,
    size: int = 1,
    left: list[str] | None = None,
) -> int:
    """Stops a run by a signal and starts it again.

    Returns:
        The step at which it stopped; in `left`, the parts of the boundary that were left to do.
    """
    run = run or Run()
    first = ranks.outcomes(train, size, folder, run, sent)
    assert codes(first) == [75] * size, output(first)
    stopped_at = saved_steps(folder / "run")[-1]
    if left is not None:
        checkpoint = folder / "run" / "checkpoints" / f"step_{stopped_at:08d}"
        left += load_tree(checkpoint)["progress"]["pending"]
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["status"] == "stopped"
    assert record["stopped_by"] == f"signal {signal.Signals(sent.numbers[0]).name}"
    assert record["step"] == stopped_at

    second = ranks.outcomes(train, size, folder, run, Sent())
    assert codes(second) == [0] * size, output(second)
    assert ending(folder / "run") == unbroken[size]
    return stopped_at


PLACES = [("training", TERM), ("training", INT), ("training", USR1)]
PLACES += [("validation", TERM), ("data", INT), ("save", USR1)]


@pytest.mark.parametrize(("at", "number"), PLACES, ids=lambda x: getattr(x, "name", x))
def test_wherever_a_signal_comes_the_run_stops_and_goes_on_exactly(
    ranks: Ranks, unbroken: Any, tmp_path: Path, at: str, number: int
) -> None:
    check_where(ranks, tmp_path, at, number, unbroken)


def check_where(
    ranks: Ranks, folder: Path, at: str, number: int = TERM, unbroken: Any = None
) -> None:
    """In a window it stops behind it; in a validation, before it has ended; in a save, after it."""
    step, left = {
        "training": (6, ["boundary"]),
        "validation": (6, ["validation"]),
        "data": (None, ["boundary"]),
        "save": (8, []),
    }[at]
    unbroken = unbroken or train_unbroken(ranks, folder, 1)
    run = Run(asynchronous=False)
    pending: list[str] = []
    stopped_at = check_clean_stop(ranks, unbroken, folder, Sent(at, (number,)), run, left=pending)
    assert stopped_at == (step or stopped_at) < STEPS
    assert pending == left


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGUSR2"])
def test_so_it_does_when_the_terminal_is_closed_or_a_limit_of_the_batch_system_is_near(
    ranks: Ranks, unbroken: Any, tmp_path: Path, name: str
) -> None:
    """SIGXCPU comes again each second: with loader workers, all of which get it too."""
    number = getattr(signal, name)
    again = (number,) * 3 if name == "SIGXCPU" else (number,)
    sent = Sent("data", again, to="group", pause=1.1 * (len(again) > 1))
    check_clean_stop(ranks, unbroken, tmp_path, sent, Run(workers=1, slow_sample=0.3))


@pytest.mark.parametrize(
    ("number", "workers"),
    [(TERM, 2), (INT, 2), (USR1, 2), (INT, 0)],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_signal_to_the_whole_group_while_data_are_waited_for_spares_the_loader_workers(
    ranks: Ranks, unbroken: Any, tmp_path: Path, number: int, workers: int
) -> None:
    run = Run(workers=workers, slow_sample=0.3)
    check_clean_stop(ranks, unbroken, tmp_path, Sent("data", (number,), to="group"), run)


@pytest.mark.parametrize(
    ("operation", "asynchronous"),
    [(1, False), (6, True), (9, False), (9, True), (12, False), (12, True)],
)
def test_a_signal_at_any_operation_of_a_save_lets_it_end(
    ranks: Ranks, unbroken: Any, tmp_path: Path, operation: int, asynchronous: bool
) -> None:
    sent = Sent("save", operation=operation)
    run = Run(asynchronous=asynchronous)
    assert check_clean_stop(ranks, unbroken, tmp_path, sent, run) in (8, 9)


@pytest.mark.parametrize("at", ["start", "train start"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_before_the_first_window_stops_there(
    ranks: Ranks, unbroken: Any, tmp_path: Path, at: str, size: int
) -> None:
    stopped_at = check_clean_stop(ranks, unbroken, tmp_path, Sent(at), Run(pause=0.1), size)
    assert stopped_at == 0 if size == 1 else stopped_at <= 3


def test_before_training_it_ends_the_command_whatever_swallows_exceptions_there(
    ranks: Ranks,
) -> None:
    check_before_training(ranks)


def check_before_training(ranks: Ranks) -> None:
    [outcome] = ranks.outcomes(swallow_what_is_raised, 1)
    assert outcome.code == 75
    assert outcome.output == (
        "paceline: SIGTERM before training began: nothing to save; run the command again.\n"
    )


def swallow_what_is_raised() -> None:
    signal.signal(TERM, signal.SIG_DFL)
    leave_at_once_on_signals()
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), TERM)
        time.sleep(2)


# In a save only rank 0 can be hit: rank 1 does too little of one.
@pytest.mark.parametrize(
    ("at", "rank"),
    [("training", 0), ("training", 1), ("validation", 0), ("validation", 1), ("save", 0)],
)
def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(
    ranks: Ranks, unbroken: Any, tmp_path: Path, at: str, rank: int
) -> None:
    run = Run(pause=0.06)
    stopped_at = check_clean_stop(ranks, unbroken, tmp_path, Sent(at, rank=rank), run, 2)
    assert stopped_at <= {"training": 10, "validation": 6, "save": 12}[at]


@pytest.mark.parametrize("numbers", [(TERM, TERM), (TERM, INT), (INT, INT)], ids=str)
@pytest.mark.parametrize("at", ["training", "save"])
def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_intact(
    ranks: Ranks, unbroken: Any, tmp_path: Path, at: str, numbers: tuple[int, ...]
) -> None:
    sent = Sent(at, numbers, pause=2.1 if numbers == (TERM, TERM) else 0.1, behind=4)
    first = ranks.outcomes(train, 1, tmp_path, Run(pause=0.05), sent)
    assert codes(first) == [-numbers[1]], output(first)
    assert saved_steps(tmp_path / "run") == [4]
    ranks(train, 1, tmp_path, Run(), Sent())
    assert ending(tmp_path / "run") == unbroken[1]


def test_a_signal_that_is_passed_on_to_a_process_that_has_it_already_is_one(
    ranks: Ranks, unbroken: Any, tmp_path: Path
) -> None:
    """torchrun and the scheduler send SIGTERM both: still a clean stop."""
    check_clean_stop(ranks, unbroken, tmp_path, Sent("training", (TERM, TERM, USR1), pause=0.02))


@pytest.mark.parametrize("at", ["end", "teardown"])
def test_a_signal_when_training_is_over_leaves_with_75_and_the_run_is_complete(
    ranks: Ranks, unbroken: Any, tmp_path: Path, at: str
) -> None:
    """The script that goes on after `train()` has been told to leave."""
    first = ranks.outcomes(train, 1, tmp_path, Run(), Sent(at))
    assert codes(first) == [75], output(first)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
    assert ranks(train, 1, tmp_path, Run(), Sent()) == ["max_steps"]
    assert ending(tmp_path / "run") == unbroken[1]


# What else stops a run, on the same path


@pytest.mark.parametrize("size", [1, 2])
def test_a_time_limit_stops_again_and_again_and_the_end_is_the_same(
    ranks: Ranks, unbroken: Any, tmp_path: Path, size: int
) -> None:
    reasons: list[str] = []
    while reasons[-1:] != ["max_steps"] and len(reasons) < 20:
        reasons += ranks(train_by_own_clock, size, tmp_path)[:1]
    assert reasons[-1] == "max_steps"
    assert len(reasons) > 2
    assert reasons[:-1] == ["time limit"] * (len(reasons) - 1)
    assert ending(tmp_path / "run") == unbroken[size]


def train_by_own_clock(folder: Path) -> str:
    """Each look at the clock, after a step or a validation batch, moves it on by a second."""
    seconds = itertools.count()
    time_limit.time = SimpleNamespace(monotonic=lambda: next(seconds))  # pyright: ignore
    stop._POLL = 0.01  # on a busy machine, too, the ranks agree long before the last step
    return train(folder, Run(limit=12), Sent())


@pytest.mark.parametrize("size", [1, 2])
def test_a_stop_file_stops_and_is_taken_away(
    ranks: Ranks, unbroken: Any, tmp_path: Path, size: int
) -> None:
    assert ranks(train_and_touch, size, tmp_path) == ["stop file"] * size
    assert not (tmp_path / "run" / "STOP").exists()
    assert saved_steps(tmp_path / "run")[-1] < STEPS
    assert ranks(train, size, tmp_path, Run(), Sent()) == ["max_steps"] * size
    assert ending(tmp_path / "run") == unbroken[size]


def train_and_touch(folder: Path) -> str:
    """Makes a stop file in step 5."""
    trainer = trainer_of(folder, Run(pause=0.1), Sent())
    trainer.on_step_end = lambda _: trainer.global_step == 5 and (folder / "run/STOP").touch()
    return trainer.train(seed=11).stopped_by


def test_a_stop_file_from_before_the_start_is_said_and_does_not_stop_the_run(
    ranks: Ranks, unbroken: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    [outcome] = ranks.outcomes(train, 1, tmp_path, Run(pause=0.02), Sent())
    assert outcome.code == 0
    assert outcome.value == "max_steps"
    assert "STOP, which was there before this start" in outcome.output
    assert not (tmp_path / "run" / "STOP").exists()
    assert ending(tmp_path / "run") == unbroken[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", ["training", "validation", "start"])
def test_a_rank_that_raises_ends_the_other_with_its_error(
    ranks: Ranks, tmp_path: Path, at: str, rank: int
) -> None:
    outcomes = ranks.outcomes(train_and_raise, 2, tmp_path, at, rank)
    assert codes(outcomes) == [1, 1], output(outcomes)
    assert max(outcome.seconds for outcome in outcomes) < 30
    for outcome in outcomes:
        assert "ValueError: on purpose" in outcome.output, output(outcomes)
    assert f"rank {rank} failed: ValueError: on purpose" in outcomes[1 - rank].output


def train_and_raise(folder: Path, at: str, rank: int) -> None:
    def send(here: str) -> None:
        if here == at and trainer.world.rank == rank:
            raise ValueError("on purpose")

    trainer = trainer_of(folder, Run(), Sent())
    trainer.send = trainer.callbacks[1].send = send  # type: ignore[assignment]
    trainer.train(seed=11)


# In this process: whom signals belong to before and after


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # `trainer_of` replaces it for good
    monkeypatch.setattr(native_engine, "Disk", native_engine.Disk)
    return trainer_of(tmp_path, Run(), Sent())


@pytest.mark.parametrize("how", ["ends", "raises", "is told to stop", "is signalled"])
def test_handlers_are_put_back_however_the_run_ends(trainer: Any, how: str) -> None:
    def mine(number: int, frame: Any) -> None: ...

    def act(_: Any) -> None:
        if trainer.global_step == 3:
            seen.append(signal.getsignal(TERM))
            if how == "raises":
                raise ValueError("on purpose")
            if how == "is told to stop":
                trainer.request_stop("test")
            if how == "is signalled":
                signal.raise_signal(USR1)

    seen: list[Any] = []
    trainer.on_step_end = act
    before = {number: signal.signal(number, mine) for number in (TERM, INT, USR1)}
    try:
        expected = {"raises": ValueError, "is signalled": Preempted}.get(how)
        if expected is None:
            trainer.train(seed=11)
        else:
            with pytest.raises(expected):
                trainer.train(seed=11)
        assert seen != [mine]
        assert [signal.getsignal(number) for number in before] == [mine] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_so(trainer: Any) -> None:
    """A shell's background job ignores Ctrl-C."""
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        trainer.on_step_end = lambda _: signal.raise_signal(INT)
        assert trainer.train(seed=11).stopped_by == "max_steps"
        assert signal.getsignal(INT) is signal.SIG_IGN
    finally:
        signal.signal(INT, before)


def test_beside_the_main_thread_a_run_says_that_it_hears_no_signals_and_can_be_asked_to_stop(
    trainer: Any, tmp_path: Path, unbroken: Any
) -> None:
    results: list[Any] = []
    reached, asked = threading.Event(), threading.Event()
    trainer.on_step_end = lambda _: trainer.global_step == 5 and (reached.set(), asked.wait(20))
    thread = threading.Thread(target=lambda: results.append(trainer.train(seed=11)))
    thread.start()
    assert reached.wait(60)
    trainer.request_stop("test")
    asked.set()
    thread.join(60)
    assert results[0].stopped_by == "test"
    assert not results[0].complete
    assert any("main thread" in line["decision"] for line in trainer.plan.as_list())
    trainer_of(tmp_path, Run(), Sent()).train(seed=11)
    assert ending(tmp_path / "run") == unbroken[1]
