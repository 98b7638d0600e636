"""A state file that is torn, foreign or full of surprises: a start goes on, and what was damaged is not believed."""

import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plasm_dht.dht import statefile
from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.record import bound_key, shared_key
from tests.dht.support import IDENTITIES, NAME, START, ManualClock, record
from tests.fuzz.guard import require
from tests.fuzz.source import TEXTS, Source, anything, mutated

BY = IDENTITIES[0]
KEY, BOUND = shared_key(NAME), bound_key(BY.public_key, NAME)
COLUMNS = {"node": 1, "records": 7, "contacts": 2, "said": 3}
FILE = "node.sqlite"
MEMORY = Path("/dev/shm")  # a start waits for the disk several times, which is all that a thousand of them would do
NEW = record(b"new", by=IDENTITIES[9])


class Folder:
    """A state directory, the samples that are put into it, and what the start says of them."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="plasm-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
        self.path = Path(self._temporary.name) / "state"
        self.said: list[logging.LogRecord] = []
        self.known = {NEW.envelope, b""}
        self.samples = self._make()

    def _make(self) -> dict[str, bytes]:
        """A file with everything in it, and a log beside it that is not merged yet."""
        self.empty()
        storage = self.open()
        storage.attach(b"\x55" * 20, storage.clock)
        storage.keep_contacts([("10.0.0.1", 8468), ("2001:db8::1", 8468)])
        for number, by in enumerate(IDENTITIES[1:9]):
            each = record(b"v" * 40 * number, by=by)
            storage.store(KEY, each.envelope)
            self.known.add(each.envelope)
        write(storage)
        storage.abandon()
        storage = self.open()
        own = record(b"own", by=BY)
        self.known.add(own.envelope)
        storage.keep_own(KEY, own)
        storage.keep_own(BOUND, own)
        write(storage)
        samples = {each.name: each.read_bytes() for each in self.path.iterdir() if not each.name.endswith("lock")}
        storage.abandon()
        assert set(samples) >= {FILE, f"{FILE}-wal"}
        return samples

    def empty(self) -> None:
        """Nothing is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()

    def open(self) -> SqliteStorage:
        """As a node does at its start; what is logged is noted."""
        handler = logging.Handler()
        handler.emit = self.said.append  # type: ignore[method-assign]
        statefile.log.addHandler(handler)
        statefile.log.propagate = False
        try:
            return SqliteStorage(self.path / FILE, clock=ManualClock(START + 1000))
        finally:
            statefile.log.removeHandler(handler)
            statefile.log.propagate = True


def write(storage: SqliteStorage) -> None:
    """What the node's thread does, at once."""
    assert storage._file is not None
    storage._file.write(storage._take(), storage._booted_at())


class _Stage:
    folder: Folder | None = None


def renew() -> None:
    """Forget the folder."""
    folder, _Stage.folder = _Stage.folder, None
    if folder is not None:
        folder._temporary.cleanup()


def _torn(source: Source, samples: dict[str, bytes]) -> None:
    name = source.pick(sorted(samples))
    samples[name] = mutated(source, samples[name])


def _cut(source: Source, samples: dict[str, bytes]) -> None:
    name = source.pick(sorted(samples))
    samples[name] = samples[name][: source.below(len(samples[name]) + 1)]


def _lost(source: Source, samples: dict[str, bytes]) -> None:
    del samples[source.pick(sorted(samples))]


def _foreign(source: Source, samples: dict[str, bytes]) -> None:
    samples[source.pick((FILE, f"{FILE}-wal", f"{FILE}-journal"))] = source.some() * source.pick((1, 1, 500))


def _overwritten(source: Source, samples: dict[str, bytes]) -> None:
    """A sector of the disk that holds something else."""
    name = source.pick(sorted(samples))
    at = source.below(len(samples[name]) + 1) & ~511
    samples[name] = samples[name][:at] + source.take(512).ljust(512, b"\0") + samples[name][at + 512 :]


DAMAGES: list[Callable[[Source, dict[str, bytes]], None]] = [_torn, _torn, _cut, _lost, _foreign, _overwritten]


def _cell(source: Source) -> Any:
    value = anything(source, 0)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    return value if isinstance(value, int | float | str | bytes | None) else source.pick(TEXTS)


def _strange_rows(source: Source, path: Path) -> None:
    """Rows that our own schema allows, since SQLite keeps any type in any column."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for _ in range(1 + source.below(4)):
            table = source.pick((*COLUMNS, "records", "records"))
            cells: list[Any] = [_cell(source) for _ in range(COLUMNS[table])]
            if table in ("records", "said") and source.below(2):  # a row as it was written, with one cell changed
                rows = connection.execute(f"SELECT * FROM {table}").fetchall()
                changed = list(source.pick(rows or [cells]))
                at = source.below(len(changed)) if source.below(2) else 2  # the envelope, or the numbers
                damages = isinstance(changed[at], bytes) and source.below(4)
                changed[at] = mutated(source, changed[at]) if damages else cells[0]
                cells = changed
            cells[:2] = [b"" if cell is None and table in ("records", "said") else cell for cell in cells[:2]]
            marks = ", ".join("?" * len(cells))
            connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", cells)
    except sqlite3.IntegrityError:
        pass
    finally:
        connection.close()


def state_bytes(data: bytes) -> None:
    """A start from a damaged file, and another one after it."""
    source = Source(data)
    folder = _Stage.folder = _Stage.folder or Folder()
    folder.empty()
    folder.said.clear()
    samples = dict(folder.samples)
    rows = source.below(3) == 0
    while not rows and source and samples:
        source.pick(DAMAGES)(source, samples)
    for name, content in samples.items():
        (folder.path / name).write_bytes(content)
    if rows:
        _strange_rows(source, folder.path / FILE)
    storage = folder.open()
    held = {holding.envelope for key in list(storage.keys()) for holding in storage.held(key)}
    require(held <= folder.known, "what was damaged is held")
    require(storage.node_id is None or len(storage.node_id) == 20, f"an id like {storage.node_id!r}")
    require(storage.store(KEY, NEW.envelope).reason is None, "nothing is accepted after the start")
    write(storage)
    storage.abandon()
    for each in folder.said:
        require(each.getMessage().isprintable(), f"more than one line is said: {each.getMessage()!r}")
    kept = len(list(folder.path.glob("*.bad-*")))
    require(bool(kept) == bool(folder.said), f"{kept} files are set aside, and {len(folder.said)} lines said so")
    storage = folder.open()
    require(storage.holding(KEY, NEW.public_key) is not None, "what was accepted after the start is lost")
    storage.abandon()
