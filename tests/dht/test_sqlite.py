"""What a node held comes back after its process has gone, and no file of whatever kind stops its start."""

import asyncio
import logging
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from plasm_dht.dht import sqlite
from plasm_dht.dht.ids import TRANSIENT_ID
from plasm_dht.dht.replicate import Replicator
from plasm_dht.dht.server import PlasmServer
from plasm_dht.dht.sqlite import SqliteStorage
from plasm_dht.dht.statefile import Changes, StateFile
from plasm_dht.errors import ConfigError
from plasm_dht.record import bound_key, shared_key
from tests.dht.disk import Open, aside, put, save, tables
from tests.dht.scale import Neighbours
from tests.dht.support import HERE, HOUR, IDENTITIES, NAME, START, ManualClock, node_id, record, server, until

ONE, TWO = IDENTITIES[1], IDENTITIES[2]
KEY = shared_key(NAME)
ID = b"\x42" * 20
WEEK = 7 * 24 * 3600


# -- what comes back -------------------------------------------------------------------------------------------------


def test_a_record_comes_back_with_its_bytes_and_its_original_expiry(opened: Open) -> None:
    made = record(life=3600)
    put(opened(), made)
    clock = ManualClock(wall=START + 3_599_000, monotonic=5.0)  # another process, maybe another boot
    storage = opened(clock)
    assert storage[KEY] == made.envelope
    clock.advance(0.999)
    assert storage[KEY] == made.envelope
    clock.advance(0.001)
    assert storage.get(KEY) is None


def test_a_wall_clock_that_was_set_back_gives_no_record_more_than_its_whole_life(opened: Open) -> None:
    put(opened(), record(life=60))
    clock = ManualClock(wall=START - 24 * HOUR, monotonic=0.0)
    storage = opened(clock)
    clock.advance(59.9)
    assert KEY in dict(storage)
    clock.advance(0.1)
    assert storage.get(KEY) is None


def test_a_wall_clock_that_is_set_back_after_the_restart_makes_no_life_longer_and_ends_no_guard(opened: Open) -> None:
    long, short = record(by=TWO, life=3600), record(by=TWO, seq=START + 1, life=60)
    put(opened(), record(life=3600), long, short)
    clock = ManualClock(wall=START + 3_000_000, monotonic=0.0)
    storage = opened(clock)
    clock.step(-3000)
    clock.advance(599)
    assert storage.get(KEY) is not None
    clock.advance(1)
    assert storage.get(KEY) is None
    clock.advance(1)
    storage.forget(10)
    assert storage.store(KEY, long.envelope).reason == "stale"


def test_what_has_expired_is_not_loaded_and_leaves_the_file(opened: Open, path: Path) -> None:
    put(opened(), record(life=60), record(by=TWO, life=600))
    storage = opened(ManualClock(wall=START + 60_000))
    assert [holding.public_key for holding in storage.held(KEY)] == [TWO.public_key]
    save(storage)
    storage.abandon()
    assert len(tables(path)) == 1


def test_a_tombstone_comes_back(opened: Open) -> None:
    put(opened(), record(life=3600), record(seq=START + 1, life=3600, withdrawn=True))
    storage = opened(ManualClock(wall=START + 1000))
    assert storage.get(KEY) is None
    assert storage.store(KEY, record(life=3600).envelope).reason == "stale"


def test_a_longer_life_does_not_come_back_after_a_shorter_one_whether_it_was_restarted_before_or_after(
    opened: Open,
) -> None:
    long, short = record(life=3600), record(seq=START + 1, life=60)
    put(opened(), long, short)
    for seconds in (30, 61, 3599):
        storage = opened(ManualClock(wall=START + seconds * 1000, monotonic=3.0))
        assert storage.store(KEY, long.envelope).reason == "stale", seconds
    assert opened(ManualClock(wall=START + 3_600_000)).records == 0


