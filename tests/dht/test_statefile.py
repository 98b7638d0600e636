"""No file of whatever kind stops a node's start: what cannot be used is set aside, and nothing else is."""

import contextlib
import logging
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.dht.statefile import WAL_KEPT, StateFile
from plasm_dht.errors import ConfigError
from plasm_dht.record import shared_key
from tests.dht.disk import Open, aside, put, save
from tests.dht.support import IDENTITIES, START, ManualClock, record

TWO = IDENTITIES[2]
ID = b"\x42" * 20
NOBODY = 65534


def test_only_its_owner_can_read_it_and_it_survives_a_power_cut(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    path.parent.mkdir()
    path.touch(0o644)
    put(storage := opened(), record())
    assert {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {
        "node.sqlite": 0o600,
        "node.sqlite-wal": 0o600,
        "node.sqlite.lock": 0o600,
    }
    assert synced == [path.parent.stat().st_ino]  # SQLite sees to what is in its files, and not to their name
    assert storage._file is not None
    connection = storage._file._connection
    assert connection is not None
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_size_limit").fetchone() == (WAL_KEPT,)


def test_what_is_on_the_disk_at_one_moment_is_all_that_was_written_before(opened: Open, path: Path) -> None:
    storage = opened()
    for number in range(20):
        put(storage, record(name=f"n{number}"))
        shutil.copytree(path.parent, path.parent.with_name(f"cut-{number}"))
    for number in range(20):
        there = SqliteStorage(path.parent.with_name(f"cut-{number}") / path.name, clock=ManualClock())
        assert there.records == number + 1
        there.abandon()


def whole(opened: Open, path: Path) -> None:
    """A file with 300 records, closed as a process leaves it that ends."""
    storage = opened()
    storage.attach(ID, storage.clock)
    put(storage, *(record(bytes(300), name=f"n{number}") for number in range(300)))
    storage.abandon()
    assert not path.with_name(path.name + "-wal").exists()


def starts(opened: Open, caplog: pytest.LogCaptureFixture, path: Path) -> SqliteStorage:
    """It opens, and works. If something was set aside, one line says so and names both."""
    before = aside(path)
    caplog.clear()
    storage = opened()
    put(storage, record(name="after"))
    assert storage.get(shared_key("after")) is not None
    new = sorted(set(aside(path)) - set(before))
    if new:
        (line,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert str(path) in line
        assert str(path.with_name(new[0])) in line
    else:
        assert caplog.records == []
    return storage


def test_a_file_that_was_cut_at_any_place_does_not_stop_the_start(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole(opened, path)
    good = path.read_bytes()
    cut = [0, 1, 15, 16, 99, 100, 101, 4095, 4096, 4097, *random.Random(1).sample(range(len(good)), 40)]
    set_aside = 0
    for size in cut:
        path.write_bytes(good[:size])
        set_aside += len(aside(path))
        storage = starts(opened, caplog, path)
        assert storage.node_id in (None, ID)
        storage.abandon()
        if size >= 100:
            assert aside(path), size
        for each in path.parent.iterdir():
            each.unlink()


def test_flipped_bytes_do_not_stop_the_start_and_no_damaged_record_is_loaded(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole(opened, path)
    good, draw = path.read_bytes(), random.Random(2)
    real = {shared_key(f"n{number}"): record(bytes(300), name=f"n{number}").envelope for number in range(300)}
    loaded = 0
    for _ in range(60):
        torn = bytearray(good)
        for _ in range(draw.choice((1, 1, 3, 50))):
            torn[draw.choice((draw.randrange(len(torn)), draw.randrange(8192)))] ^= 1 << draw.randrange(8)
        for each in path.parent.iterdir():
            each.unlink()
        path.write_bytes(torn)
        storage = starts(opened, caplog, path)
        held = dict(storage)
        del held[shared_key("after")]
        assert held.items() <= real.items()
        loaded += bool(held)
        storage.abandon()
    assert 5 < loaded < 60  # of both kinds


@pytest.mark.parametrize("strange", [None, 7, 0.5, "text", b"bytes", b""])
def test_a_row_of_other_types_stops_no_start_since_any_may_be_in_any_column(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture, strange: object
) -> None:
    storage = opened()
    storage.attach(ID, storage.clock)
    storage.keep_contacts([("10.0.0.1", 8468)])
    storage.keep_own(shared_key("own"), record(name="own"))
    save(storage)
    storage.abandon()
    connection = sqlite3.connect(path, isolation_level=None)
    for table, columns in {"node": 1, "contacts": 2, "said": 3, "records": 7}.items():
        for at in range(columns):
            row = connection.execute(f"SELECT * FROM {table}").fetchone()
            changed = (*row[:at], strange, *row[at + 1 :])
            with contextlib.suppress(sqlite3.IntegrityError):  # no key is NULL
                connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * columns)})", changed)
    connection.close()
    starts(opened, caplog, path).abandon()
    assert aside(path) == []


def test_a_torn_write_ahead_log_loses_only_its_end(opened: Open, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = opened()
    for number in range(10):
        put(storage, record(name=f"n{number}"))
    log = path.with_name(path.name + "-wal").read_bytes()
    data, draw, found = path.read_bytes(), random.Random(3), set()
    storage.abandon()
    for _ in range(60):
        torn = bytearray(log[: draw.choice((len(log), draw.randrange(len(log))))])
        if torn:
            torn[draw.randrange(len(torn))] ^= 0x55
        for each in path.parent.iterdir():
            each.unlink()
        path.write_bytes(data)
        path.with_name(path.name + "-wal").write_bytes(torn)
        storage = starts(opened, caplog, path)
        names = {number for number in range(10) if storage.get(shared_key(f"n{number}"))}
        assert names == set(range(len(names)))
        found.add(len(names))
        storage.abandon()
    assert len(found) > 3


def foreign_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.execute("INSERT INTO recipes VALUES ('soup')")
    connection.commit()
    connection.close()


def later_schema(path: Path) -> None:
    file = StateFile(path)
    file.open(START)
    file.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def without_a_table(path: Path) -> None:
    file = StateFile(path)
    file.open(START)
    file.close()
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE said")
    connection.close()


def names_that_are_no_text(path: Path) -> None:
    file = StateFile(path)
    file.open(START)
    file.close()
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO said VALUES (x'00', CAST(x'ff' AS TEXT), x'00')")
    connection.commit()
    connection.close()


def schema_that_is_no_text(path: Path) -> None:
    file = StateFile(path)
    file.open(START)
    file.close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE contacts", b"\xa1REATE TABLE contact\xa1"))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("a shopping list\n" * 1000),
        lambda path: path.write_bytes(random.Random(4).randbytes(50_000)),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.with_name("nowhere")),
        lambda path: os.mkfifo(path),
        lambda path: (path.touch(), path.with_name(path.name + "-wal").mkdir()),
        foreign_database,
        without_a_table,
        names_that_are_no_text,
        schema_that_is_no_text,
    ],
)
def test_what_is_not_ours_is_set_aside(
    make: Callable[[Path], object], opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    make(path)
    storage = starts(opened, caplog, path)
    assert storage.records == 1
    assert {name.removesuffix("-wal") for name in aside(path)} == {f"node.sqlite.bad-{START}"}
    again = opened()
    assert again.records == 1


def test_what_is_set_aside_is_kept_as_it_was_and_never_overwritten(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    for number in range(3):  # at one moment of the clock
        path.write_text(f"list {number}" * 100)
        starts(opened, caplog, path).abandon()
        path.unlink()
    assert [path.with_name(name).read_text()[:6] for name in aside(path)] == ["list 0", "list 1", "list 2"]


def test_the_database_of_another_program_or_release_is_unharmed(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for make in (foreign_database, later_schema):
        path.parent.mkdir(exist_ok=True)
        make(path)
        before = path.read_bytes()
        opened().abandon()
        (name,) = aside(path)
        assert path.with_name(name).read_bytes() == before
        assert ("another program" if make is foreign_database else "its schema is 2") in caplog.text
        shutil.rmtree(path.parent)


def test_an_empty_file_and_one_whose_making_was_cut_short_are_new(
    opened: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.touch()
    starts(opened, caplog, path).abandon()
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert path.stat().st_size > 0
    starts(opened, caplog, path)
    assert aside(path) == []


def test_a_state_directory_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "state", Path("/proc/state"), Path("/dev/null/x")):
        with pytest.raises(ConfigError, match=f"{place}.*--state-dir"):
            SqliteStorage(place / "node.sqlite")


def test_a_read_only_state_directory_or_file_is_one_clear_error() -> None:
    own = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not below one that only root can enter
        path = Path(folder) / "node.sqlite"
        path.write_text("somebody's")
        path.chmod(0o400)
        for mode in (0o777, 0o555):
            Path(folder, "node.sqlite.lock").unlink(missing_ok=True)
            Path(folder).chmod(mode)
            try:
                os.seteuid(NOBODY if own == 0 else own)  # root may write everywhere
                with pytest.raises(ConfigError, match=r"cannot be used: Permission denied.*--state-dir"):
                    SqliteStorage(path)
            finally:
                os.seteuid(own)
        Path(folder).chmod(0o700)
        assert [each.name for each in Path(folder).iterdir() if ".bad-" in each.name] == []


def test_a_second_process_is_refused_and_does_no_harm(opened: Open, path: Path) -> None:
    storage = opened()
    put(storage, record())
    script = f"from plasm_dht.dht.sqlite import SqliteStorage; SqliteStorage({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"ConfigError: state file {path} is in use by another process" in done.stderr
    with pytest.raises(ConfigError, match="in use"):
        SqliteStorage(path)
    put(storage, record(by=TWO))
    assert opened().records == 2
    assert aside(path) == []


def test_a_database_that_somebody_else_has_locked_is_not_set_aside(opened: Open, path: Path) -> None:
    put(opened(), record())
    opened().abandon()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match="cannot be used: database is locked"):
        SqliteStorage(path)
    connection.execute("ROLLBACK")
    connection.close()
    assert opened().records == 1
    assert aside(path) == []
