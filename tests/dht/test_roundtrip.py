"""Time-outs that follow the round trips (RFC 6298)."""

import pytest

from plasm_dht.dht.roundtrip import MAX_ADDRESSES, RoundTrips

NEAR, FAR, NEW = ("192.0.2.1", 1), ("192.0.2.2", 1), ("192.0.2.3", 1)


def test_a_stranger_gets_one_second() -> None:
    assert RoundTrips().timeout(NEAR) == 1.0


def test_the_first_sample_gives_three_times_itself() -> None:
    trips = RoundTrips()
    trips.sample(NEAR, 0.2)  # SRTT = R, RTTVAR = R / 2, RTO = SRTT + 4 RTTVAR
    assert trips.timeout(NEAR) == pytest.approx(0.6)
    assert trips.timeout(FAR) == 1.0


def test_further_samples_are_smoothed_as_the_rfc_says() -> None:
    trips = RoundTrips()
    for sample in (0.2, 0.4, 0.1):
        trips.sample(NEAR, sample)
    smoothed, variation = 0.2, 0.1
    for sample in (0.4, 0.1):
        variation = 3 / 4 * variation + 1 / 4 * abs(smoothed - sample)
        smoothed = 7 / 8 * smoothed + 1 / 8 * sample
    assert trips.timeout(NEAR) == pytest.approx(smoothed + 4 * variation)
    assert trips.timeout(NEAR) == pytest.approx(0.209375 + 4 * 0.125, abs=0.01)


def test_a_time_out_is_from_150_ms_to_3_s() -> None:
    trips = RoundTrips()
    trips.sample(NEAR, 0.0005)
    trips.sample(FAR, 2.0)
    assert trips.timeout(NEAR) == 0.15
    assert trips.timeout(FAR) == 3.0


def test_it_backs_off_up_to_the_cap_until_the_next_sample() -> None:
    trips = RoundTrips()
    trips.sample(NEAR, 0.01)
    for wait in (0.3, 0.6, 1.2, 2.4, 3.0, 3.0):
        trips.back_off(NEAR)
        assert trips.timeout(NEAR) == pytest.approx(wait)
    trips.sample(NEAR, 0.01)
    assert trips.timeout(NEAR) == 0.15
    for wait in (0.15, 0.3, 0.6):  # late once is chance
        trips.back_off(NEAR, late=True)
        assert trips.timeout(NEAR) == pytest.approx(wait)
    trips.back_off(NEW)
    assert trips.timeout(NEW) == 2.0
    assert trips.knows(NEAR)
    assert not trips.knows(NEW)


def test_slower_than_expected_is_twice_the_smoothed_round_trip() -> None:
    trips = RoundTrips()
    assert trips.slow_after(NEW) == 0.25  # nothing is known
    trips.sample(NEAR, 0.04)
    assert trips.slow_after(NEAR) == pytest.approx(0.08)
    trips.sample(FAR, 0.1)
    assert trips.slow_after(NEW) == pytest.approx(0.14)  # twice the median
    for _ in range(50):
        trips.sample(NEAR, 0.0001)
    assert trips.slow_after(NEAR) == pytest.approx(0.005, abs=0.001)
    trips.sample(("192.0.2.9", 1), 3.0)
    assert trips.slow_after(("192.0.2.9", 1)) == 0.25


def test_the_median_is_of_recent_answers() -> None:
    trips = RoundTrips()
    for port in range(64):
        trips.sample(("192.0.2.7", port), 0.1)
    for port in range(64):
        trips.sample(("192.0.2.8", port), 0.02)
    assert trips.slow_after(NEW) == pytest.approx(0.04)
    trips.sample(FAR, 3.0)
    assert trips.slow_after(NEW) == pytest.approx(0.04)  # not of the mean


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    trips = RoundTrips()
    for port in range(MAX_ADDRESSES):
        trips.sample(("192.0.2.7", port), 0.2)
    trips.sample(("192.0.2.7", 0), 0.2)
    trips.sample(NEW, 0.2)
    assert len(trips._estimates) == MAX_ADDRESSES
    for port in range(MAX_ADDRESSES + 1):
        trips.back_off(("192.0.2.5", port))
    assert len(trips._backed_off) == MAX_ADDRESSES
    assert trips.timeout(("192.0.2.7", 1)) == 1.0
    assert trips.timeout(("192.0.2.7", 0)) < 1.0
