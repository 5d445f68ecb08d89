"""Which tests are fast, and so part of `make check`.

A test is fast unless `over_budget.txt` lists it. `make durations` writes that file: it runs all
tests and lists those that took longer than BUDGET. A new test is therefore in `make check` until it
has been measured. What BY_NAME lists is in however long it takes, so that each promise, on several
ranks too, and each system that Paceline replaces has its tests in daily work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

BUDGET = 0.3  # seconds that a fast test takes, fixtures apart
LIST = Path(__file__).with_name("over_budget.txt")
HEADER = f"# Tests that take longer than {BUDGET} s: written by `make durations`, see budget.py.\n"
P = "tests/promises/test_p"
BY_NAME = (  # a folder, a file, a test with any parameters, or one with those in its brackets
    "tests/parity/",
    "tests/test_docstrings.py",
    "tests/test_layers.py",
    "tests/test_style.py",
    f"{P}01_exact_resume.py::test_stopped_at_any_step_it_ends_the_same[6]",
    f"{P}01_exact_resume.py::test_stopped_in_validation_it_validates_again",
    f"{P}01_on_ranks.py::test_stopped_in_validation[2]",
    f"{P}03_same_mathematics.py::test_micro_batches_equal_one_batch",
    f"{P}03_same_mathematics.py::test_gradients_are_exchanged_once_a_window",
    f"{P}03_same_mathematics.py::test_ranks_equal_one_with_as_many_times_the_batch[2]",
    f"{P}03_stages.py::test_stages_equal_one_too[2-2-1]",
    f"{P}04_every_sample_once.py::test_training_and_validation_see_every_sample_once[2]",
    f"{P}04_every_sample_once.py::test_streams_of_any_lengths_end_together",
    f"{P}05_a_kill_loses_nothing.py::test_after_any_save_the_run_goes_on_exactly[6]",
    f"{P}05_a_kill_loses_nothing.py::test_a_process_whose_last_save_fails_leaves_with_1",
    f"{P}06_a_signal_is_a_clean_stop.py::test_wherever_a_signal_comes_the_run_stops_and_goes_on_"
    "exactly[validation-SIGTERM]",
    f"{P}06_a_signal_is_a_clean_stop.py::test_a_signal_to_one_of_two_ranks_stops_both_at_one_step"
    "[training-1]",
    f"{P}07_no_hidden_sync.py::test_nothing_is_read_between_rows[AdamW-settings4]",
    f"{P}08_cheap.py::test_a_lean_step_makes_few_calls",
    f"{P}09_wrong_before_expensive.py::test_the_command_answers_with_code_2_and_no_traceback",
    f"{P}10_opening_a_run_executes_nothing.py::test_the_source_holds_no_way_to_run_a_file",
    f"{P}11_a_run_explains_itself.py::test_a_stopped_run_says_why_and_a_resumed_one_remembers",
    "tests/testing/test_own_trainers.py::test_a_good_trainer_resumes_exactly[None]",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("the budget of `make check`")
    group.addoption("--fast", action="store_true", help="run only what is fast, or in by name")
    group.addoption("--measure", action="store_true", help="list what is over the budget anew")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measure") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    slow = set(LIST.read_text().splitlines())
    names = [item.nodeid for item in items]
    kept = {name for name in names if name not in slow or in_by_name(name)}
    check_kept(names, kept)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def in_by_name(test: str) -> bool:
    """Whether a test is in `make check` however long it takes."""
    return any(names(each, test) for each in BY_NAME)


def names(name: str, test: str) -> bool:
    """Whether an entry of BY_NAME means a test."""
    return test == name or test.startswith((f"{name}[", f"{name}::", name.rstrip("/") + "/"))


def check_kept(collected: Iterable[str], kept: Iterable[str]) -> None:
    """Every promise that was collected keeps a test, and every name is that of a test.

    Raises:
        UsageError: it is not so.
    """
    collected = list(collected)
    files = {test.partition("::")[0] for test in collected}
    gone = [
        name
        for name in BY_NAME
        if name.partition("::")[0] in files and not any(names(name, test) for test in collected)
    ]
    if gone:
        raise pytest.UsageError(f"budget.py lists by name what is no test: {', '.join(gone)}")
    if untested := promises(collected) - promises(kept):
        raise pytest.UsageError(f"budget.py: no test of {', '.join(sorted(untested))} is fast")


def promises(tests: Iterable[str]) -> set[str]:
    """The promises that tests are of: "p01" and so on."""
    return {match[1] for test in tests if (match := re.search(r"/test_(p\d\d)_", test))}


class Durations:
    """Measures each test, and in the end lists those over the budget.

    What is listed of files that were not run stays as it is.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        slow = {test for test, seconds in self.seconds.items() if seconds > BUDGET}
        others = {line for line in LIST.read_text().splitlines() if self._stays(line, config)}
        LIST.write_text(HEADER + "".join(f"{test}\n" for test in sorted(slow | others)))
        fast = [test for test in self.seconds if test not in slow or in_by_name(test)]
        whole, part = (sum(self.seconds[test] for test in some) for some in (self.seconds, fast))
        terminalreporter.write_line(
            f"{len(self.seconds)} tests took {whole:.0f} s, of which the {len(fast)} of `make "
            f"check` took {part:.0f} s; {LIST.name} is written anew."
        )

    def _stays(self, line: str, config: pytest.Config) -> bool:
        file = line.partition("::")[0]
        run = {test.partition("::")[0] for test in self.seconds}
        return file not in run and (config.rootpath / file).is_file()
