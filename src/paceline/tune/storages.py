"""open_storage: where a study keeps its trials, from one line of text."""

from __future__ import annotations

import contextlib
import importlib.util
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from paceline.errors import ConfigError, MissingExtraError, nearest
from paceline.log.secrets import mask_text, remember_credentials

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STUDY_DATABASE = "study.db"
_KINDS = {
    "sqlite": "sqlite:///PATH",
    "journal": "journal:PATH",
    "postgresql": "postgresql+psycopg://USER@HOST/DATABASE",
    "grpc": "grpc://HOST:PORT",
}
_PATIENCE = 60.0  # seconds that a writer waits for another one's transaction
_SERVER = 10.0  # seconds until a server has to answer
_TRIES = 5  # of several processes that create the same tables, all but one fail at first


def check_storage(spec: str | None) -> None:
    """Raises if `open_storage` would refuse a storage before it looks for it. Opens nothing.

    Args:
        spec: as `open_storage` takes it.

    Raises:
        ConfigError: there is no such kind of storage, or part of the address is missing.
        MissingExtraError: a package that it needs is not installed.
    """
    _require("optuna", "tune", "a study")
    if spec is None:
        return
    kind = _kind(spec)
    if kind == "postgresql":
        _require("psycopg", "postgresql", "a study on PostgreSQL")
    elif kind == "grpc":
        _require("grpc", "grpc", "a study over gRPC")
        _address(spec)
    elif not _path(spec):
        raise ConfigError(
            f"storage {spec!r} names no file that several processes could share: write "
            f"{_KINDS[kind]}."
        )


def open_storage(spec: str | None, folder: Path) -> BaseStorage:
    """Opens the storage of a study, and creates what is not there yet.

    - None: a SQLite database `study.db` in the study's folder.
    - `sqlite:///PATH`: a SQLite database on a disk of this machine. Both are kept in WAL mode with
      `synchronous=NORMAL`: after a power cut the last trials may be missing, never broken.
    - `journal:PATH`: a file that processes of several machines append to, in a shared folder.
    - `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`.
    - `grpc://HOST:PORT`: a proxy that serves another storage (`optuna.storages.
      run_grpc_proxy_server`), for very many workers.

    Args:
        spec: one of the above. Relative paths start in the working directory.
        folder: the study's folder, created if it is missing.

    Returns:
        A storage, safe to use beside those that other processes open.

    Raises:
        ConfigError: there is no such kind of storage, or it cannot be opened. A password in `spec`
            is masked in the message, and from then on in whatever `log/secrets.py` masks.
        MissingExtraError: a package that it needs is not installed.
    """
    if spec is not None:
        remember_credentials({"password": _password(spec)})
    check_storage(spec)
    if spec is None:
        return _sqlite(folder / STUDY_DATABASE, f"sqlite:///{folder / STUDY_DATABASE}")
    opener: dict[str, Callable[[], BaseStorage]] = {
        "sqlite": lambda: _sqlite(Path(_path(spec)), spec),
        "journal": lambda: _journal(Path(_path(spec))),
        "postgresql": lambda: _server(spec),
        "grpc": lambda: _proxy(spec),
    }
    return opener[_kind(spec)]()


def _kind(spec: str) -> str:
    name = spec.partition(":")[0]
    kind, _, driver = name.partition("+")
    if kind == "postgresql" and driver != "psycopg":
        raise ConfigError(
            f"storage {mask_text(spec)!r}: write {_KINDS[kind]}; psycopg is the driver that the "
            'extra "postgresql" brings.'
        )
    if kind not in _KINDS or (driver and kind != "postgresql") or ":" not in spec:
        raise ConfigError(
            f"storage {mask_text(spec)!r}: no such kind of storage{nearest(kind, _KINDS)}. There "
            f"are {', '.join(_KINDS.values())}; without `storage` a study keeps its trials in "
            f"{STUDY_DATABASE} in its own folder."
        )
    return kind


def _require(module: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(
            f'{what} needs the package {module}: pip install "paceline[{extra}]".'
        )


def _path(spec: str) -> str:
    """The file of a SQLite or journal storage; empty where there is none."""
    if spec.startswith("journal:"):
        return spec.removeprefix("journal:")
    path = spec.removeprefix("sqlite:///").partition("?")[0]
    return "" if path == ":memory:" or not spec.startswith("sqlite:///") else path


def _address(spec: str) -> tuple[str, int]:
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(spec)
        if parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.hostname, parts.port
    raise ConfigError(f"storage {mask_text(spec)!r}: write {_KINDS['grpc']}.")


def _password(spec: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(spec).password or ""
    return ""


def _sqlite(path: Path, url: str) -> BaseStorage:
    from sqlalchemy import event

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_ahead(path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the study's database {path} cannot be opened: {error}.") from error
    storage = _database(url, {"connect_args": {"timeout": _PATIENCE}})

    def connected(connection: Any, _: Any) -> None:
        # Of each connection: in WAL mode a crash of the process loses nothing, and a power cut only
        # what came last. FULL would wait for the disk a dozen times a trial.
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", connected)
    storage.engine.dispose()  # those opened above are not in that mode
    return storage


def _write_ahead(path: Path) -> None:
    """Puts a database in WAL mode, for good, before anything else is written to it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        connection = sqlite3.connect(path, timeout=_PATIENCE)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # The change of mode does not wait for the lock, whatever the timeout.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        finally:
            connection.close()


def _server(url: str) -> BaseStorage:
    # A server closes connections that were idle for the hours between two reports.
    return _database(
        url, {"pool_pre_ping": True, "connect_args": {"connect_timeout": int(_SERVER)}}
    )


def _database(url: str, engine: dict[str, Any]) -> Any:
    import sqlalchemy.exc
    from optuna.storages import RDBStorage

    for attempt in range(_TRIES):
        try:
            return RDBStorage(url, engine_kwargs=engine)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            wrong = error  # another process has created the tables at the same instant
        except sqlalchemy.exc.OperationalError as error:
            wrong = error
            if "already exists" not in str(error) and "locked" not in str(error):
                break
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:  # of another Optuna
            wrong = error
            break
        time.sleep(0.1 * (attempt + 1))
    cause = str(getattr(wrong, "orig", None) or wrong).strip().splitlines()
    raise ConfigError(
        f"storage {mask_text(url)!r} cannot be opened: {mask_text(cause[0] if cause else '')}"
    ) from None  # the chained error would show the address


def _journal(path: Path) -> BaseStorage:
    from optuna.storages.journal import JournalStorage

    from paceline.tune.journal import Journal

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(path))
    except OSError as error:
        raise ConfigError(f"the study's journal {path} cannot be opened: {error}.") from error


def _proxy(spec: str) -> BaseStorage:
    import warnings

    import optuna

    host, port = _address(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=_SERVER)
    except ConnectionError:
        storage.close()
        raise ConfigError(
            f"storage {mask_text(spec)!r}: no server answers there within {_SERVER:.0f} s. Start "
            "one with optuna.storages.run_grpc_proxy_server(...)."
        ) from None
    return storage
