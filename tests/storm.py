"""The storm: a run that is killed again and again ends as if it had never been killed.

    python tests/storm.py             # 200 kills, 200 signals, 100 read errors: some minutes
    python tests/storm.py --kills 25 --signals 5 --reads 5 --seed 5

Each run trains a small network with dropout, shuffling, augmentation, accumulation, averaged
weights and validation, and saves after every step or two: in the background or not, on one rank or
two, which hold a copy of the model each, or share one. It is killed, started again in the same
folder, killed again, until it completes. Then weights, optimizer state, every other bit of state,
the bytes of metrics.jsonl and the sample ids of every step must equal those of a run that nobody
killed. After each kill the run must go on from the newest checkpoint that had been published, or a
later one.

What kills:
- "any instant": SIGKILL to all ranks after a random time;
- "file operation": SIGKILL to all ranks right after the n-th file operation of the second save;
- "power cut": the same, and what was not synced is lost: such files are cut in half, renames are
  taken back, rows end in the middle;
- "one rank": SIGKILL to one of two ranks; the other has to leave by itself within 30 seconds.

And what else stops a start:
- "signal": one of those that stop a run, to all ranks or to one, mostly while they start: all leave
  with 75, within two seconds if none has begun;
- "read error": the n-th operation that reads fails once, and a SIGKILL comes at any instant;
- "no answer": from the n-th operation on nothing can be read: the run leaves with 1, and nothing is
  set aside.

Ranks are forked from this process, which has done the imports: a start costs tens of milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor.debug
import torch.nn.parallel

from endings import ending, saved_steps
from paceline.checkpoint import native_engine, storage  # noqa: F401  slow to import
from paceline.log import sinks
from paceline.testing import free_port
from paceline.world.signals import STOPS
from storm_ranks import PLACES, Beacon, Kill, Scenario, be_a_rank

HANGS = 60.0  # seconds after which an attempt counts as hung
MEETS = 5.0  # seconds in which ranks that have met stop together
LEAVES = 2.0  # seconds in which a start has to leave at a signal
ALONE = 30.0  # seconds in which a rank has to leave once the other was killed
SCENARIOS = (
    Scenario(1, False, 1),
    Scenario(1, True, 2),
    Scenario(2, False, 2),
    Scenario(2, True, 1),
    Scenario(2, True, 2, shards=2),
)


class StormError(AssertionError):
    """A promise is broken; the message says how."""


@dataclass
class Attempt:
    """How one start of a run ended: exit codes by rank, None for a rank that hung."""

    codes: list[int | None]
    where: str
    seconds: float
    alone: float = 0.0
    left: float = 0.0  # seconds from the signal to the end

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes

    @property
    def complete(self) -> bool:
        return set(self.codes) == {0}


def start(
    scenario: Scenario, folder: Path, kill: Kill | None, beacons: list[Beacon], usual: float
) -> Attempt:
    """Forks the ranks of one attempt, kills them if they are to be killed from here, and waits."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    began = time.monotonic()
    pids: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until a rank listens
    for rank in range(scenario.ranks):
        beacons[rank].reset()
        pid = os.fork()
        if pid == 0:
            be_a_rank(scenario, folder, rank, pids[0] if pids else 0, kill, beacons[rank], port)
        pids.append(pid)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pids[0])
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if kill is not None and kill.kind in ("any instant", "read error"):
        time.sleep(kill.at % 1 * usual)
        os.killpg(pids[0], signal.SIGKILL)
    sent = began
    if kill is not None and kill.kind == "signal":
        time.sleep(kill.at % 1 * usual)
        sent, number = time.monotonic(), STOPS[int(kill.at)]
        if kill.rank < scenario.ranks:
            os.kill(pids[kill.rank], number)
        else:
            os.killpg(pids[0], number)
    codes, alone = _wait(pids)
    left = time.monotonic() - sent
    for beacon in beacons:
        beacon.receive()
    victim = beacons[kill.rank if kill is not None and kill.rank < scenario.ranks else 0]
    return Attempt(codes, victim.where, time.monotonic() - began, alone, left)


def _wait(pids: list[int]) -> tuple[list[int | None], float]:
    """The exit codes, and how long the others lived on after the first was killed.

    A rank that waits for one that left before they had met is told to leave, as by a launcher.
    """
    began, first_kill, alone = time.monotonic(), None, 0.0
    first_left = math.inf
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
                now = time.monotonic()
                first_left = min(first_left, now if codes[pid] == 75 else math.inf)
                if codes[pid] == -signal.SIGKILL and first_kill is None:
                    first_kill = now
                elif first_kill is not None:
                    alone = now - first_kill
        if time.monotonic() - first_left > MEETS:
            first_left = math.inf
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() - began > HANGS:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
        time.sleep(0.002)
    return [codes[pid] for pid in pids], alone


