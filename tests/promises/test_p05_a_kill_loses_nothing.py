"""P5 A kill at any instant loses at most the work since the last checkpoint."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import storm
import storm_ranks
from builders import Noisy, Regression, loader, make_model
from endings import ending, saved_steps
from faults import DOES_NOT_ANSWER, FaultyDisk, QuickDisk, unreadable_from
from paceline import Callback, CheckpointPolicy, MetricMonitor, reading
from paceline.callbacks import AveragedWeights
from paceline.checkpoint import native_engine
from paceline.errors import CheckpointError, PacelineError
from paceline.log import row_file
from paceline.testing import Ranks, Trace

STEPS = 12


def build(run_dir: Path, *callbacks: Any, **policy: Any) -> Regression:
    """7 micro-batches an epoch (97 samples), accumulation 2: 4 windows an epoch."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Regression(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        train_dataloader=loader(Noisy(), 15),
        val_dataloader=loader(Noisy(23), 10, shuffle=False),
        gradient_accumulation_steps=2,
        metric_monitor=MetricMonitor(),
        validate_every=3,
        callbacks=[AveragedWeights(decay=0.9), *callbacks],
        checkpoint=CheckpointPolicy(
            **{"every_epochs": None, "every_steps": 2, "save_best": False, **policy}
        ),
        max_steps=STEPS,
        progress=False,
        log_every=2,
        run_dir=run_dir,
    )


def run(run_dir: Path, *callbacks: Any, **policy: Any) -> Regression:
    trainer = build(run_dir, *callbacks, **policy)
    trainer.train(seed=11)
    return trainer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_engine, "Disk", QuickDisk)


class Unbroken(NamedTuple):
    """A run that nobody kills, all of its checkpoints kept; how it ends, and its events."""

    folder: Path
    ending: dict[str, Any]
    trace: list[tuple[str, int]]


def train_unbroken(folder: Path) -> Unbroken:
    trace = Trace()
    run(folder, trace, every_epochs=1, every_steps=1, keep_last=None)
    return Unbroken(folder, ending(folder), trace.events)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return train_unbroken(tmp_path_factory.mktemp("unbroken") / "run")


# Kills


def test_a_storm_of_kills(ranks: Ranks) -> None:
    """A small `make storm`: kills, power cuts, signals at the start, reads that fail."""
    [outcome] = ranks.outcomes(be_a_storm, 1, limit=240)
    assert outcome.code == 0, outcome.output
    assert "every run ended bitwise equal" in outcome.output


def be_a_storm() -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    storm_ranks.STEPS = 12  # of 24: six saves or twelve, and four validations
    sys.exit(storm.main(["--kills", "5", "--signals", "3", "--reads", "3", "--seed", "3"]))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_after_any_save_the_run_goes_on_exactly(
    step: int, tmp_path: Path, unbroken: Unbroken
) -> None:
    """Saves in mid-epoch, at a validation, at an epoch's end: the events, too, go on from there."""
    killed_after(unbroken.folder, tmp_path / "run", step)
    trace = Trace()
    run(tmp_path / "run", trace, every_epochs=1, every_steps=1, keep_last=None)
    assert ending(tmp_path / "run") == unbroken.ending
    begun = [event for event, _ in trace.events].index("on_train_start") + 1
    saved = unbroken.trace.index(("on_save_checkpoint", step))
    assert trace.events[begun:] == unbroken.trace[saved + 1 :]


def killed_after(unbroken: Path, folder: Path, step: int) -> None:
    """Makes in `folder` what a run leaves that is killed just after its save of `step`."""
    shutil.copytree(unbroken, folder)
    for later in [s for s in saved_steps(folder) if s > step]:
        shutil.rmtree(folder / "checkpoints" / f"step_{later:08d}")


def check_kills(folder: Path, kills: list[storm.Kill], scenario: int = 0) -> None:
    """Some kills of the storm, in this process."""
    strikes = storm.Storm(storm.SCENARIOS[scenario], folder / "storm", random.Random(0))
    strikes.unbroken()
    strikes.run(kills[::-1])


# A disk that fails


class FailsInSave(FaultyDisk):
    """Fails at the n-th operation of one save, or at every one from there on."""

    def __init__(self, step: int, at: int, for_good: bool = False, code: int = errno.ENOSPC):
        super().__init__(self._fail)
        self.step, self.at, self.for_good, self.code = step, at, for_good, code
        self.begun = self.met = self.failures = 0

    def _fail(self, n: int, name: str, args: tuple[Any, ...]) -> None:
        if name == "mkdir" and args[0].suffix == ".new" and not (self.begun and self.for_good):
            self.begun = n if args[0].name == f".step_{self.step:08d}.new" else 0
        at = n - self.begun + 1
        hit = at >= self.at if self.for_good else at == self.at
        self.met += bool(self.begun and hit)
        if self.begun and hit and name != "close":  # a file that stays open would be the test's
            self.failures += 1
            raise OSError(self.code, os.strerror(self.code))


