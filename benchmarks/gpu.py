"""Tests and benchmarks that need an accelerator, in one run with a time limit: `make gpu`.

The tests marked `gpu` run first, then the benchmarks, in the time that is left. The script uses the
packages that are installed, says what it could not run and why, and saves `results/gpu.json` and
`gpu.md` after each part, so that a run that is stopped loses little.

    python benchmarks/gpu.py [--seconds 460]

Exit codes: 0 if all that ran passed, 1 if something failed, 2 if there is no accelerator or
Paceline cannot run here; then nothing is saved.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import gpu_tests
from common import HERE, Program

ROOT = HERE.parent
SCRIPTS = HERE
NEEDED = {"torch": (2, 9), "numpy": (1, 26), "safetensors": (0, 4)}  # to train without a recipe
START = 120.0  # seconds for the first import of torch, and its first look at the device
LEAST = 10.0  # seconds: with less time left no benchmark starts
LIMITS = {  # seconds for each benchmark
    "eager steps": 60,
    "compiled steps": 150,
    "saves": 60,
    "ring attention on one device": 40,
    "ring attention on two devices": 60,
}
TESTS_SHARE = 0.6  # of the time, at most, for the tests


@dataclass
class Findings:
    """The results so far.

    Attributes:
        machine: the device and the software, from `machine()`.
        tests: the outcome of each test.
        benchmarks: text and data of each benchmark, by name.
        failed: what failed, with its error.
        not_run: what was not run, with the reason.
        complete: whether the script reached its end.
    """

    machine: dict[str, Any]
    tests: list[gpu_tests.Outcome] = field(default_factory=list)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def save(self, folder: Path | None) -> None:
        """Replaces both files."""
        if folder is not None:
            common.write(folder / "gpu.json", common.as_json(asdict(self)))
            common.write(folder / "gpu.md", self.as_text() + "\n")

    def as_text(self) -> str:
        """A summary in Markdown."""
        at = self.machine
        counts = Counter(test.outcome for test in self.tests)
        tests = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none run"
        parts = [f"# On {at['device']}", f"{_conditions(at)}.", f"Tests marked `gpu`: {tests}."]
        if not self.complete:
            parts.append("This run was stopped before its end.")
        if self.failed:
            parts.append("## Failed")
            parts.append("\n".join(f"- {name}: {_gist(why)}" for name, why in self.failed.items()))
        parts += [found["text"] for found in self.benchmarks.values()]
        if self.not_run:
            whys = dict.fromkeys(self.not_run.values())
            left = {why: [name for name, its in self.not_run.items() if its == why] for why in whys}
            parts.append("## Not run")
            parts.append("\n".join(f"- {why}: {', '.join(names)}" for why, names in left.items()))
        return "\n\n".join(parts)


def _conditions(at: dict[str, Any]) -> str:
    load = "" if at["load before"] is None else f", load {at['load before']:.1f} at the start"
    devices = f"{at['devices']} device{'s' * (at['devices'] != 1)}{at['memory']}"
    versions = [f"{name} {found}" for name, found in at["versions"].items() if found]
    where = f"{devices}; {at['processor']}, {at['cores']} cores{load}"
    return f"{where}; Python {at['python']}, {', '.join(versions)}; {at['date']}, {at['commit']}"


def _gist(text: str) -> str:
    """The most telling line of an error: an assertion's, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    asserted = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return [*asserted, lines[-1]][0][:300]


# The machine