def cut_power(folder: Path, beacon: Beacon, chance: random.Random) -> None:
    """Takes from the disk what had not been synced when the ranks died."""
    for notes in folder.glob("notes-*.json"):
        try:
            unsynced, renames = json.loads(notes.read_text())
        except ValueError:  # it was killed while it wrote this
            continue
        for source, target in renames:
            if os.path.lexists(target) and not os.path.lexists(source):
                os.rename(target, source)
        for path in unsynced:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, os.path.getsize(path) // 2)
    metrics = folder / "run" / sinks.METRICS_FILE
    if metrics.exists() and (size := metrics.stat().st_size) > beacon.rows:
        os.truncate(metrics, chance.randint(beacon.rows, size))


def outcome(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """All that must be equal at the end of a run: its ending, and the sample ids of each step.

    Raises:
        StormError: an attempt saw other samples than another in the same step.
    """
    ids: dict[tuple[int, int], list[list[int]]] = {}
    for rank in range(scenario.ranks):
        for number in range(len(list(folder.glob(f"ids-{rank}-*")))):
            for key, seen in _read_ids(folder / f"ids-{rank}-{number}", rank).items():
                longer, shorter = sorted((seen, ids.get(key, [])), key=len, reverse=True)
                if longer[: len(shorter)] != shorter:
                    raise StormError(f"step {key[1]} saw other samples in start {number + 1}")
                ids[key] = longer
    return {**ending(folder / "run"), "sample ids": ids}


def _read_ids(path: Path, rank: int) -> dict[tuple[int, int], list[list[int]]]:
    seen: dict[tuple[int, int], list[list[int]]] = {}
    for line in path.read_text().splitlines():
        step, _, batch = json.loads(line)
        seen.setdefault((rank, step), []).append(batch)
    return seen


@dataclass
class Storm:
    """A storm over one scenario.

    Attributes:
        kills: so many by kind and place.
        starts, runs: attempts made; runs that completed and were compared.
        longest_alone: seconds that a rank outlived the one that was killed, at most.
    """

    scenario: Scenario
    folder: Path
    chance: random.Random
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    longest_alone: float = 0.0
    operations: int = 0
    verbose: bool = False

    def __post_init__(self) -> None:
        self.beacons = [Beacon() for _ in range(self.scenario.ranks)]
        self.folder.mkdir()

    def unbroken(self) -> None:
        """Trains the run that nobody kills, and learns how long one takes."""
        attempt = start(self.scenario, self.folder / "unbroken", None, self.beacons, 0)
        if not attempt.complete:
            raise StormError(f"unbroken: {attempt.codes}{self._output('unbroken')}")
        self.usual = attempt.seconds
        self.expected = outcome(self.scenario, self.folder / "unbroken")
        self.operations = self.beacons[0].operations // self.beacons[0].saves

    def run(self, plan: list[Kill]) -> None:
        """One run after the other until every planned kill has struck."""
        while plan:
            name = f"run-{self.runs}"
            reached, restarts = -1, 0
            while True:
                kill = plan[-1] if plan else None
                attempt = start(self.scenario, self.folder / name, kill, self.beacons, self.usual)
                self.starts += 1
                restarts += 1
                if self.verbose:
                    print(f"{name} {kill} {attempt}", flush=True)
                self._check(attempt, kill, name, reached)
                if attempt.complete:
                    break
                plan.pop()
                assert kill is not None
                self.kills[kill.kind, attempt.where] += 1
                published = self.beacons[0].published
                reached = max([reached, published, *saved_steps(self.folder / name / "run")])
                if kill.kind == "power cut":
                    cut_power(self.folder / name, self.beacons[0], self.chance)
            self._end(name)
            if restarts == 1 and plan:  # this kill does not strike before the end: another one
                plan[-1] = Kill("any instant", self.chance.random() * 0.8)

    def _check(self, attempt: Attempt, kill: Kill | None, name: str, reached: int) -> None:
        began = self.beacons[0].from_step
        if None in attempt.codes:
            raise StormError(f"{name}: hung in {attempt.where} after {kill}{self._output(name)}")
        # A signal that comes as the run ends leaves the other ranks to end with 0.
        in_order = {"signal": {0, 75}, "no answer": {1}}.get("" if kill is None else kill.kind, ())
        if not (attempt.complete or attempt.killed or set(attempt.codes) <= set(in_order)):
            raise StormError(f"{name}: left with {attempt.codes}{self._output(name)}")
        if 75 in attempt.codes and began < 0 and attempt.left % MEETS > LEAVES:
            raise StormError(f"{name}: left {attempt.left:.1f} s after {kill}{self._output(name)}")
        refused = kill is not None and kill.kind == "no answer" and not attempt.complete
        if refused and "could not be read" not in self._output(name):
            raise StormError(f"{name}: failed after {kill}{self._output(name)}")
        if 0 <= began < reached:
            raise StormError(f"{name}: went on from step {began}, but step {reached} was saved")
        if attempt.killed and (left := [c for c in attempt.codes if c != -signal.SIGKILL]):
            if kill is None or kill.kind != "one rank":
                raise StormError(f"{name}: left with {left} under {kill}{self._output(name)}")
            self.longest_alone = max(self.longest_alone, attempt.alone)
            if attempt.alone > ALONE:
                raise StormError(f"{name}: a rank outlived the other by {attempt.alone:.0f} s")

    def _end(self, name: str) -> None:
        folder = self.folder / name
        try:
            found = outcome(self.scenario, folder)
            if wrong := [name for name in found if found[name] != self.expected[name]]:
                raise StormError(f"{', '.join(wrong)}: not as in the run that nobody killed")
            checkpoints = folder / "run" / "checkpoints"
            aside = [p.name for p in checkpoints.iterdir() if p.name.startswith(".")]
            if aside:
                raise StormError(f"{', '.join(aside)} was left behind")
        except StormError as error:
            raise StormError(f"{name}: {error}{self._output(name)}") from None
        self.runs += 1
        shutil.rmtree(folder)

    def _output(self, name: str) -> str:
        parts = []
        for path in sorted((self.folder / name).glob("output-*.txt")):
            text = path.read_text(errors="replace")
            parts.append(f"\n--- {path.name}, its end:\n{text[-3000:]}")
        return "".join(parts)


def plan_kills(storm: Storm, count: int) -> list[Kill]:
    """`count` kills of all kinds, in random order; of the operations as many as possible."""
    ranks = storm.scenario.ranks
    kills = [Kill("any instant", storm.chance.random()) for _ in range(count // 2)]
    if ranks > 1:
        for _ in range(max(1, count // 10)):
            rank = storm.chance.randrange(ranks)
            kills.append(Kill("one rank", storm.chance.randint(1, 3 if rank else 12), rank))
    each = [Kill("file operation", n) for n in range(1, storm.operations + 1)]
    each += [Kill("file operation", n, rank) for rank in range(1, ranks) for n in range(1, 4)]
    storm.chance.shuffle(each)
    rest = count - len(kills)
    cuts = min(rest, max(1, rest // 4))
    kills += each[: rest - cuts]
    kills += [
        Kill("power cut", storm.chance.randint(1, 3 * storm.operations))
        for _ in range(count - len(kills))
    ]
    storm.chance.shuffle(kills)
    return kills


def plan_others(storm: Storm, signals: int, reads: int) -> list[Kill]:
    """Signals, four of five while the run starts, and operations that read which fail."""
    chance, ranks = storm.chance, storm.scenario.ranks
    kills = []
    for i in range(signals):
        # Ranks that have not met yet are ended by their launcher, which signals all of them.
        at, rank = (chance.uniform(0, 0.3), ranks) if i % 5 else (chance.uniform(0.4, 0.9), 0)
        kills.append(Kill("signal", chance.randrange(len(STOPS)) + at, rank))
    for i in range(reads):
        kind = "no answer" if i % 2 else "read error"
        kills.append(Kill(kind, chance.randint(1, 60) + chance.random(), chance.randrange(ranks)))
    return kills


def report(storms: list[Storm], seconds: float) -> str:
    """The table, for people."""
    lines = [
        f"{'':35}{'stops':>6}  " + "".join(f"{place:>11}" for place in PLACES) + "   starts  runs",
    ]
    for storm in storms:
        places = Counter[str]()
        for (_, where), number in storm.kills.items():
            places[where] += number
        lines.append(
            f"{storm.scenario!s:35}{sum(places.values()):6}  "
            + "".join(f"{places[place]:11}" for place in PLACES)
            + f"{storm.starts:9}{storm.runs:6}"
        )
    kinds = Counter[str]()
    for storm in storms:
        for (kind, _), number in storm.kills.items():
            kinds[kind] += number
    lines.append("")
    lines.append(
        f"{kinds.total()} stops in {seconds:.0f} s: "
        + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    )
    alone = max((storm.longest_alone for storm in storms), default=0.0)
    if kinds["one rank"]:
        lines.append(f"a rank left alone had gone after {alone:.1f} s at most")
    return "\n".join(lines)


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder in memory if there is one: the storm loses what was not synced on purpose."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="storm-", dir=place))
    before = os.getcwd()
    os.chdir(folder)  # outside of any repository, which each start would look at
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def warm_up() -> None:
    """What the first use of torch costs is paid once, before the forks."""
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()  # imports torch._dynamo
    logging.disable(logging.INFO)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all kinds of runs")
    parser.add_argument("--signals", type=int, default=200, help="likewise, mostly at the start")
    parser.add_argument("--reads", type=int, default=100, help="reads that fail, likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args(argv)
    warm_up()
    began, storms = time.monotonic(), []
    with working_folder() as folder:
        for i, scenario in enumerate(SCENARIOS):
            counts = (arguments.kills, arguments.signals, arguments.reads)
            share, *others = (n // len(SCENARIOS) + (i < n % len(SCENARIOS)) for n in counts)
            storm = Storm(scenario, folder / f"scenario-{i}", random.Random(arguments.seed + i))
            storm.verbose = arguments.verbose
            storms.append(storm)
            try:
                storm.unbroken()
                plan = plan_kills(storm, share) + plan_others(storm, *others)
                storm.chance.shuffle(plan)
                storm.run(plan)
            except StormError as error:
                print(report(storms, time.monotonic() - began))
                print(f"\nBROKEN ({scenario}, --seed {arguments.seed}): {error}")
                return 1
    print(report(storms, time.monotonic() - began))
    print("every run ended bitwise equal to the one that nobody killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
