"""Fixtures of the storage on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from plasm_dht.dht.sqlite import SqliteStorage
from tests.dht.disk import Open
from tests.dht.support import ManualClock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "node.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Opens the file, as often as it is asked to: what was open before is let go of as a killed process does."""
    storages: list[SqliteStorage] = []

    def open_it(clock: ManualClock | None = None, **options: int) -> SqliteStorage:
        for storage in storages:
            storage.abandon()
        storages.append(SqliteStorage(path, clock=clock or ManualClock(), **options))
        return storages[-1]

    yield open_it
    for storage in storages:
        storage.abandon()