def test_a_guard_is_no_result_after_a_restart(opened: Open) -> None:
    put(opened(), record(life=3600), record(seq=START + 1, life=60))
    storage = opened(ManualClock(wall=START + 61_000, monotonic=0.0))
    assert (storage.records, storage.get(KEY), list(storage)) == (1, None, [])


def test_a_guard_goes_when_a_clock_that_was_never_set_is_set_at_last(opened: Open) -> None:
    put(opened(), record(life=60))
    clock = ManualClock(wall=0)
    storage = opened(clock)
    clock.step(START / 1000 + 60)
    clock.advance(WEEK)
    storage.forget(10)
    assert storage.records == 0


def test_when_it_was_received_comes_back_so_that_it_is_replicated_in_time(opened: Open) -> None:
    put(opened(), record(life=6 * 3600), record(by=TWO, seq=START, life=6 * 3600, withdrawn=True))
    stepped_back = opened(ManualClock(wall=START - HOUR, monotonic=7000.0))
    assert [holding.received for holding in stepped_back.held(KEY)] == [7000.0, 7000.0]
    for age in (0, 1800, 18_000):
        here = Neighbours(ID)
        here.clock = ManualClock(wall=START + age * 1000, monotonic=7000.0)
        here.storage = opened(here.clock)
        replicator = Replicator(cast(Any, here), here.clock, k=20, alpha=3)
        for holding in here.storage.held(KEY):
            assert holding.received == 7000.0 - age
            replicator.on_change(KEY, holding)
            assert holding.replicate_at is not None
            every, spread = (600, 30) if holding.withdrawn else (3600, 600)
            assert 0 <= holding.replicate_at - here.clock.elapsed() - max(every - age, 0) <= spread


def test_that_another_one_may_still_be_alive_somewhere_comes_back(opened: Open) -> None:
    put(opened(), record(b"old", life=3600), record(b"new", seq=START + 1, life=7200))
    (holding,) = opened().held(KEY)
    assert holding.contested_until == START + 3_600_000


async def test_what_was_loaded_is_told_to_whoever_passes_it_on(path: Path) -> None:
    storage = SqliteStorage(path)
    now = storage.clock.wall()
    storage.keep_own(KEY, record(issued_at=now))
    for number in range(500):
        each = record(name=f"n{number}", issued_at=now)
        assert storage.store(shared_key(each.name), each.envelope).reason is None
    await storage.close()
    again = SqliteStorage(path)
    told: list[bytes] = []
    again.on_change = lambda key, _: told.append(key)
    running = asyncio.create_task(again.run())
    await until(lambda: len(told) == 501)
    assert KEY in told  # its own of the earlier run is everybody's now: nobody refreshes it
    running.cancel()
    await again.close()


def test_own_records_come_back_as_everybodys(opened: Open) -> None:
    storage = opened()
    storage.keep_own(KEY, record())
    save(storage)
    (holding,) = opened().held(KEY)
    assert not holding.own


def test_what_is_replaced_removed_or_evicted_is_so_in_the_file(opened: Open, path: Path) -> None:
    storage = opened(max_records=20)
    storage.attach(bytes(19) + b"\x01", storage.clock)
    now = START
    for number in range(200):
        for seq in (1, 2):
            each = record(name=f"n{number}", seq=seq, issued_at=now)
            storage.store(shared_key(each.name), each.envelope)
            if number % 7 == seq:
                save(storage)
    save(storage)
    held = dict(storage)
    assert len(held) == 20
    storage.abandon()
    assert {row[0]: row[2] for row in tables(path)} == held
    assert dict(opened(max_records=20)) == held


def test_fewer_are_loaded_when_less_may_be_held_and_the_nearest_are_kept(opened: Open) -> None:
    storage = opened()
    storage.attach(ID, storage.clock)
    put(storage, *(record(name=f"n{number}") for number in range(100)))
    nearest = list(storage.keys())[:10]
    assert list(opened(max_records=10).keys()) == nearest