def look(rehearse: bool) -> dict[str, Any]:
    """The device and the versions of its software.

    It runs in a process of its own: the script itself must hold no memory on the device, and must
    survive a torch that cannot be imported.

    Args:
        rehearse: use the CPU.
    """
    import torch

    if not rehearse and not torch.accelerator.is_available():
        built = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
        kinds = " and ".join(f"{name} {version}" for name, version in built.items() if version)
        what = f"torch {torch.__version__}, built for {kinds or 'CPUs alone'}"
        return {"without": f"{what}, finds none on this machine"}
    from paceline import Trainer  # noqa: F401  fails here if it cannot be imported

    device = common.accelerator("cpu" if rehearse else None)
    torch.ones(2, device=device).sum().item()  # fails here if the device does not work
    found = {"kind": device.type, "device": common.device_name(device), "capability": None}
    found |= {"memory": "", "devices": 1 if rehearse else torch.accelerator.device_count()}
    drivers = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "driver": None, "cuDNN": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory"] = f" of {properties.total_memory / 2**30:.0f} GiB"
        drivers |= {"driver": _driver(), "cuDNN": torch.backends.cudnn.version()}
    found["versions"] = {"torch": torch.__version__, **drivers}
    return found


def _driver() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip() or None
    return None


def _commit() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        query = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return f"commit {done.stdout.strip()}"
    return "commit unknown"


