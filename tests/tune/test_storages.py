"""open_storage: each kind, opened by several processes, after a kill, and what it refuses."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paceline.errors import ConfigError, MissingExtraError
from paceline.log.secrets import mask_text
from paceline.tune.storages import check_storage, open_storage

WORKER = """
import sys
from pathlib import Path
import optuna
from paceline.tune.storages import open_storage
optuna.logging.set_verbosity(optuna.logging.ERROR)
spec, folder, count = sys.argv[1] or None, Path(sys.argv[2]), int(sys.argv[3])
study = optuna.create_study(
    storage=open_storage(spec, folder), study_name="s", load_if_exists=True,
    sampler=optuna.samplers.RandomSampler(),
)
for _ in range(count):
    trial = study.ask()
    trial.report(trial.suggest_float("x", 0, 1), step=1)
    study.tell(trial, trial.params["x"])
"""


def start(spec: str, folder: Path, count: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WORKER, spec, str(folder), str(count)]
    return subprocess.Popen(words, stderr=subprocess.PIPE)


def finished(*workers: subprocess.Popen[bytes]) -> None:
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()


def numbers(spec: str | None, folder: Path) -> list[int]:
    import optuna

    study = optuna.load_study(study_name="s", storage=open_storage(spec, folder))
    return sorted(trial.number for trial in study.get_trials())


def test_the_database_of_a_study_is_in_wal_mode_and_waits_for_others(tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path / "study")
    with storage.engine.connect() as connection:  # type: ignore[attr-defined]
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60_000}
    assert sqlite3.connect(tmp_path / "study/study.db").execute("PRAGMA journal_mode").fetchone()


def test_processes_that_open_one_storage_at_the_same_instant(tmp_path: Path) -> None:
    journal = f"journal:{tmp_path}/shared/trials.journal"
    workers = [start(spec, tmp_path / "a", 5) for spec in ("", journal) for _ in range(2)]
    finished(*workers)
    assert numbers(None, tmp_path / "a") == list(range(10))
    assert numbers(journal, tmp_path) == list(range(10))
    assert not list((tmp_path / "shared").glob("*.lock"))


@pytest.mark.parametrize(
    "torn", [b'{"op_code":4,"wor', b"\0" * 5000 + b"\n", b'{"op_code"\n{"op' + b"x" * 70_000]
)
def test_a_torn_last_line_is_cut_when_a_journal_is_opened(tmp_path: Path, torn: bytes) -> None:
    import optuna

    path = tmp_path / "trials.journal"
    study = optuna.create_study(storage=open_storage(f"journal:{path}", tmp_path), study_name="s")
    study.tell(study.ask(), 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    study = optuna.load_study(study_name="s", storage=open_storage(f"journal:{path}", tmp_path))
    assert path.read_bytes() == whole
    study.tell(study.ask(), 2.0)
    assert [trial.value for trial in study.get_trials()] == [1.0, 2.0]


def test_a_line_torn_while_others_have_the_journal_open(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "trials.journal"
    spec = f"journal:{path}"
    study = optuna.create_study(storage=open_storage(spec, tmp_path), study_name="s")
    study.tell(study.ask(), 1.0)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"wor')  # another worker, killed in its write
    study.tell(study.ask(), 2.0)
    again = optuna.load_study(study_name="s", storage=open_storage(spec, tmp_path))
    assert [trial.value for trial in again.get_trials()] == [1.0, 2.0]


HOLDER = """
import sys, time
from pathlib import Path
from paceline.tune.journal import OwnedLock
OwnedLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_removed_at_once(tmp_path: Path) -> None:
    from paceline.tune.journal import OwnedLock

    path = tmp_path / "trials.journal"
    path.touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lock = OwnedLock(path)
    holder.send_signal(signal.SIGSTOP)  # alive: its lock stands
    assert not lock_within(lock, 0.3)
    holder.kill()  # and not yet waited for
    before = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - before < 5
    lock.release()
    assert os.listdir(tmp_path) == ["trials.journal"]
    holder.communicate()


def lock_within(lock: object, seconds: float) -> bool:
    """Whether the lock was got in a time, by an alarm that interrupts the wait."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return lock.acquire()  # type: ignore[attr-defined]
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_lock_of_another_machine_stands_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.tune import journal

    path = tmp_path / "trials.journal"
    path.touch()
    os.symlink("another-boot:1:2:3:4", tmp_path / "trials.journal.lock")
    assert not lock_within(journal.OwnedLock(path), 0.2)
    monkeypatch.setattr(journal, "_GRACE", 0.1)
    assert lock_within(journal.OwnedLock(path), 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sqllite:///x.db", "did you mean 'sqlite'"),
        ("postgresql://host/db", r"postgresql\+psycopg://"),
        ("sqlite:///:memory:", "no file that several processes"),
        ("sqlite://", "no file that several processes"),
        ("journal:", "no file that several processes"),
        ("grpc://host", "grpc://HOST:PORT"),
        ("grpc://host:port", "grpc://HOST:PORT"),
        ("study.db", "no such kind of storage"),
    ],
)
def test_what_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_storage(spec, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        (None, "optuna", "tune"),
        ("postgresql+psycopg://h/d", "psycopg", "postgresql"),
        ("grpc://h:1", "grpc", "grpc"),
    ],
)
def test_a_missing_extra_is_named(
    spec: str | None, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a)
    )
    with pytest.raises(MissingExtraError, match=rf"paceline\[{extra}\]"):
        check_storage(spec)


def test_a_server_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    spec = "postgresql+psycopg://me:correct-horse@127.0.0.1:9/db"
    with pytest.raises(ConfigError) as caught:
        open_storage(spec, tmp_path)
    assert "correct-horse" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert caught.value.__suppress_context__
    assert mask_text("it said correct-horse") == "it said ***"


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for spec in (f"journal:{tmp_path}/file/j", f"sqlite:///{tmp_path}/file/s.db"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            open_storage(spec, tmp_path)
