"""What the tests of the storage on disk share."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.record import Record, shared_key

# Opens the file of the `path` fixture; the clock and the limits are those of `SqliteStorage`.
Open = Callable[..., SqliteStorage]


def save(storage: SqliteStorage) -> None:
    """Write what has changed, now."""
    asyncio.run(storage._commit())


def put(storage: SqliteStorage, *records: Record) -> None:
    for each in records:
        assert storage.store(shared_key(each.name), each.envelope).reason is None
    save(storage)


def tables(path: Path) -> list[tuple[bytes, ...]]:
    """The records in the file, read by SQLite alone."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT * FROM records").fetchall()
    connection.close()
    return rows


def aside(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir() if ".bad-" in each.name)
