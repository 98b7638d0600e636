"""How fast an address may ask, and how much is remembered of addresses."""

import pytest

from plasm_dht.dht.limits import MAX_ADDRESSES, RateLimit, Said, Seen, source_of

IP = "192.0.2.1"


def asked(limit: RateLimit, times: int, now: float, ip: str = IP) -> int:
    return sum(limit.allows(ip, now) for _ in range(times))


def test_an_address_gets_a_burst_of_twice_its_rate_and_then_its_rate() -> None:
    limit = RateLimit(10)
    assert asked(limit, 100, 0.0) == 20
    assert asked(limit, 100, 0.5) == 5
    assert asked(limit, 100, 1.5) == 10
    assert asked(limit, 100, 1.5) == 0
    assert asked(limit, 100, 1000.0) == 20  # no more than the burst is saved up


def test_at_its_rate_an_address_is_never_refused() -> None:
    limit = RateLimit(10)
    assert all(limit.allows(IP, tenth / 10) for tenth in range(1000))


def test_a_refused_request_costs_nothing() -> None:
    limit = RateLimit(10)
    asked(limit, 20, 0.0)
    assert asked(limit, 1000, 0.05) == 0
    assert asked(limit, 1, 0.11) == 1


def test_one_address_does_not_use_up_anothers_share() -> None:
    limit = RateLimit(10)
    assert asked(limit, 100, 0.0) == 20
    assert asked(limit, 100, 0.0, "192.0.2.2") == 20


def test_a_flood_of_addresses_is_remembered_in_bounded_memory() -> None:
    limit = RateLimit(10)
    for number in range(MAX_ADDRESSES + 500):
        limit.allows(str(number), 0.0)
    assert len(limit._buckets) == MAX_ADDRESSES
    assert "0" not in limit._buckets  # the longest unseen went first
    assert str(MAX_ADDRESSES + 499) in limit._buckets


def test_what_an_address_did_is_remembered_for_a_lifetime() -> None:
    seen = Seen(60)
    assert not seen.has((IP, 1), 0.0)
    seen.add((IP, 1), 0.0)
    assert seen.has((IP, 1), 59.9)
    assert not seen.has((IP, 1), 60.0)
    assert not seen.has((IP, 2), 0.0)
    seen.add((IP, 1), 50.0)
    assert seen.has((IP, 1), 100.0)
    seen.discard((IP, 1))
    seen.discard((IP, 1))
    assert not seen.has((IP, 1), 50.0)


def test_what_is_remembered_is_bounded_and_the_longest_unseen_goes_first() -> None:
    seen = Seen(60)
    for port in range(MAX_ADDRESSES):
        seen.add((IP, port), 0.0)
    seen.add((IP, 0), 1.0)
    seen.add(("another", 1), 1.0)
    assert len(seen._times) == MAX_ADDRESSES
    assert seen.has((IP, 0), 1.0)
    assert not seen.has((IP, 1), 1.0)


@pytest.mark.parametrize(
    ("ip", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # a socket for both families
        ("fe80::1", "fe80::1"),
        ("fe80::2%eth0", "fe80::2%eth0"),
    ],
)
def test_a_host_with_ipv6_sends_from_its_whole_64(ip: str, source: str) -> None:
    assert source_of(ip) == source


def test_the_addresses_of_one_64_share_a_limit() -> None:
    limit = RateLimit(10)
    assert sum(limit.allows(f"2001:db8::{number:x}", 0.0) for number in range(100)) == 20
    assert asked(limit, 100, 0.0, "2001:db8:0:1::1") == 20
    assert asked(limit, 100, 0.0, "fe80::1") == asked(limit, 100, 0.0, "fe80::2") == 20


def test_what_an_address_said_last_counts_for_a_lifetime() -> None:
    said = Said(60)
    assert not said.has((IP, 1), b"a", 0.0)
    said.add((IP, 1), b"a", 0.0)
    assert said.has((IP, 1), b"a", 59.9)
    assert not said.has((IP, 1), b"a", 60.0)
    assert not said.has((IP, 1), b"b", 0.0)
    assert not said.has((IP, 2), b"a", 0.0)
    said.add((IP, 1), b"b", 1.0)
    assert not said.has((IP, 1), b"a", 1.0)
    for port in range(MAX_ADDRESSES):
        said.add(("192.0.2.9", port), b"c", 2.0)
    assert len(said._ids) == MAX_ADDRESSES
    assert not said.has((IP, 1), b"b", 2.0)