class Watching(Callback):
    """Notes which checkpoints are there after every step, once the save in flight has ended."""

    def __init__(self) -> None:
        self.saved: dict[int, list[int]] = {}

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        trainer._run.saver.wait()
        self.saved[trainer.global_step] = saved_steps(trainer.run_dir)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_at_any_operation_of_a_save_leaves_the_one_before_and_the_run_goes_on(
    tmp_path: Path,
    unbroken: Unbroken,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Given a disk that is full at one operation of the second save (keep_last=1), the run says
    so, trains on, saves at its next trigger, and ends as ever. Every third operation on each path;
    `test_kill.py` has a save, without a run, fail at all of them."""
    failed_saves = 0
    for n in itertools.count(1 + asynchronous, 3):
        folder, disk, watching = tmp_path / str(n), FailsInSave(4, n), Watching()
        monkeypatch.setattr(native_engine, "Disk", lambda disk=disk: disk)
        trainer = run(folder, watching, asynchronous=asynchronous, keep_last=1)
        told = capsys.readouterr().err
        assert trainer.result.complete
        assert ending(folder) == unbroken.ending
        assert watching.saved[5] in ([2], [4], [2, 4])
        assert saved_steps(folder) == [STEPS]
        if watching.saved[5] == [2]:
            failed_saves += 1
            assert "step 4: the checkpoint could not be written: No space left" in told
            assert watching.saved[7] == [6]
        elif disk.failures:
            assert "could not be" in told
        if not disk.met:  # the save has fewer operations
            break
    assert n > 20
    assert failed_saves > 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_disk_that_fails_for_good_fails_the_run_at_its_last_save(
    tmp_path: Path,
    unbroken: Unbroken,
    asynchronous: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What could not be saved cannot be called done; the checkpoint before is there to go on."""
    for n in (1, 5, 9):
        folder, disk = tmp_path / str(n), FailsInSave(6, n, for_good=True, code=code)
        monkeypatch.setattr(native_engine, "Disk", lambda disk=disk: disk)
        with pytest.raises(CheckpointError, match=f"step {STEPS}.*{os.strerror(code)}"):
            run(folder, asynchronous=asynchronous)
        monkeypatch.setattr(native_engine, "Disk", QuickDisk)
        assert saved_steps(folder) == [4]
        run(folder)
        assert ending(folder) == unbroken.ending


@pytest.mark.parametrize("size", [1, 2])
def test_a_process_whose_last_save_fails_leaves_with_1(
    ranks: Ranks, tmp_path: Path, size: int
) -> None:
    outcomes = ranks.outcomes(train_on_a_full_disk, size, tmp_path)
    assert [outcome.code for outcome in outcomes] == [1] * size
    assert all("CheckpointError" in outcome.output for outcome in outcomes)
    assert saved_steps(tmp_path / "run") == [10]


def train_on_a_full_disk(folder: Path) -> None:
    native_engine.Disk = lambda: FailsInSave(STEPS, 4)  # type: ignore[misc, assignment]
    run(folder / "run")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_rows_that_the_disk_refuses_hold_back_the_checkpoint_that_counts_on_them(
    tmp_path: Path,
    unbroken: Unbroken,
    asynchronous: bool,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class FullForRows:
        """The `os` module of a disk that takes no rows from the end of step 5 to that of step 7."""

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: Any) -> Any:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            full = name == call and max(watching.saved, default=0) in (5, 6)
            return refuse if full else getattr(os, name)

    monkeypatch.setattr(row_file, "os", FullForRows())
    watching = Watching()
    trainer = build(tmp_path / "run", watching, asynchronous=asynchronous)
    trainer.train(seed=11)
    assert watching.saved[7] == [4]
    assert watching.saved[9] == [8]
    assert "step 6: the checkpoint could not be written" in capsys.readouterr().err
    assert ending(tmp_path / "run") == unbroken.ending


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0b100
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NEWEST = Path("checkpoints/step_00000008")
SHARD = NEWEST / "shard-00001-model-00001-of-00001.safetensors"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    f"{name} {file.name[:8]}": lambda run, spoil=spoil, file=file: spoil(run / file)
    for file in (NEWEST / "state.json", NEWEST / "manifest.json", SHARD)
    for name, spoil in (("truncated", truncate), ("flipped", flip), ("missing", Path.unlink))
} | {
    "empty folder": lambda run: (shutil.rmtree(run / NEWEST), (run / NEWEST).mkdir()),
}
HARMLESS: dict[str, Callable[[Path], Any]] = {
    "latest names another": lambda run: (run / "checkpoints/latest").write_text("step_00000002\n"),
    "latest is garbage": lambda run: (run / "checkpoints/latest").write_bytes(b"\xff\0../../x"),
    "best is missing": lambda run: (run / "checkpoints/best").unlink(missing_ok=True),
    "best points nowhere": lambda run: (
        (run / "checkpoints/best").unlink(),
        (run / "checkpoints/best").symlink_to("/nowhere/at/all"),
    ),
    "a torn row": lambda run: (run / "metrics.jsonl").open("ab").write(b'{"step": 9, "epo'),
    "rows beyond": lambda run: (run / "metrics.jsonl").open("ab").write(b'{"step": 9}\n' * 4),
    "torn timing": lambda run: truncate(run / "timing.jsonl"),
    "no timing": lambda run: (run / "timing.jsonl").unlink(),
    "run.json is garbage": lambda run: (run / "run.json").write_bytes(b"\0\xff{{{"),
    "run.json is a list": lambda run: (run / "run.json").write_text("[1, 2]"),
    "no run.json": lambda run: (run / "run.json").unlink(),
    "half a save": lambda run: shutil.copytree(
        run / NEWEST,
        run / "checkpoints/.step_00000010.new",
        ignore=shutil.ignore_patterns("manifest.json"),
    ),
    "half a removal": lambda run: shutil.copytree(
        run / NEWEST, run / "checkpoints/.step_00000002.gone"
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(
    tmp_path: Path, unbroken: Unbroken, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_damage(tmp_path, DAMAGE[kind], 7, unbroken)
    assert "damaged: " in (told := capsys.readouterr().err)
    assert "step_00000008" in told
    assert ".damaged" in told
    assert (tmp_path / "run/checkpoints/.damaged/step_00000008").is_dir()


@pytest.mark.parametrize("kind", HARMLESS)
def test_whatever_else_is_damaged_the_newest_checkpoint_goes_on(
    tmp_path: Path, unbroken: Unbroken, kind: str
) -> None:
    check_damage(tmp_path, HARMLESS[kind], 8, unbroken)
    hidden = [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name[0] == "."]
    assert hidden == []


def check_damage(
    folder: Path, damage: Callable[[Path], Any], goes_on_from: int, unbroken: Unbroken | None = None
) -> None:
    """Kills a run after step 8, damages it, and starts it again."""
    unbroken = unbroken or train_unbroken(folder / "unbroken")
    killed_after(unbroken.folder, folder / "run", 8)
    damage(folder / "run")
    trace = Trace()
    run(folder / "run", trace, keep_last=None)
    assert ("on_load_checkpoint", goes_on_from) in trace.events
    assert ending(folder / "run") == unbroken.ending


def test_with_every_checkpoint_damaged_the_run_says_so_and_starts_again(
    tmp_path: Path, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_after(unbroken.folder, tmp_path / "run", 2)
    for step in (1, 2):
        flip(tmp_path / f"run/checkpoints/step_{step:08d}/state.json")
    run(tmp_path / "run")
    told = capsys.readouterr().err
    assert told.count("damaged: ") == 2
    assert "no intact checkpoint" in told
    assert ending(tmp_path / "run") == unbroken.ending


# Files that cannot be read


def test_a_run_that_cannot_be_read_does_not_start_and_stays_as_it_is(
    tmp_path: Path, unbroken: Unbroken
) -> None:
    check_unreadable(tmp_path, unbroken)


def check_unreadable(folder: Path, unbroken: Unbroken | None = None) -> None:
    """Given a run killed after step 8, whose disk stops to answer at any operation that reads, the
    start is refused and every file keeps its bytes and its place; later it goes on exactly."""
    unbroken = unbroken or train_unbroken(folder / "unbroken")
    killed_after(unbroken.folder, folder / "run", 8)
    before = files_of(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PAUSES", (0, 0))
        for n in itertools.count(1, 7):
            code = DOES_NOT_ANSWER[n % len(DOES_NOT_ANSWER)]
            reader = unreadable_from(folder / "run", n, code)
            patch.setattr(reading, "reader", reader)
            with pytest.raises(PacelineError, match="could not be read in 3 attempts"):
                build(folder / "run", StopsAtOnce()).train(seed=11)
            if (folder / "run/trained").exists():
                break
            assert files_of(folder / "run") == before
    assert n > 30
    shutil.rmtree(folder / "run")
    killed_after(unbroken.folder, folder / "run", 8)
    run(folder / "run", keep_last=None)
    assert ending(folder / "run") == unbroken.ending


class StopsAtOnce(Callback):
    """Tells that the run has started."""

    def on_train_start(self, trainer: Any) -> None:
        (trainer.run_dir / "trained").touch()


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_ranks_whose_run_cannot_be_read_all_leave_with_an_error(
    ranks: Ranks, tmp_path: Path, unbroken: Unbroken
) -> None:
    killed_after(unbroken.folder, tmp_path / "run", 2)
    before = files_of(tmp_path / "run")
    outcomes = ranks.outcomes(train_unreadable, 2, tmp_path / "run")
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert all("could not be read" in outcome.output for outcome in outcomes)
    assert files_of(tmp_path / "run") == before


def train_unreadable(folder: Path) -> None:
    reading.PAUSES = (0,)
    if os.environ["RANK"] == "0":
        reading.reader = unreadable_from(folder / "checkpoints/step_00000002/state.json", 1)
    run(folder)
