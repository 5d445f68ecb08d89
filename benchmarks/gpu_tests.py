"""Runs the tests marked `gpu`, each with a time limit, through hangs and crashes.

One pytest process runs tests until one fails or takes too long; a new process runs the rest, since
a device error outlives the test that caused it. This file is also the pytest plugin that reports
each test's start and outcome to the script.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common import HERE, Program, tell

FOLDER = HERE.parent / "tests" / "gpu"
PYTEST = (
    *("-m", "pytest", "-m", "gpu", "-p", "gpu_tests", "-p", "no:cacheprovider"),
    *("-p", "no:logging"),  # its handler makes torch.compile log every step
    *("--continue-on-collection-errors", "--tb=short", "--show-capture=stderr"),
)
NO_TIME = "there was no time left"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test.

    Attributes:
        name: pytest's node id.
        outcome: "passed", "failed" or "skipped"; "not run" if the time was up before its end.
        seconds: its duration.
        why: the error or the reason, unless it passed.
    """

    name: str
    outcome: str
    seconds: float = 0.0
    why: str = ""


def run(seconds_left: Callable[[], float], limit: float, **environment: str) -> Iterator[Outcome]:
    """Runs the tests and yields each outcome as soon as it is known.

    Args:
        seconds_left: asked for the seconds left for all tests together.
        limit: seconds for one test, and for a process to reach its first.
        environment: more environment variables for the pytest processes.
    """
    root = FOLDER.parents[1]
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other installed plugins do not run
    # The conftest above the folder may need packages that are not installed here.
    pytest = [*PYTEST, f"--rootdir={root}", f"--confcutdir={FOLDER}"]
    found: list[str] | None = None  # until the first process has collected the tests
    done: set[str] = set()

    def waiting() -> list[str]:
        return [str(FOLDER)] if found is None else [name for name in found if name not in done]

    why_not = NO_TIME
    while waiting():
        program = Program([*pytest, *waiting()], cwd=root, **environment)
        running, before, since = "", len(done), time.monotonic()
        for told in program.results(lambda: min(limit, seconds_left())):
            if "found" in told:
                found = told["found"] if found is None else found
            elif "begins" in told:
                running, since = told["begins"], time.monotonic()
            else:
                running = ""
                done.add(told["name"])
                yield Outcome(**told)
        if len(done) > before and not running and program.code in (0, 1):
            continue
        if seconds_left() <= 0:
            break
        why = f"{program.output(30)}\n{_ended(program, limit)}"
        yield Outcome(running or str(FOLDER), "failed", time.monotonic() - since, why)
        if not running:
            why_not = "pytest did not reach it"  # and a new process would not either
            break
        done.add(running)
    for name in waiting():
        yield Outcome(name, "not run", why=why_not)


def _ended(program: Program, limit: float) -> str:
    """Why a process ended before its last test did."""
    if program.code is None:
        return f"it took longer than {limit:.0f} s"
    if program.code < 0:
        return f"its process was ended by {signal.Signals(-program.code).name}"
    return f"its process ended with code {program.code}"


# The plugin

_session: Any = None
_reports: list[Any] = []  # of the current test: set-up, call, teardown


def pytest_collectreport(report: Any) -> None:
    """Reports a file that cannot be collected."""
    if report.failed:
        tell(name=report.nodeid, outcome="failed", why=report.longreprtext[-4000:])


def pytest_collection_finish(session: Any) -> None:
    """Reports the collected tests."""
    global _session
    _session = session
    tell(found=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    """Reports that a test begins."""
    _reports.clear()
    tell(begins=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """Collects the reports of a test's phases."""
    _reports.append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Reports a test's outcome; ends the process after a failure."""
    which = [report.outcome for report in _reports]
    outcome = next((each for each in ("failed", "skipped") if each in which), "passed")
    why = next((_reason(report) for report in _reports if report.outcome == outcome), "")
    seconds = sum(report.duration for report in _reports)
    tell(name=nodeid, outcome=outcome, seconds=seconds, why=why)
    if outcome == "failed":
        _session.shouldfail = "the rest runs in a new process"


def _reason(report: Any) -> str:
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext[-4000:]
