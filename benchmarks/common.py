"""What the benchmarks share: processes of their own, statistics, results on disk."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = {
    "torch": "torch",
    "paceline": "paceline",
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
    "ignite": "pytorch-ignite",
    "stable-baselines3": "stable-baselines3",
}


class Worker:
    """A process that answers requests, one at a time, over two pipes of its own.

    The processes of all contestants live through the whole benchmark and are asked in turn, so that
    imports are paid once and what else the machine does falls on all alike.

    Args:
        arguments: of the Python command line; the program calls `serve`.
        environment: more variables than those of this process.
    """

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request.

        Raises:
            RuntimeError: the contestant failed; the message is its traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process has ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):
            self._process.communicate(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


# One thread, and no contestant looks for a network or another's settings.
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "",  # byte code is kept, as it is anywhere but on machines for tests
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def serve(answer: Callable[..., Any]) -> None:
    """Answers requests until there are no more; what is printed meanwhile goes nowhere."""
    import traceback

    replies = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if not os.environ.get("BENCHMARK_VERBOSE"):
        os.dup2(nowhere, 2)

    def give(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    global _give
    _give = give
    while line := sys.stdin.readline():
        try:
            reply: dict[str, Any] = {"value": answer(**json.loads(line))}
        except Exception:  # noqa: BLE001  whatever it was, the parent says which contestant failed
            reply = {"error": traceback.format_exc()}
        give(reply)


def give_way(value: Any) -> None:
    """Within an answer: gives a value to the parent, and waits until it asks on."""
    assert _give is not None
    _give({"value": value})
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


_give: Callable[[dict[str, Any]], None] | None = None


_TOLD = "BENCHMARK_TELLS"  # the variable with the file that `tell` writes to
_POLL = 0.1
_GRACE = 5.0  # seconds from being asked to end until being killed


class Program:
    """A Python program in its own process group, with a time limit; it reports results by `tell`.

    Args:
        arguments: of the Python command line.
        cwd: its working folder; this process's unless given.
        environment: more variables than those of this process.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it; None while it runs
            and after a timeout.
    """

    def __init__(
        self, arguments: Sequence[str | Path], *, cwd: Path | None = None, **environment: str
    ) -> None:
        self.code: int | None = None
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._told = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **environment, _TOLD: self._told.name},
            start_new_session=True,
        )

    def results(self, seconds: Callable[[], float]) -> Iterator[dict[str, Any]]:
        """Yields the results as the program reports them, until it ends.

        Args:
            seconds: asked for the time limit from now on, at the start and after each result. A
                program that exceeds it is ended, with its whole group.
        """
        pending, until = "", time.monotonic() + seconds()
        try:
            while time.monotonic() < until:
                ended = self._process.poll() is not None
                *lines, pending = (pending + self._told.read()).split("\n")
                for line in lines:
                    yield json.loads(line)
                    until = time.monotonic() + seconds()
                if ended:
                    self.code = self._process.returncode
                    return
                time.sleep(_POLL)
        finally:
            self._end()

    def output(self, lines: int) -> str:
        """The last lines that the program printed."""
        self._output.seek(0)
        return "\n".join(self._output.read().splitlines()[-lines:])

    def _end(self) -> None:
        """Ends the process group: SIGTERM, then SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)


def tell(**result: Any) -> bool:
    """Reports a result to the script that runs this one as a `Program`.

    Returns:
        Whether there is such a script.
    """
    if _TOLD not in os.environ:
        return False
    with open(os.environ[_TOLD], "a") as file:
        file.write(json.dumps(result) + "\n")
    return True


def versions() -> dict[str, str]:
    """The versions of what is installed, by short name; a missing peer has no entry."""
    found = {}
    for name, distribution in PACKAGES.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(distribution)
    return found


def report_missing(wanted: Iterable[str | None]) -> set[str]:
    """Says which peers are not installed; returns them."""
    missing = {name for name in wanted if name} - set(versions())
    for name in sorted(missing):
        print(f"left out: {name} is not installed (pip install -r benchmarks/requirements.txt)")
    return missing


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"median": middle, "low": low, "high": high}


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (lower to upper quartile)`."""
    s = summary(values)
    return f"{s['median']:.{digits}f} ({s['low']:.{digits}f} to {s['high']:.{digits}f})"


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval by the sign test, which outliers do not widen.

    Args:
        values: one a round, at least 6: with fewer the interval is that of the values themselves.
    """
    ordered, n = sorted(values), len(values)
    outside, missed = 0, 0.0  # values on each side that the interval leaves out
    while (missed := missed + math.comb(n, outside) / 2**n) <= 0.025:
        outside += 1
    outside = max(0, outside - 1)
    return statistics.median(ordered), ordered[outside], ordered[-1 - outside]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load before": load,
        "versions": versions(),
    }


def accelerator(asked: str | None = None) -> Any:
    """The device to measure on; exits if there is no accelerator.

    Args:
        asked: "cpu" for a trial without one.
    """
    import torch

    if asked is not None:
        return torch.device(asked)
    if not torch.accelerator.is_available():
        sys.exit("no accelerator here; --device cpu tries it without")
    return torch.accelerator.current_accelerator()


def device_name(device: Any) -> str:
    """What a device calls itself."""
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()


def save(
    name: str, text: str, data: dict[str, Any], at: dict[str, Any], *, trial: bool = False
) -> None:
    """Writes `results/<name>.json` and `.md`, and prints the latter.

    Under another script (`Program`) the results go to that script; a trial is only printed.
    """
    if tell(text=text, data=data):
        return
    if trial:
        print(f"\n{text}")
        return
    write(RESULTS / f"{name}.json", as_json({"machine": at, **data}))
    found = ", ".join(f"{key} {value}" for key, value in at["versions"].items())
    load = "" if at["load before"] is None else f", load {at['load before']:.1f} at the start"
    foot = f"{at['processor']}, {at['cores']} cores{load}; Python {at['python']}, {found}."
    write(RESULTS / f"{name}.md", f"{text}\n\n{foot}\n")
    print(f"\n{text}\n\n{foot}")


def as_json(data: Any) -> str:
    """JSON as the result files have it."""
    return json.dumps(data, indent=1, default=str) + "\n"


def write(path: Path, text: str) -> None:
    """Replaces a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    return parser


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
