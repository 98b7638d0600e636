"""What a holder owes others: which records a newcomer is handed, in what slices, and when what is held is passed on."""

import asyncio
import random
from collections.abc import Coroutine, Iterator
from itertools import islice
from typing import Any, cast

import pytest

from plasm_dht.dht import storage as module
from plasm_dht.dht.ids import ID_BYTES
from plasm_dht.dht.replicate import LOOKED_AT, MAX_NEWCOMERS
from plasm_dht.dht.routing import Contact
from plasm_dht.record import shared_key
from tests.dht.scale import Neighbours, name_of, unsigned
from tests.dht.support import IDENTITIES, record, until

OWN = bytes.fromhex("5a" * ID_BYTES)


@pytest.fixture(autouse=True)
def _nobody_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "verify", lambda record: True)


def here_with(contacts: int, records: int, seed: int = 1) -> Neighbours:
    here, rng = Neighbours(OWN), random.Random(seed)
    for _ in range(contacts):
        contact = Contact(rng.randbytes(ID_BYTES), "127.0.0.1", 1024 + len(here.router))
        here.router.add_contact(contact)  # a full bucket may have no room
    here.fill(records)
    return here


def near(bits: int, rng: random.Random) -> bytes:
    """An id whose distance to ours has so many bits."""
    distance: int = 2 ** (bits - 1) + rng.getrandbits(bits - 1)
    return (int.from_bytes(OWN) ^ distance).to_bytes(ID_BYTES)


def count_closest(here: Neighbours) -> list[int]:
    """How often the closest contacts are looked for, counted in the last number of the list."""
    counts, closest = [0], here.router.closest

    def counting(key: int, k: int) -> list[Contact]:
        counts[-1] += 1
        return closest(key, k)

    cast(Any, here.router).closest = counting
    return counts


# -- newcomers -------------------------------------------------------------------------------------------------------


def owed(here: Neighbours, contact: Contact, key: bytes) -> bool:
    """By looking at everybody: it is among the k closest, and nobody else is closer than this node."""
    target = int.from_bytes(key)
    nearest = sorted(here.router.live(), key=lambda each: each.long_id ^ target)[:20]
    own = int.from_bytes(OWN) ^ target
    return contact in nearest and all(own < each.long_id ^ target for each in nearest if each is not contact)


@pytest.mark.parametrize("contacts", [0, 1, 5, 30, 200])
@pytest.mark.parametrize("bits", [160, 159, 158, 157, 155])
async def test_a_newcomer_is_handed_exactly_what_it_should_hold_and_nobody_closer_has(contacts: int, bits: int) -> None:
    here = here_with(contacts, 600)
    newcomer = here.add(near(bits, random.Random(contacts)))
    expected = [key for key in list(here.storage.keys()) if owed(here, newcomer, key)]
    await here.replicator._hand_off(newcomer.address)
    assert [key for _, key in here.stored] == expected


async def test_a_newcomer_among_many_that_are_equally_far_is_handed_its_share() -> None:
    here, rng = here_with(0, 600), random.Random(4)
    newcomer = here.add(near(160, rng))
    for _ in range(30):
        here.router.add_contact(Contact(near(160, rng), "127.0.0.1", 2000 + len(here.router)))
    expected = [key for key in list(here.storage.keys()) if owed(here, newcomer, key)]
    await here.replicator._hand_off(newcomer.address)
    assert [key for _, key in here.stored] == expected
    assert len(here.router) > 20
    assert 0 < len(expected) < 300


@pytest.mark.parametrize("records", [300, 3000])
async def test_of_records_that_do_not_concern_a_newcomer_few_are_looked_at(records: int) -> None:
    here, rng = here_with(0, records), random.Random(3)
    for _ in range(25):
        here.add(near(150, rng))  # all of them nearer to most keys near us
    for bits in (160, 159, 158, 157, 156):
        here.add(near(bits, rng))
    far = Contact(near(160, rng), "127.0.0.1", 9)
    here.router.add_contact(far)
    looked_at = count_closest(here)
    assert list(here.replicator.concerns(far)) == []
    assert 0 < looked_at[0] < 20


async def test_a_newcomer_is_handed_its_records_in_slices() -> None:
    here = here_with(0, 1500)
    for _ in range(30):
        here.add(near(160, random.Random(len(here.router))))
    newcomer = here.add(near(158, random.Random(2)))
    slices = count_closest(here)
    await turning(slices, here.replicator._hand_off(newcomer.address))
    assert len(here.stored) > 3 * LOOKED_AT
    assert max(slices) <= 2 * LOOKED_AT


async def test_what_is_looked_at_and_not_owed_is_looked_at_in_slices_too() -> None:
    here, slices = here_with(0, 1500), [0]
    newcomer = here.add(near(160, random.Random(2)))

    def owes(*_: object) -> bool:
        slices[-1] += 1
        return False

    cast(Any, here.replicator)._owes = owes
    await turning(slices, here.replicator._hand_off(newcomer.address))
    assert sum(slices) > 700
    assert max(slices) <= LOOKED_AT