def test_the_id_the_contacts_and_the_seqs_come_back(opened: Open) -> None:
    storage = opened()
    assert (storage.node_id, list(storage.contacts)) == (None, [])
    storage.attach(ID, storage.clock)
    storage.keep_contacts([("10.0.0.1", 8468), ("2001:db8::1", 1)])
    storage.keep_own(KEY, record(seq=2**64 - 1, life=60))
    storage.keep_own(KEY, record(seq=7, life=3600))  # cannot be, and would not count
    storage.keep_own(shared_key("another"), record(by=TWO, name="another", seq=5))
    save(storage)
    again = opened(ManualClock(wall=START + WEEK * 2000))  # long after all of it has expired
    assert again.node_id == ID
    assert list(again.contacts) == [("10.0.0.1", 8468), ("2001:db8::1", 1)]
    assert again.last_said(IDENTITIES[0].public_key, NAME) == (2**64 - 1, START + 3_600_000)
    assert again.last_said(TWO.public_key, "another") == (5, START + 3_600_000)
    assert again.last_said(TWO.public_key, NAME) == (0, 0)


def test_only_so_many_seqs_are_kept_the_latest(opened: Open, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(sqlite, "MAX_SAID", 3)
    storage = opened()
    for number in range(5):
        storage.keep_own(KEY, record(name=f"n{number}", seq=100 + number))
    storage.keep_own(KEY, record(name="n2", seq=200))
    storage.keep_own(KEY, record(name="n5", seq=150))
    save(storage)
    again = opened()
    assert [name for _, name in again._said] == ["n4", "n5", "n2"]


def test_what_is_no_contact_is_not_asked(opened: Open, path: Path) -> None:
    storage = opened()
    storage.keep_contacts([("10.0.0.1", 8468)])
    save(storage)
    storage.abandon()
    connection = sqlite3.connect(path)
    bad = [
        ("0.0.0.0", 1),
        ("a.example", 1),
        ("10.0.0.2", 0),
        ("10.0.0.2", 65536),
        (None, 1),
        (b"x", 1),
        ("10.0.0.2", "x"),
    ]
    connection.executemany("INSERT INTO contacts VALUES (?, ?)", bad)
    connection.commit()
    connection.close()
    assert list(opened().contacts) == [("10.0.0.1", 8468)]
    assert aside(path) == []


def test_the_zero_id_of_a_caller_that_will_not_stay_is_not_remembered(opened: Open) -> None:
    storage = opened()
    storage.attach(TRANSIENT_ID, storage.clock)
    save(storage)
    assert opened().node_id is None


# -- writing while the node runs -------------------------------------------------------------------------------------


async def test_what_is_accepted_is_on_the_disk_within_a_second_without_the_loop_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = SqliteStorage(path)
    running = asyncio.create_task(storage.run())
    write, threads = StateFile.write, []

    def slow(self: StateFile, changes: Changes, booted_at: int) -> None:
        threads.append(threading.current_thread())
        time.sleep(0.2)  # the slow disk that this is about
        write(self, changes, booted_at)

    monkeypatch.setattr(StateFile, "write", slow)
    loop = asyncio.get_running_loop()
    made = [record(name=f"n{number}", issued_at=storage.clock.wall()) for number in range(20)]
    accepted, longest = {}, 0.0
    for each in made:
        before = loop.time()
        assert storage.store(shared_key(each.name), each.envelope).reason is None
        accepted[each.name] = loop.time()
        await asyncio.sleep(0.02)
        longest = max(longest, loop.time() - before)
    copies = path.parent.with_name("copy")
    await asyncio.sleep(accepted["n19"] + 0.9 - loop.time())
    shutil.copytree(path.parent, copies)
    there = SqliteStorage(copies / path.name)
    assert there.records == 20
    there.abandon()
    assert longest < 0.15
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()
    running.cancel()
    await storage.close()


async def test_a_disk_that_fails_is_said_once_and_tried_again_and_nothing_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite, "RETRY_AFTER", 0.01)
    monkeypatch.setattr(sqlite, "GATHER", 0.0)
    caplog.set_level(logging.INFO)
    write, fails = StateFile.write, 0

    def full(self: StateFile, changes: Changes, booted_at: int) -> None:
        nonlocal fails
        if fails < 10:
            fails += 1
            raise sqlite3.OperationalError("database or disk is full")
        write(self, changes, booted_at)

    monkeypatch.setattr(StateFile, "write", full)
    async with server(storage=SqliteStorage(path)) as node:
        storage = node.storage
        now = storage.clock.wall()
        for number in range(30):
            each = record(name=f"n{number}", issued_at=now)
            assert storage.store(shared_key(each.name), each.envelope).reason is None
            await asyncio.sleep(0.005)
        await until(lambda: "is written again" in caplog.text)
    said = [each for each in caplog.messages if "disk is full" in each]
    assert len(said) == 1
    again = SqliteStorage(path)
    assert again.records == 30
    assert again.node_id == node.node.id
    again.abandon()


