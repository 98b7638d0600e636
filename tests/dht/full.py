"""A node's storage on a disk that is too small: `python -m tests.dht.full FOLDER`, where FOLDER is a small file system.

It fails where something is lost, set aside or not said.
"""

import asyncio
import logging
import sys
from pathlib import Path

import pytest

from plasm_dht.dht import sqlite
from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.errors import ConfigError
from plasm_dht.record import shared_key
from tests.dht.disk import aside
from tests.dht.support import record, until

# More than the disk has room for beside the ballast, and less than it has without (records of 700 bytes).
RECORDS = 200


def fill(ballast: Path, most: int) -> None:
    """Take the room, `most` bytes of it at the most."""
    with ballast.open("wb", buffering=0) as file:
        try:
            for _ in range(most // 512):
                file.write(bytes(512))
        except OSError:
            return


class Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def count(self, words: str) -> int:
        return sum(words in line for line in self.lines)


def open_on_a_full_disk(path: Path, ballast: Path) -> None:
    """A start is refused in one line, and leaves nothing that the next one would set aside."""
    fill(ballast, 2**30)
    with pytest.raises(ConfigError, match="cannot be used: database or disk is full"):
        SqliteStorage(path)
    ballast.unlink()
    SqliteStorage(path).abandon()


async def store_on_a_disk_that_becomes_full(path: Path, ballast: Path, said: Said) -> None:
    """What is accepted meanwhile is held in memory, and written when there is room."""
    fill(ballast, 400_000)
    storage = SqliteStorage(path)
    running = asyncio.create_task(storage.run())
    for number in range(RECORDS):
        made = record(bytes(500), name=f"n{number}", issued_at=storage.clock.wall())
        assert storage.store(shared_key(made.name), made.envelope).reason is None
        await asyncio.sleep(0.001)
    await until(lambda: said.count("database or disk is full"))
    held = dict(storage)
    assert len(held) == RECORDS
    await asyncio.to_thread(ballast.unlink)
    await until(lambda: said.count("is written again"))
    running.cancel()
    await storage.close()
    again = SqliteStorage(path)
    assert dict(again) == held
    again.abandon()


def main() -> None:
    folder, said = Path(sys.argv[1]), Said()
    logging.basicConfig(level=logging.INFO, handlers=[said])
    sqlite.RETRY_AFTER, sqlite.GATHER = 0.05, 0.0
    path, ballast = folder / "state" / "node.sqlite", folder / "ballast"
    open_on_a_full_disk(path, ballast)
    asyncio.run(store_on_a_disk_that_becomes_full(path, ballast, said))
    assert aside(path) == []
    assert said.count("database or disk is full") == 1, said.lines


if __name__ == "__main__":
    main()