async def turning(counts: list[int], work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and begin a new count with each turn of the loop."""

    async def turns() -> None:
        while True:
            counts.append(0)
            await asyncio.sleep(0)

    task = asyncio.ensure_future(turns())
    await work
    task.cancel()


async def test_the_keys_that_concern_a_newcomer_are_not_collected_first() -> None:
    here = here_with(0, 3000)
    newcomer = here.add(near(160, random.Random(2)))
    assert len(list(islice(here.replicator.concerns(newcomer), 10))) == 10
    taken: list[bytes] = []
    between = here.storage.keys_between

    def counting(nearest: int, farthest: int) -> Iterator[bytes]:
        for key in between(nearest, farthest):
            taken.append(key)
            yield key

    cast(Any, here.storage).keys_between = counting
    assert next(iter(here.replicator.concerns(newcomer)))
    assert len(taken) == 1


async def test_a_newcomer_that_wants_none_is_asked_no_more() -> None:
    here = here_with(0, 500)
    newcomer = here.add(near(160, random.Random(2)))

    def refuse(*_: object) -> "asyncio.Future[tuple[bool, None]]":
        here.stored.append((b"", b""))
        future = asyncio.get_running_loop().create_future()
        future.set_result((False, None))
        return future

    cast(Any, here).call_store = refuse
    await here.replicator._hand_off(newcomer.address)
    assert 0 < len(here.stored) <= 16


def test_newcomers_without_end_do_not_queue_without_end() -> None:
    here, rng = here_with(0, 1), random.Random(1)
    for _ in range(2 * MAX_NEWCOMERS):  # one that says another id at each ping
        here.replicator.on_contact(Contact(rng.randbytes(ID_BYTES), "127.0.0.1", 1))
    assert len(here.replicator._newcomers) == 1
    for port in range(1, 2 * MAX_NEWCOMERS):
        here.replicator.on_contact(Contact(rng.randbytes(ID_BYTES), "127.0.0.1", port))
    assert len(here.replicator._newcomers) == MAX_NEWCOMERS


# -- when ------------------------------------------------------------------------------------------------------------


def test_what_is_held_is_due_once_and_what_is_removed_is_not() -> None:
    here = Neighbours(OWN)
    due, storage = here.replicator._due, here.storage
    here.fill(100)
    assert len(due) == 100
    for seq in range(50):
        storage.store(shared_key("a"), record(name="a", seq=seq, life=60).envelope)
    storage.store(shared_key("a"), record(name="a", by=IDENTITIES[1], life=3000).envelope)
    assert len(due) == 102
    storage.keep_own(shared_key("own"), record(name="own"))
    assert len(due) == 102  # its publisher refreshes it
    here.clock.advance(61)
    assert len(storage.holdings(shared_key("a"))) == 1
    assert len(due) == 101
    here.clock.advance(4000)
    while storage.forget(100):
        pass
    assert len(due) == 0


def test_a_record_that_becomes_the_nodes_own_is_not_due() -> None:
    here = Neighbours(OWN)
    here.storage.store(shared_key("a"), record(name="a", seq=1).envelope)
    assert len(here.replicator._due) == 1
    here.storage.keep_own(shared_key("a"), record(name="a", seq=2))
    assert len(here.replicator._due) == 0


async def test_what_is_held_is_taken_up_in_the_order_in_which_it_is_due() -> None:
    here = Neighbours(OWN)
    here.fill(50, life=50_000)
    due = here.replicator._due
    keys = list(here.storage.keys())
    at = {key: holding.replicate_at for key in keys for holding in here.storage.held(key)}
    assert all(each is not None and 3600 <= each - here.clock.elapsed() <= 4200 for each in at.values())
    begun: list[bytes] = []

    async def work(job: tuple[bytes, bytes]) -> None:
        begun.append(job[0])

    here.clock.advance(4300)
    task = asyncio.ensure_future(due.run(work, limit=4))
    await until(lambda: len(begun) == 50)
    task.cancel()
    assert begun == sorted(at, key=lambda key: at[key] or 0)
    assert len(due) == 0
    assert all(holding.replicate_at is None for key in at for holding in here.storage.held(key))


def test_what_has_ended_when_it_is_due_is_taken_up_without_a_surprise() -> None:
    here = Neighbours(OWN)
    here.storage.store(*unsigned(random.Random(1), 1, life=10))
    here.clock.advance(4300)  # nobody has forgotten it yet
    assert here.replicator._due._take()[0] == shared_key(name_of(1))
    assert len(here.replicator._due) == 0


def test_the_last_schedule_of_what_is_held_counts() -> None:
    here = Neighbours(OWN)
    here.fill(1)
    due, key = here.replicator._due, shared_key(name_of(0))
    due.schedule(key, here.storage.holdings(key)[0], 5)
    assert len(due) == 1
    assert due._soonest() == here.clock.elapsed() + 5
