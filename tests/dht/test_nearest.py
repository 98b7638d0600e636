"""The closest contacts that are kept are those of brute force, for every key, until somebody comes or goes."""

import random
from collections.abc import Callable

import pytest
import umsgpack
from hypothesis import given
from hypothesis import strategies as st
from kademlia.node import Node

from plasm_dht.dht import nearest
from plasm_dht.dht.nearest import Fork, NearestSets
from plasm_dht.dht.routing import Contact, PlasmRoutingTable
from tests.dht.support import ManualClock

OWN = b"\x22" * 20
ROOM = 1232 - 21 - 3  # of a datagram, for nodes


def ipv4(number: int) -> str:
    return f"10.{number >> 8 & 255}.{number & 255}.1"


def ipv6(number: int) -> str:
    """Of 25 or 38 characters, so that 18 to 20 of these nodes fit."""
    return f"2001:db8:1111:2222:{'3333:4444:5555' if number % 4 else '3:4'}:{4096 + number:x}".replace(":3:4:", "::3:")


def table(ids: list[bytes], k: int = 20, host: Callable[[int], str] = ipv4) -> PlasmRoutingTable:
    router = PlasmRoutingTable(None, k, Node(OWN), ManualClock())
    for number, each in enumerate(ids):
        router.add_contact(Contact(each, host(number), 1 + number))
    return router


def drawn(count: int, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(20) for _ in range(count)]


def expected(router: PlasmRoutingTable, key: bytes, k: int, without: bytes = b"") -> list[bytes]:
    """The names of the k closest, by the simplest of ways, as many of the nearest as fit."""
    wanted = int.from_bytes(key)
    live = sorted(router.live(), key=lambda contact: contact.long_id ^ wanted)
    names = [contact.encoded for contact in live if contact.encoded != without][:k]
    while sum(map(len, names)) > ROOM:
        names.pop()
    return names


def check(sets: NearestSets, router: PlasmRoutingTable, k: int, key: bytes) -> None:
    found = sets.to(key)
    names = expected(router, key, k)
    assert found.names == frozenset(names)
    assert sorted(map(tuple, umsgpack.unpackb(found.array))) == sorted(tuple(umsgpack.unpackb(each)) for each in names)
    for asker in (names[0], names[-1], random.Random(key).choice(names)) if names else ():
        without = sorted(map(tuple, umsgpack.unpackb(sets.array_without(key, asker))))
        others = expected(router, key, k, without=asker)
        assert without == sorted(tuple(umsgpack.unpackb(each)) for each in others)


@pytest.mark.parametrize("host", [ipv4, ipv6])
@pytest.mark.parametrize("k", [1, 8, 20, 50])
@pytest.mark.parametrize("contacts", [0, 1, 2, 19, 20, 21, 22, 60, 700])
def test_they_are_those_of_brute_force_before_and_after_they_are_kept(
    contacts: int, k: int, host: Callable[[int], str]
) -> None:
    router = table(drawn(contacts), k, host)
    sets = NearestSets(router, k)
    source = random.Random(k)
    keys = [*drawn(30, seed=2), *(each.id for each in router.closest(source.getrandbits(160), 3))]
    keys += [key[:-5] + source.randbytes(5) for key in keys]
    for key in keys * 2:
        check(sets, router, k, key)


@pytest.mark.parametrize("contacts", [30, 60, 150])
def test_as_many_as_fit_are_those_of_brute_force_where_some_keys_have_one_more(contacts: int) -> None:
    router = table(drawn(contacts), 20, ipv6)
    sets = NearestSets(router, 20)
    keys = drawn(1500, seed=8)
    assert len({len(sets.to(key).names) for key in keys}) > 1
    for key in keys:
        assert sets.to(key).names == frozenset(expected(router, key, 20))


def test_whom_to_leave_out_is_known_without_another_look(monkeypatch: pytest.MonkeyPatch) -> None:
    router = table(drawn(100))
    sets = NearestSets(router, 20)
    [key] = drawn(1, seed=9)
    asker = router.closest(int.from_bytes(key), 1)[0].encoded
    sets.to(key)
    monkeypatch.setattr(router, "closest", None)
    monkeypatch.setattr(router, "nearest", None)
    assert len(umsgpack.unpackb(sets.array_without(key, asker))) == 20


anywhere = st.integers(0, 2**160 - 1)
near_own = st.builds(
    lambda bit, low: int.from_bytes(OWN) ^ (1 << bit | low % (1 << bit)), st.integers(0, 159), anywhere
)


@given(
    st.lists(anywhere | near_own, max_size=120, unique=True),
    st.integers(1, 9) | st.just(20),
    st.sampled_from([ipv4, ipv6]),
    st.randoms(use_true_random=False),
)
def test_they_are_those_of_brute_force_however_the_ids_lie(
    ids: list[int], k: int, host: Callable[[int], str], source: random.Random
) -> None:
    router = table([each.to_bytes(20) for each in ids], k, host)
    sets = NearestSets(router, k)
    keys = [source.choice([*ids, 0]) ^ source.getrandbits(source.randrange(1, 161)) for _ in range(30)]
    for key in keys * 2:
        check(sets, router, k, key.to_bytes(20))


def test_a_set_is_looked_up_once_for_all_keys_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    router = table(drawn(400))
    sets = NearestSets(router, 20)
    looked_up = 0
    of = router.nearest

    def count(key: int, k: int) -> tuple[list[Contact], list[Contact], list[int]]:
        nonlocal looked_up
        looked_up += 1
        return of(key, k)

    monkeypatch.setattr(router, "nearest", count)
    keys = drawn(20_000, seed=3)
    apart = {sets.to(key).names for key in keys}
    assert looked_up < sets.count < 2 * looked_up < 4 * len(apart) < 8 * len(router)
    before = looked_up
    for key in keys:
        sets.to(key[:-6] + bytes(6))
    assert looked_up == before


def test_no_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest.MAX_KEPT == 4096
    monkeypatch.setattr(nearest, "MAX_KEPT", 500)
    one_of_each_distance = [(int.from_bytes(OWN) ^ 1 << bit).to_bytes(20) for bit in range(160)]
    for ids in (drawn(400), one_of_each_distance, [*drawn(400), *one_of_each_distance]):
        router = table(ids)
        sets = NearestSets(router, 20)
        for key in [*drawn(2000, seed=4), *(OWN[:15] + key[15:] for key in drawn(500, seed=5))]:
            sets.to(key)
        assert 500 <= places(sets) == sets.count < 500 + 160, "one path more than there was room for, at most"
        for key in drawn(100, seed=5):
            check(sets, router, 20, key)


def places(sets: NearestSets) -> int:
    """How many sets and forks there are."""
    waiting, count = [*sets._by_first_byte.values()], 0
    while waiting:
        place = waiting.pop()
        count += 1
        if isinstance(place, Fork):
            waiting += place.sides.values()
    return count


def test_all_are_forgotten_when_the_table_has_changed() -> None:
    router = table(drawn(200))
    sets = NearestSets(router, 20)
    source = random.Random(6)
    keys = drawn(300, seed=7)

    def check_all() -> None:
        sets.forget()
        assert sets.count == 0
        for key in keys:
            check(sets, router, 20, key)

    check_all()
    gone = source.sample(list(router), 20)
    for each in gone:
        router.miss(each)
        router.miss(each)
    check_all()
    for each in gone:
        router.add_contact(each)
    check_all()
