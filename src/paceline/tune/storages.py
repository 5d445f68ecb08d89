"""Where the trials of a study are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_storage(spec: str | None, folder: Path) -> Any:
    """Opens Optuna's storage of a study.

    Args:
        spec: None for `study.db` in the folder, or a URL.
        folder: of the study.
    """
    import sqlalchemy
    from optuna.storages import RDBStorage

    url = spec or f"sqlite:///{folder / 'study.db'}"
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    def settle(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy.event.listen(storage.engine, "connect", settle)
    storage.engine.dispose()
    return storage