def machine(rehearse: bool) -> dict[str, Any]:
    """The machine and its software.

    Args:
        rehearse: use the CPU.

    Raises:
        SystemExit: with code 2, after printing why nothing can run here.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  this file itself runs with less
        _refuse(f"it needs Python 3.11 or later, and {sys.executable} is {sys.version.split()[0]}")
    lacking = [found for name, least in NEEDED.items() if (found := _lacking(name, least))]
    if lacking:
        _refuse(f"nothing can run with {sys.executable}: {'; '.join(lacking)}")
    program = Program([__file__, "--look", *["--rehearse"] * rehearse])
    found: dict[str, Any] = {}
    for told in program.results(lambda: START):
        found = told
    if "without" in found:
        _refuse(f"no accelerator: {found['without']}. Nothing was run or saved.")
    if not found:
        how = "took too long" if program.code is None else f"ended with code {program.code}"
        _refuse(f"torch, Paceline or the device does not start ({how}):\n{program.output(15)}")
    date = time.strftime("%Y-%m-%d %H:%M %z")
    return {**common.machine(), **found, "date": date, "commit": _commit()}


def _lacking(name: str, least: tuple[int, int]) -> str | None:
    wanted = ".".join(map(str, least))
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed (at least {wanted})"
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(name)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
            return f"{name} is {version}, and has to be at least {wanted}"
    return None


def _refuse(why: str) -> None:
    print(f"make gpu: {why}", file=sys.stderr)
    sys.exit(2)


# The parts


class GpuRun:
    """Runs the parts in order and records their results.

    Args:
        findings: takes the results.
        folder: where they are saved; None to save nothing.
        options: of the command line.
    """

    def __init__(self, findings: Findings, folder: Path | None, options: Any) -> None:
        self._found = findings
        self._folder = folder
        self._options = options
        self._end = options.began + options.seconds

    def left(self) -> float:
        """Seconds left for the whole run."""
        return self._end - time.monotonic()

    def tests(self) -> None:
        """Runs the tests within their share of the time."""
        if importlib.util.find_spec("pytest") is None:
            self._leave_out("the tests marked gpu", "pytest is not installed")
            return
        print(f"tests marked gpu, each within {self._options.per_test:.0f} s", flush=True)
        end = time.monotonic() + TESTS_SHARE * self.left()
        rehearsed = {"PACELINE_REHEARSE_GPU": "1"} if self._options.rehearse else {}
        limit = self._options.per_test
        for test in gpu_tests.run(lambda: end - time.monotonic(), limit, **rehearsed):
            name = test.name.removeprefix("tests/gpu/")
            self._found.tests.append(test)
            print(f"  {test.outcome:8} {name} ({test.seconds:.1f} s)", flush=True)
            if test.outcome == "failed":
                self._failed(name, test.why)
            elif test.outcome != "passed":
                self._found.not_run[name] = test.why
            self._save()

    def benchmark(self, name: str, *arguments: str | Path) -> None:
        """Runs one benchmark within its limit and the time that is left."""
        limit = min(LIMITS[name], self.left())
        if limit < LEAST:
            self._leave_out(f"the benchmark {name}", gpu_tests.NO_TIME)
            return
        print(f"benchmark {name}, within {limit:.0f} s", flush=True)
        end = time.monotonic() + limit
        program = Program(arguments)
        for result in program.results(lambda: end - time.monotonic()):
            self._found.benchmarks[name] = result
            self._save()
        if program.code is None:
            part = "the rest of " * (name in self._found.benchmarks)
            self._leave_out(f"{part}the benchmark {name}", f"it took longer than {limit:.0f} s")
        elif program.code != 0:
            self._failed(f"the benchmark {name}", program.output(30))

    def benchmarks(self) -> None:
        """Runs the benchmarks: training steps, saves, ring attention."""
        trial, kind = self._options.rehearse, self._found.machine["kind"]
        sizes = {"steps": 2, "rounds": 2, "layers": 1, "width": 32, "tokens": 16, "batch": 2}
        small = [f"--{name}={size}" for name, size in sizes.items()]
        small = ["--device=cpu", *small] if trial else []
        steps = SCRIPTS / "gpu_steps.py"
        self.benchmark("eager steps", steps, "--tasks", "tiny", "cnn", "gpt", *small)
        if (lacking := self._no_compiler()) is not None:
            self._leave_out("the benchmark compiled steps", lacking)
        else:
            self.benchmark("compiled steps", steps, "--tasks", "large", *small)
        small = ["--width", "64", "--rounds", "2"] if trial else ["--rounds", "3"]
        self.benchmark("saves", SCRIPTS / "checkpoints.py", "--device", kind, *small)
        if kind != "cuda":
            self._leave_out("the benchmark ring attention", f"it has no kernel for {kind.upper()}")
            return
        self.benchmark("ring attention on one device", SCRIPTS / "ring.py")
        if self._found.machine["devices"] < 2:
            why = "it needs 2 devices; there is 1"
            self._leave_out("the benchmark ring attention on two devices", why)
            return
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        self.benchmark("ring attention on two devices", *launch, SCRIPTS / "ring.py")

    def end(self) -> int:
        """Prints and saves the final results; returns the exit code."""
        self._found.complete = True
        self._save()
        print(f"\n{self._found.as_text()}\n")
        if self._folder is not None:
            print(f"saved: {self._folder / 'gpu.json'} and gpu.md")
        return 1 if self._found.failed else 0

    def _no_compiler(self) -> str | None:
        """Why nothing can be compiled here; None if it can."""
        if self._found.machine["kind"] == "cuda" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return "there is no C compiler, which torch.compile needs"
        return None

    def _leave_out(self, what: str, why: str) -> None:
        print(f"  not run: {what}: {why}", flush=True)
        self._found.not_run[what] = why
        self._save()

    def _failed(self, what: str, why: str) -> None:
        print(f"  {what}:\n{_indented(why)}", flush=True)
        self._found.failed[what] = why
        self._save()

    def _save(self) -> None:
        self._found.save(self._folder)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-20:])


def main() -> int:
    options = _options()
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of every child process
    if options.look:
        common.tell(**look(options.rehearse))
        return 0
    at = machine(options.rehearse)
    print(f"{at['device']}: {_conditions(at)}; within {options.seconds:.0f} s", flush=True)
    folder = options.out or (None if options.rehearse else common.RESULTS)
    run = GpuRun(Findings(at), folder, options)
    run.tests()
    run.benchmarks()
    return run.end()


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=460, help="time limit of the run")
    parser.add_argument("--per-test", type=float, default=90, help="time limit of one test")
    parser.add_argument("--out", type=Path, default=None, help="folder of the two result files")
    # For developers without an accelerator: runs every part on the CPU, with tiny sizes.
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(began=time.monotonic())
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the child process too
    sys.exit(main())