def test_while_the_disk_fails_what_does_not_stay_is_not_piled_up(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(max_records=20)
    storage.attach(node_id(1), storage.clock)
    put(storage, *(record(name=f"first {number}") for number in range(20)))
    write = StateFile.write

    def full(self: StateFile, changes: Changes, booted_at: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(StateFile, "write", full)
    for number in range(1000):
        each = record(name=f"n{number}")
        storage.store(shared_key(each.name), each.envelope)
        if number % 10 == 0:
            with pytest.raises(sqlite3.OperationalError):
                save(storage)
        assert len(storage._changes.records) <= 2 * 20 + 1
    monkeypatch.setattr(StateFile, "write", write)
    save(storage)
    held = dict(storage)
    assert dict(opened(max_records=20)) == held


async def test_what_changes_while_it_is_written_is_written_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = SqliteStorage(path, clock=ManualClock())
    changed, stays, goes = (record(name=name) for name in ("changed", "stays", "goes"))
    for each in (changed, stays, goes):
        storage.store(shared_key(each.name), each.envelope)
    committing = asyncio.create_task(storage._commit())
    await asyncio.sleep(0)  # it has taken what there is
    newer = record(b"newer", name="changed", seq=START + 1)
    assert storage.store(shared_key("changed"), newer.envelope).reason is None
    storage._remove(shared_key("goes"), storage.held(shared_key("goes"))[0])
    await committing
    await storage._commit()
    storage.abandon()
    again = SqliteStorage(path, clock=ManualClock())
    assert dict(again) == {
        shared_key("changed"): newer.envelope,
        shared_key("stays"): stays.envelope,
    }
    again.abandon()


async def test_many_changes_are_written_in_several_transactions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BATCH", 10)
    sizes, write = [], StateFile.write

    def watched(self: StateFile, changes: Changes, booted_at: int) -> None:
        sizes.append(len(changes.records))
        write(self, changes, booted_at)

    monkeypatch.setattr(StateFile, "write", watched)
    storage = SqliteStorage(path, clock=ManualClock())
    for number in range(35):
        each = record(name=f"n{number}")
        storage.store(shared_key(each.name), each.envelope)
    running = asyncio.create_task(storage.run())
    await until(lambda: sum(sizes) == 35)
    assert sizes == [10, 10, 10, 5]
    running.cancel()
    await storage.close()
    again = SqliteStorage(path, clock=ManualClock())
    assert again.records == 35
    again.abandon()


async def test_a_stop_does_not_wait_for_a_disk_that_hangs(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite, "CLOSE_WITHIN", 0.1)
    goes_on, write = threading.Event(), StateFile.write

    def hanging(self: StateFile, changes: Changes, booted_at: int) -> None:
        goes_on.wait(10)
        write(self, changes, booted_at)

    monkeypatch.setattr(StateFile, "write", hanging)
    storage = SqliteStorage(path)
    started = asyncio.get_running_loop().time()
    await storage.close()
    assert asyncio.get_running_loop().time() - started < 1
    assert "the disk does not answer" in caplog.text
    goes_on.set()


# -- a node ----------------------------------------------------------------------------------------------------------


async def test_a_node_comes_back_with_its_id_unless_it_is_given_another(path: Path) -> None:
    async with server(storage=SqliteStorage(path)) as node:
        first = node.node.id
    async with server(storage=SqliteStorage(path)) as node:
        assert node.node.id == first
    async with server(storage=SqliteStorage(path), node_id=ID) as node:
        assert node.node.id == ID
    async with server(storage=SqliteStorage(path)) as node:
        assert node.node.id == ID


async def test_a_stop_keeps_what_was_held_and_another_may_open_it(path: Path) -> None:
    async with server(storage=SqliteStorage(path)) as node:
        made = record(issued_at=node.clock.wall())
        assert node.storage.store(KEY, made.envelope).reason is None
    with pytest.raises(ConfigError, match="has been closed"):
        PlasmServer(storage=node.storage)
    again = SqliteStorage(path)
    assert again[KEY] == made.envelope
    again.abandon()


async def test_contacts_of_an_earlier_run_are_asked_and_only_who_answers_is_one(path: Path) -> None:
    async with server() as there, server() as other:
        async with server([there, other], storage=SqliteStorage(path)):
            pass
        storage = SqliteStorage(path)
        assert set(storage.contacts) == {there.address, other.address}
        there_address = there.address
        await other.close()
        async with server(storage=storage) as again:
            await until(lambda: len(again.protocol.router) == 1)
            await asyncio.sleep(0.2)
            assert [contact.id for contact in again.protocol.router] == [there.node.id]
    lost = SqliteStorage(path)
    assert set(lost.contacts) == {there_address}
    lost.abandon()


async def test_a_node_whose_contacts_are_all_gone_tries_them_again_until_one_is_there(path: Path) -> None:
    async with server() as there, server([there], storage=SqliteStorage(path)):
        address, there_id = there.address, there.node.id
    async with server(storage=SqliteStorage(path)) as again:
        await asyncio.sleep(1)
        later = PlasmServer(node_id=there_id)
        await later.listen(address[1], HERE)
        await until(lambda: len(again.protocol.router) == 1, 15)
        await later.close()


async def test_a_publisher_goes_on_above_its_last_seq_without_a_network_though_its_clock_went_back(path: Path) -> None:
    clock = ManualClock()  # stands still: nothing here waits
    async with server(storage=SqliteStorage(path, clock=clock), clock=clock, identity=ONE) as node:
        first = await node.publish(NAME, b"one", ttl=3600)
        await node.close(withdraw=False)
    clock = ManualClock(wall=START - 24 * HOUR)
    async with server(storage=SqliteStorage(path, clock=clock), clock=clock, identity=ONE) as node:
        second = await node.publish(NAME, b"two", ttl=60)
        assert second.seq == first.seq + 1
        third = await node.withdraw(NAME)
        assert third is not None
        assert third.expires_at >= first.expires_at  # a tombstone for whoever still has the first one
    async with server(storage=SqliteStorage(path, clock=clock), clock=clock, identity=ONE) as node:
        withdrawn = await node.withdraw(NAME)
        assert withdrawn is not None
        assert withdrawn.seq == third.seq + 1
        assert node.storage.last_said(ONE.public_key, NAME)[0] == withdrawn.seq
        assert node.storage.holding(bound_key(ONE.public_key, NAME), ONE.public_key) is not None


async def test_a_tombstone_lives_long_enough_though_the_record_was_evicted_after_the_restart(path: Path) -> None:
    clock = ManualClock()
    async with server(storage=SqliteStorage(path, clock=clock), clock=clock, identity=ONE) as node:
        first = await node.publish(NAME, b"one", ttl=3600)
        await node.close(withdraw=False)
    async with server(storage=SqliteStorage(path, clock=clock), clock=clock, identity=ONE) as node:
        for key in list(node.storage.keys()):
            node.storage._remove(key, *node.storage.held(key))
        withdrawn = await node.withdraw(NAME)
        assert withdrawn is not None
        assert (withdrawn.seq, withdrawn.expires_at) == (first.seq + 1, first.expires_at)
