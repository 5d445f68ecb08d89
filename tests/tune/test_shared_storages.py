"""Four workers on each kind of storage, a PostgreSQL that the test starts itself among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.testing.ranks import free_port
from paceline.tune import Study

TRIALS = 16


def square(trial: Any) -> float:
    x = trial.suggest_float("x", -1, 1)
    trial.report(x, 1)
    return x * x


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of a server of its own, which refuses to run as root."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin"), *os.environ["PATH"].split(os.pathsep)]
    programs = next((Path(one) for one in found if (Path(one) / "pg_ctl").exists()), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    root = os.geteuid() == 0
    if root and subprocess.run(["id", "postgres"], capture_output=True).returncode:
        pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    # Not below the test's own folder: the server's user cannot enter that.
    folder = Path(tempfile.mkdtemp(prefix="paceline-postgresql-"))
    if root:
        shutil.chown(folder, "postgres")

    def run(line: str) -> None:
        words = ["su", "postgres", "-s", "/bin/sh", "-c", line] if root else ["sh", "-c", line]
        log = folder.with_suffix(".log")
        with log.open("w") as file:  # no pipe, which the server would keep open
            code = subprocess.run(words, stdout=file, stderr=file, cwd="/").returncode
        said = log.read_text()
        log.unlink()
        assert code == 0, said

    port = free_port()
    options = f"-p {port} -k {folder} -c fsync=off -c listen_addresses=127.0.0.1"
    try:
        run(f"{programs}/initdb -D {folder}/data -A trust -N")
        run(f"{programs}/pg_ctl -D {folder}/data -l {folder}/log -w -o '{options}' start")
        try:
            run(f"{programs}/createdb -h 127.0.0.1 -p {port} study")
            user = "postgres" if root else os.environ.get("USER", "postgres")
            yield f"postgresql+psycopg://{user}:not-a-secret@127.0.0.1:{port}/study"
        finally:
            run(f"{programs}/pg_ctl -D {folder}/data -m immediate -w stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def searched(folder: Path, storage: str | None) -> Study:
    settings = {"sampler": "random"} | ({} if storage is None else {"storage": storage})
    return Study(square, folder, settings=settings).optimize(TRIALS, workers=4)


def assert_each_once(study: Study) -> None:
    assert [trial.number for trial in study.trials] == list(range(TRIALS))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert len({trial.params["x"] for trial in study.trials}) == TRIALS
    assert list(study.folder.lines()) == list(range(TRIALS))


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_four_workers_on_a_file(tmp_path: Path, kind: str) -> None:
    storage = None if kind == "sqlite" else f"journal:{tmp_path}/shared.journal"
    study = searched(tmp_path / "s", storage)
    assert_each_once(study)
    assert not list(tmp_path.glob("*.lock"))


def test_four_workers_on_postgresql(tmp_path: Path, postgresql: str) -> None:
    pytest.importorskip("psycopg")
    study = searched(tmp_path / "s", postgresql)
    assert_each_once(study)
    written = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert not [path for path in written if b"not-a-secret" in path.read_bytes()]
    study._close()
