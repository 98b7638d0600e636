"""The routing table: exact, verified, diverse, bounded."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kademlia.node import Node

from plasm_dht.dht.distance import ByDistance
from plasm_dht.dht.routing import Contact, PlasmRoutingTable, network_of
from tests.dht.support import HERE, ManualClock, node_id

OWN = 1 << 159 | 12345


def table(clock: ManualClock | None = None, *, k: int = 20, own: int = OWN) -> PlasmRoutingTable:
    return PlasmRoutingTable(None, k, Node(node_id(own)), clock or ManualClock())


def contact(number: int, ip: str | None = None, port: int = 8468) -> Contact:
    """A contact with an address of its own in a private network."""
    low = number % 2**22
    return Contact(node_id(number), ip or f"10.{low >> 16 & 255}.{low >> 8 & 255}.{low & 255}", port + (number >> 150))


def ids(found: list[Contact]) -> list[int]:
    return [each.long_id for each in found]


def filled(numbers: list[int], *, k: int = 20, own: int = OWN) -> PlasmRoutingTable:
    router = table(k=k, own=own)
    for port, number in enumerate(numbers, 1024):
        router.add_contact(Contact(node_id(number), f"10.0.{port >> 12}.1", port % 60000 + 1))
    return router


def check(router: PlasmRoutingTable) -> None:
    """What must hold of every table at any time."""
    in_buckets = [each for bucket in router.buckets for each in bucket.nodes.values()]
    assert sorted(each.long_id for each in in_buckets) == sorted(each.long_id for each in router)
    for entries, stale in ((router._live, False), (router._stale, True)):
        assert entries._ids == sorted(each.long_id for each in router if each.is_stale is stale)
        assert [each.long_id for each in entries] == entries._ids
    assert len({each.address for each in router}) == len(router) == len(router.by_address)
    assert router.live_count == len(router.live())
    edges = [(0, -1), *(bucket.range for bucket in router.buckets)]
    assert all(upper[0] == lower[1] + 1 for lower, upper in itertools.pairwise(edges))
    assert router.buckets[-1].range[1] == 2**160 - 1
    for bucket in router.buckets:
        assert len(bucket) <= router.ksize
        assert len(bucket.replacement_nodes) <= 2 * router.ksize
        assert all(bucket.range[0] <= each.long_id <= bucket.range[1] for each in bucket.nodes.values())


# -- the closest -----------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(1, 2**160 - 1),
    st.integers(1, 300),
    st.builds(lambda bit, low: (1 << bit) + low, st.integers(8, 159), st.integers(-3, 3)),
)


@given(st.lists(numbers, unique=True, max_size=200), numbers, st.integers(1, 25), st.sets(st.integers(0, 199)))
def test_the_closest_are_exactly_those_of_brute_force(members: list[int], key: int, k: int, stale: set[int]) -> None:
    router = filled(members, k=8)
    for position, each in enumerate(list(router)):
        if position in stale:
            router.miss(each)
            router.miss(each)
    check(router)
    for wanted in (False, True):
        among = [each.long_id for each in router if each.is_stale is wanted]
        assert ids(router.closest(key, k, stale=wanted)) == sorted(among, key=lambda each: each ^ key)[:k]
    check_alike(router, [key, *(key ^ 1 << bit for bit in range(160)), *(each.long_id for each in router)], k)


def check_alike(router: PlasmRoutingTable, keys: list[int], k: int) -> None:
    """Keys that are alike in what decides have the same k closest, the same next one, and the same bits decide."""
    same: dict[tuple[int, ...], tuple[set[int], list[int], list[int]]] = {}
    for key in keys:
        near, following, bits = router.nearest(key, k)
        in_order = router.closest(key, k + 1)
        assert (set(ids(near)), ids(following)) == (set(ids(in_order[:k])), ids(in_order[k:]))
        path: tuple[int, ...] = ()
        for bit in bits:  # so far it went the same way, and comes to the same fork
            assert same.setdefault(path, (set(), [], [bit]))[2] == [bit]
            path += (bit, key >> bit & 1)
        assert same.setdefault(path, (set(ids(near)), ids(following), [])) == (set(ids(near)), ids(following), [])


@pytest.mark.parametrize("k", [1, 8, 20])
def test_the_closest_are_exact_among_thousands(k: int) -> None:
    drawn = random.Random(k)
    router = table(k=k)
    for number in range(5000):
        router.add_contact(Contact(drawn.randbytes(20), f"10.1.{number >> 8}.{number & 255}", 8468))
    for each in drawn.sample(list(router), len(router) // 5):
        router.miss(each)
        router.miss(each)
    check(router)
    keys = []
    for _ in range(200):
        key = drawn.getrandbits(160)
        if drawn.random() < 0.5:
            key = drawn.choice(list(router)).long_id ^ drawn.getrandbits(drawn.randrange(1, 160))
        live = sorted((each.long_id for each in router.live()), key=key.__xor__)
        assert ids(router.closest(key, k)) == live[:k]
        keys.append(key)
    keys = [key ^ 1 << bit for key in keys[:20] for bit in range(160)]
    check_alike(router, keys, k)
    for each in [each for each in router if each.is_stale]:  # they answer again, and stand between the others
        router.add_contact(each)
    check_alike(router, keys, k)


@pytest.mark.parametrize("k", [1, 8, 20])
def test_the_closest_are_exact_where_the_half_of_the_key_has_just_k_or_one_fewer_or_more(k: int) -> None:
    drawn = random.Random(k)
    for half, near, far in itertools.product((0, 1), range(max(k - 2, 0), k + 3), (3 * k, 40 * k)):
        key = half << 159 | drawn.getrandbits(159)
        members = [half << 159 | drawn.getrandbits(159) for _ in range(near)]
        members += [(1 - half) << 159 | drawn.getrandbits(159) for _ in range(far)]
        entries: ByDistance[int] = ByDistance()
        for each in members:
            entries.add(each, each)
        in_order = sorted(members, key=key.__xor__)
        assert entries.closest(key, k) == in_order[:k]
        near, following, _ = entries.nearest(key, k)
        assert (set(near), following) == (set(in_order[:k]), in_order[k : k + 1])


def test_contacts_that_differ_in_their_last_bits_alone_are_told_apart() -> None:
    far = [1 << bit for bit in range(100, 150)]
    router = filled([*((5 << 152) + number for number in range(20)), *far], own=5 << 152 | 1 << 20)
    assert len([each for each in router if each.long_id >> 152 == 5]) == 20
    for k in (1, 5, 19, 20):
        check_alike(router, [(5 << 152) + low for low in (*range(64), 2**60)], k)


def test_find_neighbors_leaves_out_the_node_itself_and_the_one_that_asks() -> None:
    router = filled([1, 2, 3, 4, 5])
    asking = router.find(node_id(2))
    assert ids(router.find_neighbors(Node(node_id(1)), k=3)) == [3, 2, 5]
    assert ids(router.find_neighbors(Node(node_id(1)), exclude=asking)) == [3, 5, 4]
    assert ids(router.find_neighbors(Node(node_id(1)), k=1)) == [3]


# -- traps of the base library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(155, 160))
def test_ids_at_the_edges_of_a_bucket_have_a_bucket(bit: int) -> None:
    router = filled([random.Random(bit * 1000 + n).getrandbits(160) for n in range(500)], k=2)
    for number in (1 << bit, (1 << bit) - 1, 2**160 - 1, 1, 2**159 - 1, 2**159):
        bucket = router.buckets[router.get_bucket_for(Node(node_id(number)))]
        assert bucket.range[0] <= number <= bucket.range[1]
    for bucket in list(router.buckets):
        for edge in bucket.range:
            assert router.buckets[router.get_bucket_for(Node(node_id(edge)))] is bucket


def test_the_greatest_id_and_those_beside_the_middle_enter() -> None:
    router = table(k=1, own=5)
    for number in (2**160 - 1, 2**159, 2**159 - 1):
        router.add_contact(contact(number))
    check(router)
    assert ids(router.closest(2**160 - 1, 5))[0] == 2**160 - 1


def test_a_full_table_sends_nothing() -> None:
    router = table(k=1)  # its protocol is None: whatever it called would raise
    for number in range(1, 2000):
        router.add_contact(contact(number))
    check(router)


# -- who enters ------------------------------------------------------------------------------------------------------


def test_nobody_enters_but_through_add_contact() -> None:
    router = table()
    for asked in (router.is_new_node, router.has_room_for, router.get_bucket_for, router.touch, router.remove_contact):
        asked(contact(1))
    router.miss(contact(1))
    router.find_neighbors(contact(1))
    assert len(router) == 0
    assert router.add_contact(contact(1))
    assert ids(list(router)) == [1]


def test_the_zero_id_and_the_own_id_never_enter() -> None:
    router = table()
    for number in (0, OWN):
        assert not router.add_contact(contact(number))
        assert not router.has_room_for(Node(node_id(number)))
    assert len(router) == 0


def test_a_plain_node_of_kademlias_enters_as_a_contact() -> None:
    router = table()
    router.add_contact(Node(node_id(1), HERE, 1))
    assert isinstance(router.find(node_id(1)), Contact)


def test_an_entry_is_told_once() -> None:
    router = table()
    assert router.add_contact(contact(1)) is True
    assert router.add_contact(contact(1)) is False


def test_one_address_is_one_contact() -> None:
    router = table()
    router.add_contact(Contact(node_id(1), HERE, 1))
    router.add_contact(Contact(node_id(2**159), HERE, 1))
    assert ids(list(router)) == [2**159]
    router.add_contact(Contact(node_id(1), HERE, 2))
    assert len(router) == 2
    check(router)


def test_an_id_that_moved_is_followed_once_its_old_address_is_silent() -> None:
    router = table()
    router.add_contact(Contact(node_id(1), HERE, 1))
    moved = Contact(node_id(1), HERE, 2)
    assert not router.add_contact(moved)  # an impostor, as far as we know
    old = router.at((HERE, 1))
    assert old is not None
    router.miss(old)
    assert not router.add_contact(moved)
    router.miss(old)
    assert router.add_contact(moved)
    assert router.at((HERE, 1)) is None
    assert router.at((HERE, 2)) is router.find(node_id(1))
    check(router)


# -- who fails -------------------------------------------------------------------------------------------------------


def test_two_misses_in_a_row_make_a_contact_stale_and_an_answer_makes_it_live() -> None:
    router = table()
    router.add_contact(contact(1))
    known = router.find(node_id(1))
    assert known is not None
    router.miss(known)
    assert not known.is_stale
    router.add_contact(contact(1))
    router.miss(known)
    assert not known.is_stale  # not two in a row
    router.miss(known)
    assert known.is_stale
    assert router.closest(1, 5) == []
    assert router.closest(1, 5, stale=True) == [known]
    assert (router.live(), router.live_count, len(router)) == ([], 0, 1)
    router.add_contact(contact(1))
    assert router.closest(1, 5) == [known]


def test_a_miss_of_another_address_does_not_count() -> None:
    router = table()
    router.add_contact(contact(1))
    for _ in range(3):
        router.miss(contact(1, HERE))
    assert router.live_count == 1


def crowded(k: int = 4) -> PlasmRoutingTable:
    """A table in which ids below 100 share a full bucket that is not split any more."""
    router = table(k=k, own=2**160 - 1)
    for number in range(1, k + 1):
        assert router.add_contact(contact(number))
    assert not router.add_contact(contact(99))  # it was split as far as it goes
    for bucket in router.buckets:
        bucket.replacement_nodes.clear()
    return router


def test_a_stale_contact_stays_until_a_verified_replacement_is_there() -> None:
    router = crowded()
    first = router.find(node_id(1))
    assert first is not None
    router.miss(first)
    router.miss(first)
    assert router.find(node_id(1)) is first  # nobody to replace it
    assert router.has_room_for(contact(50))
    assert router.add_contact(contact(50))
    assert router.find(node_id(1)) is None
    assert router.find(node_id(50)) is not None
    check(router)


def test_who_finds_a_bucket_full_waits_and_moves_up_when_one_becomes_stale() -> None:
    router = crowded()
    assert not router.has_room_for(contact(50))
    for number in (50, 51):
        assert not router.add_contact(contact(number))
    assert len(router) == 4
    first = router.find(node_id(1))
    assert first is not None
    router.miss(first)
    assert router.find(node_id(1)) is first
    router.miss(first)
    assert router.find(node_id(1)) is None
    assert router.find(node_id(51)) is not None  # the latest that answered
    check(router)


def test_who_has_died_is_not_replaced_by_itself() -> None:
    router = crowded()
    router.add_contact(contact(50))  # it waits
    router.add_contact(
        Contact(node_id(2**159), *contact(1).address)
    )  # at the address of the first there is another now: who waits moves up
    known = router.find(node_id(50))
    assert known is not None
    for _ in range(2):
        router.miss(known)
    assert not [each for each in router.live() if each.long_id == 50]
    check(router)


def test_who_waits_is_bounded() -> None:
    router = crowded()
    for number in range(50, 5000):
        router.add_contact(contact(number))
    assert sum(len(bucket.replacement_nodes) for bucket in router.buckets) <= 4 * len(router.buckets)
    check(router)


def test_a_contact_that_was_forgotten_makes_room_for_who_waits() -> None:
    router = crowded()
    router.add_contact(contact(50))
    router.remove_contact(contact(2))
    assert sorted(ids(list(router))) == [1, 3, 4, 50]
    router.remove_contact(contact(2))
    assert len(router) == 4


def test_a_stale_contact_goes_after_24_hours() -> None:
    clock = ManualClock()
    router = table(clock)
    for number in (1, 2):
        router.add_contact(contact(number))
    known = router.find(node_id(1))
    assert known is not None
    router.miss(known)
    router.miss(known)
    clock.advance(23 * 3600)
    router.miss(known)  # it is still silent
    router.expire_stale()
    assert len(router) == 2
    clock.advance(3601)
    router.expire_stale()
    assert ids(list(router)) == [2]
    check(router)


# -- diversity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ip", "network"),
    [
        ("8.8.8.8", "8.8.8.0/24"), ("8.8.9.8", "8.8.9.0/24"),
        ("2a00:1450:4001:82a::200e", "2a00:1450:4001:82a::/64"),
        (HERE, None), ("::1", None), ("10.1.2.3", None), ("192.168.0.1", None), ("172.16.0.1", None),
        ("fd00::1", None), ("fe80::1", None), ("169.254.1.1", None),
    ],
)  # fmt: skip
def test_the_network_of_an_address(ip: str, network: str | None) -> None:
    assert network_of(ip) == network


def test_the_third_of_one_network_yields_first() -> None:
    router = table(k=4, own=2**160 - 1)
    for number in (1, 2, 3):
        router.add_contact(contact(number, f"8.8.8.{number}"))
    router.add_contact(contact(4, "9.9.9.9"))
    assert router.add_contact(contact(5, "1.1.1.1"))
    assert sorted(ids(list(router))) == [1, 2, 4, 5]  # the youngest of the three yielded
    assert not router.add_contact(contact(6, "2.2.2.2"))  # two may stay
    assert sorted(ids(list(router))) == [1, 2, 4, 5]
    check(router)


def test_a_newcomer_of_the_same_network_replaces_nobody() -> None:
    router = table(k=4, own=2**160 - 1)
    for number in (1, 2, 3):
        router.add_contact(contact(number, f"8.8.8.{number}"))
    router.add_contact(contact(4, "9.9.9.9"))
    assert not router.add_contact(contact(5, "8.8.8.5"))
    assert sorted(ids(list(router))) == [1, 2, 3, 4]


@pytest.mark.parametrize("prefix", ["127.0.0.", "10.0.0.", "192.168.1."])
def test_neighbours_on_one_machine_or_private_network_do_not_yield(prefix: str) -> None:
    router = table(k=4, own=2**160 - 1)
    for number in range(1, 5):
        router.add_contact(contact(number, f"{prefix}{number}"))
    assert not router.add_contact(contact(9, "1.1.1.1"))
    assert sorted(ids(list(router))) == [1, 2, 3, 4]


def test_a_stale_contact_yields_before_one_of_a_crowded_network() -> None:
    router = table(k=4, own=2**160 - 1)
    for number in (1, 2, 3):
        router.add_contact(contact(number, f"8.8.8.{number}"))
    router.add_contact(contact(4, "9.9.9.9"))
    known = router.find(node_id(4))
    assert known is not None
    router.miss(known)
    router.miss(known)
    router.add_contact(contact(5, "1.1.1.1"))
    assert sorted(ids(list(router))) == [1, 2, 3, 5]


# -- age and size ----------------------------------------------------------------------------------------------------


def test_buckets_get_lonely_by_our_clock() -> None:
    clock = ManualClock()
    router = filled_with(clock)
    assert router.lonely_buckets() == []
    clock.advance(3599)
    router.touch(Node(node_id(1)))
    clock.advance(1)
    touched = router.buckets[router.get_bucket_for(Node(node_id(1)))]
    assert router.lonely_buckets() == [bucket for bucket in router.buckets if bucket is not touched]
    clock.advance(3599)
    assert set(map(id, router.lonely_buckets())) == set(map(id, router.buckets))


def filled_with(clock: ManualClock) -> PlasmRoutingTable:
    router = table(clock, k=2)
    drawn = random.Random(1)
    for number in range(100):
        router.add_contact(Contact(drawn.randbytes(20), f"10.2.0.{number}", 8468))
    assert len(router.buckets) > 5
    return router


def test_a_split_keeps_the_age_of_a_bucket() -> None:
    clock = ManualClock()
    router = table(clock, k=2, own=1)
    clock.advance(3600)
    for number in (1 << 159, 1 << 158, 1 << 157):
        router.add_contact(contact(number))
    assert len(router.buckets) > 1
    assert len(router.lonely_buckets()) == len(router.buckets)


def test_ten_thousand_candidates_leave_a_bounded_table() -> None:
    drawn = random.Random(7)
    router = table(k=20)
    for number in range(10_000):
        router.add_contact(Contact(drawn.randbytes(20), f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 8468))
    check(router)
    # Away from our id a bucket is split to a depth that is a multiple of 5: at most 31 buckets for each 5 bits, and
    # 10,000 ids differ from ours within their first log2(10,000 / 20) = 9 bits, give or take a few.
    assert 600 < len(router) <= 3 * 31 * 20
    assert len(router.buckets) <= 3 * 31


def test_an_attacker_beside_our_id_gets_no_more_than_its_buckets() -> None:
    router = table(k=20)
    for number in range(10_000):
        router.add_contact(
            Contact(node_id(OWN ^ (number + 1)), f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1)
        )
    check(router)
    assert len(router) <= 3 * 31 * 20
