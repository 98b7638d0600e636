"""The SQLite file of a node's state: its tables, its lock, and what becomes of a file that is torn or not ours.

Blocking, and for one thread at a time. It decides nothing about records: it gives back what was written.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plasm_dht.dht.holding import Holding
from plasm_dht.dht.ids import Address, is_id
from plasm_dht.errors import ConfigError
from plasm_dht.text import printable

log = logging.getLogger(__name__)

# "PLD1" in the header of the file says whose it is; the schema is told from later ones by SQLite's `user_version`.
APPLICATION = 0x504C4431
SCHEMA = 1
# The file and those that SQLite lays beside it.
SUFFIXES = ("", "-wal", "-shm", "-journal")
# After a checkpoint the write-ahead log is cut to this (bytes): a burst must not keep its room for ever.
WAL_KEPT = 16 * 2**20
# Seconds for which somebody who only looks into the file may hold us up.
BUSY = 1.0
# What is the machine's fault, not the file's: a start would not be helped by setting the file aside.
_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    # A quota, a limit of the size of a file, a disk that takes nothing: what cannot be read is the file's.
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
}
_MAX_INTEGER = 2**63 - 1

_TABLES = """
CREATE TABLE node (id BLOB NOT NULL);
CREATE TABLE records (
    key BLOB, public_key BLOB, envelope BLOB,
    received INTEGER, keep_until INTEGER, contested_until INTEGER,  -- Unix ms
    checksum INTEGER, PRIMARY KEY (key, public_key)
) WITHOUT ROWID;
CREATE TABLE contacts (ip TEXT, port INTEGER);
CREATE TABLE said (public_key BLOB, name TEXT, numbers BLOB, PRIMARY KEY (public_key, name)) WITHOUT ROWID;
"""
_NUMBERS = struct.Struct(">QQL")  # seq, end, checksum

Said = tuple[int, int]  # seq, latest end (Unix ms)


class Row(NamedTuple):
    """A record as it is in the file. SQLite has no checksums of its own: a flipped bit in a row would go unnoticed."""

    key: bytes
    public_key: bytes
    envelope: bytes
    received: int
    keep_until: int
    contested_until: int
    checksum: int

    @classmethod
    def of(cls, key: bytes, holding: Holding, booted_at: int) -> "Row":
        """What is to be known of a holding; `booted_at` is the wall time (Unix ms) at monotonic time 0."""
        received = booted_at + round(holding.received * 1000)
        times = (received, min(holding.keep_until, _MAX_INTEGER), min(holding.contested_until, _MAX_INTEGER))
        return cls(key, holding.public_key, holding.envelope, *times, _checksum(key, holding.envelope, *times))

    @property
    def is_whole(self) -> bool:
        """Whether it is what was written."""
        try:
            return self.checksum == _checksum(self.key, self.envelope, *self[3:6])
        except (struct.error, TypeError):  # any type may be in any column
            return False


def _checksum(key: bytes, envelope: bytes, *times: int) -> int:
    return zlib.crc32(envelope, zlib.crc32(key + struct.pack(">3q", *times)))


@dataclass(slots=True)
class State:
    """What a file held. `said`: by public key and name, the least `seq` first."""

    node_id: bytes | None = None
    contacts: list[Address] = field(default_factory=list)
    said: dict[tuple[bytes, str], Said] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Changes:
    """What is to be written: of each thing the latest, `None` where it has gone."""

    node_id: bytes | None = None
    contacts: Sequence[Address] | None = None
    said: dict[tuple[bytes, str], Said | None] = field(default_factory=dict)
    records: dict[tuple[bytes, bytes], Holding | None] = field(default_factory=dict)

    def put_back(self, earlier: "Changes") -> None:
        """Add what was to be written before and is not."""
        self.node_id = self.node_id or earlier.node_id
        self.contacts = earlier.contacts if self.contacts is None else self.contacts
        for name, said in earlier.said.items():
            self.said.setdefault(name, said)
        for key, holding in earlier.records.items():
            self.records.setdefault(key, holding)


class _ForeignError(Exception):
    """The file is not one that this release can use."""


# Python reads SQLite's messages as UTF-8, and they may quote what is torn.
_TORN = (sqlite3.Error, UnicodeError, OverflowError, _ForeignError)


class StateFile:
    """One file, open in one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1
        self._connection: sqlite3.Connection | None = None

    def open(self, now: int) -> State:
        """What is in the file, which is made if need be; `now` (Unix ms) names what is set aside.

        Raises `ConfigError` when it cannot be used and setting it aside would not help.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take_lock()
            try:
                return self._read()
            except _TORN as error:
                if _is_of_the_machine(error):
                    raise
                self._set_aside(now, printable(str(error)))  # SQLite quotes what the file says
                return self._read()
        except OSError as error:
            self.close()
            raise ConfigError(_unusable(self.path, error.strerror or str(error))) from None
        except ConfigError:
            self.close()
            raise
        except _TORN as error:
            self.close()
            raise ConfigError(_unusable(self.path, str(error))) from None

    def write(self, changes: Changes, booted_at: int) -> None:
        """All of it, or nothing: on the disk when this returns. Raises `sqlite3.Error`."""
        connection = self._connection
        if connection is None:
            raise sqlite3.ProgrammingError("the file is closed")
        connection.execute("BEGIN IMMEDIATE")
        try:
            _write(connection, changes, booted_at)
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Let others open it."""
        connection, self._connection = self._connection, None
        lock, self._lock = self._lock, -1
        if connection is not None:
            connection.close()
        if lock >= 0:
            os.close(lock)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        """A lock of our own, held from before the first look: SQLite's would not cover a file that is set aside."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"state file {self.path} is in use by another process: give each node a state directory of its own "
                "(--state-dir)"
            ) from None
        except OSError:  # a network share without locks
            pass

    def _read(self) -> State:
        for path in self._paths():
            if os.path.lexists(path) and not path.is_file():
                raise _ForeignError(f"{path.name} is no file")
        self._create()
        self._connection = connection = sqlite3.connect(
            self.path, timeout=BUSY, isolation_level=None, check_same_thread=False
        )
        # Alone with the file, SQLite needs no memory shared with other processes, which network shares do not have.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = _check(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # else a commit would survive SIGKILL, but no power cut
        connection.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
        if is_new:
            connection.executescript(
                f"BEGIN; {_TABLES} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; COMMIT"
            )
        return _state(connection)

    def _create(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # a new name, too, has to survive a power cut
        finally:
            os.close(folder)

    def _set_aside(self, now: int, why: str) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        while os.path.lexists(aside := f"{self.path}.bad-{now}"):
            now += 1
        # The file first: beside a new, empty one SQLite throws an old log away.
        for path, suffix in zip(self._paths(), SUFFIXES, strict=True):
            if os.path.lexists(path):
                path.rename(f"{aside}{suffix}")
        log.error("state file %s cannot be used (%s): it is now %s, and a new one is begun", self.path, why, aside)

    def _paths(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in SUFFIXES]


def _unusable(path: Path, why: str) -> str:
    return f"state file {path} cannot be used: {why}; name a folder that can be written to (--state-dir)"


def _is_of_the_machine(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code in _MACHINE or code & 0xFF in _MACHINE


def _check(connection: sqlite3.Connection) -> bool:
    """Whether the file is new. Raises for one that is torn or foreign."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not application and not tables:
        return True  # or one whose making was cut short
    if application != APPLICATION:
        raise _ForeignError("it is the database of another program")
    if schema != SCHEMA:
        raise _ForeignError(f"its schema is {schema}, of another release: this one has {SCHEMA}")
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise _ForeignError(f"it is damaged: {' '.join(problem.split())}")
    return False


def _state(connection: sqlite3.Connection) -> State:
    state = State()
    for (node_id,) in connection.execute("SELECT id FROM node"):
        state.node_id = node_id if is_id(node_id) else None
    state.contacts = connection.execute("SELECT ip, port FROM contacts").fetchall()
    for public_key, name, numbers in connection.execute("SELECT public_key, name, numbers FROM said ORDER BY numbers"):
        with contextlib.suppress(struct.error, TypeError, AttributeError):  # SQLite keeps any type in any column
            seq, end, _ = _NUMBERS.unpack(numbers)
            if numbers == _numbers(public_key, name, seq, end):
                state.said[public_key, name] = seq, end
    state.rows = [Row(*row) for row in connection.execute(f"SELECT {', '.join(Row._fields)} FROM records")]  # noqa: S608
    return state


def _write(connection: sqlite3.Connection, changes: Changes, booted_at: int) -> None:
    gone = [key for key, holding in changes.records.items() if holding is None]
    rows = [Row.of(key, holding, booted_at) for (key, _), holding in changes.records.items() if holding is not None]
    connection.executemany("DELETE FROM records WHERE key = ? AND public_key = ?", gone)
    connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    unsaid = [each for each, said in changes.said.items() if said is None]
    numbers = [(*each, _numbers(*each, *said)) for each, said in changes.said.items() if said is not None]
    connection.executemany("DELETE FROM said WHERE public_key = ? AND name = ?", unsaid)
    connection.executemany("INSERT OR REPLACE INTO said VALUES (?, ?, ?)", numbers)
    if changes.contacts is not None:
        _replace(connection, "contacts", changes.contacts)
    if changes.node_id is not None:
        _replace(connection, "node", [(changes.node_id,)])


def _replace(connection: sqlite3.Connection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    connection.execute(f"DELETE FROM {table}")  # noqa: S608  # a name of ours
    for row in rows:
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608


def _numbers(public_key: bytes, name: str, seq: int, end: int) -> bytes:
    """Both numbers, of which SQLite's integers are too small for one, the `seq` first to be in its order."""
    return _NUMBERS.pack(seq, end, zlib.crc32(name.encode(), zlib.crc32(public_key + struct.pack(">QQ", seq, end))))
