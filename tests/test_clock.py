"""Which clock is believed, and what is due after a jump."""

import asyncio
import time

import pytest

from plasm_dht.clock import RELEASED, Clock, NetworkTime, is_in_doubt, is_right_again, network_time, reader_time
from tests.dht.support import START, ManualClock

MINUTE = 60_000
HOUR = 60 * MINUTE


def test_the_machines_own_clocks_are_read() -> None:
    clock = Clock()
    assert abs(clock.wall() - time.time() * 1000) < 1000
    assert abs(clock.monotonic() - time.monotonic()) < 1
    clock.correction = 5000
    assert abs(clock.now() - clock.wall() - 5000) < 100


async def test_monotonic_time_is_the_loops() -> None:
    assert abs(Clock().monotonic() - asyncio.get_running_loop().time()) < 0.1


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], 0),
        ([("advance", 10)], 10),
        ([("step", 100)], 100),  # a suspend, or a wall clock that was set
        ([("step", 1.1)], 1.1),
        ([("step", 0.9)], 0),  # a slew
        ([("step", -100)], 0),  # no wall clock that steps back delays anything
        ([("step", -100), ("advance", 10)], 10),
        ([("advance", 10), ("step", 100), ("advance", 10), ("step", 100)], 220),
        ([("step", -100), ("step", 50), ("advance", 1)], 51),
    ],
)
def test_elapsed_is_monotonic_time_and_every_forward_jump(events: list[tuple[str, float]], expected: float) -> None:
    clock = ManualClock()
    began = clock.elapsed()
    for kind, seconds in events:
        getattr(clock, kind)(seconds)
        clock.elapsed()
    assert clock.elapsed() - began == pytest.approx(expected, abs=0.01)


def test_elapsed_never_goes_back() -> None:
    clock = ManualClock()
    seen = [clock.elapsed()]
    for seconds in (-3600, 3600, -1, 0.5, 7200, -7200):
        clock.step(seconds)
        clock.advance(0.1)
        seen.append(clock.elapsed())
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], None),
        ([0], None),
        ([MINUTE], None),
        ([MINUTE + 1], MINUTE + 1),  # one of one is enough
        ([-MINUTE - 1], -MINUTE - 1),
        ([10 * MINUTE, 0], None),  # they do not agree
        ([10 * MINUTE, 11 * MINUTE], 10 * MINUTE),
        ([10 * MINUTE, 11 * MINUTE + 1], None),
        ([10 * MINUTE, 10 * MINUTE, 0], 10 * MINUTE),
        ([10 * MINUTE, 10 * MINUTE, 0, 0], None),  # half is not more than half
        ([10 * MINUTE, 10 * MINUTE, 10 * MINUTE, 0, 0], 10 * MINUTE),
        ([10 * MINUTE, 20 * MINUTE, 30 * MINUTE], None),
        ([10 * MINUTE, 10 * MINUTE, 90 * MINUTE, 95 * MINUTE, 10 * MINUTE + 5], 10 * MINUTE + 5),
    ],
)
def test_network_time_is_the_median_when_more_than_half_agree(offsets: list[int], expected: int | None) -> None:
    found = network_time([START + offset for offset in offsets], START)
    assert found == (None if expected is None else START + expected)


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], 0),
        ([10 * MINUTE], 0),
        ([10 * MINUTE, 10 * MINUTE], 0),  # two are too few
        ([10 * MINUTE] * 3, 10 * MINUTE),
        ([-10 * MINUTE] * 3, -10 * MINUTE),
        ([MINUTE] * 3, 0),
        ([10 * MINUTE, 10 * MINUTE, 0], 0),  # at least three have to agree
        ([10 * MINUTE] * 3 + [0], 10 * MINUTE),
        ([10 * MINUTE] * 3 + [0] * 3, 0),
        ([10 * MINUTE] * 4 + [0] * 3, 10 * MINUTE),
    ],
)
def test_a_reader_mistrusts_its_clock_when_three_and_a_majority_differ(offsets: list[int], expected: int) -> None:
    assert reader_time([START + offset for offset in offsets], START) == START + expected


def test_a_clock_that_was_never_set_gives_way_to_any_responder() -> None:
    assert reader_time([START], 0) == START
    assert reader_time([START], RELEASED - 1) == START
    assert reader_time([START], RELEASED) == RELEASED
    assert reader_time([START, START + 9, START + 99], 0) == START + 9
    assert reader_time([], 0) == 0
    assert reader_time([5], 1000) == 1000  # nor had the responder's


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], False),
        ([0, 0, 0], False),
        ([0, 0, 120], False),  # one of three has a wrong clock
        ([0, 120], False),
        ([120], True),  # one alone is not believed, and nor are two
        ([120, 120], True),
        ([120, 120, 120], False),  # three are
        ([120, 120, -240], True),  # of three that contradict it two agree
        ([120, 120, -240, 120], False),
        ([120, 120, 0], True),
        ([120, 120, 0, 0], False),
        ([1, -1, 0.5], False),
    ],
)
def test_a_reader_is_in_doubt_while_most_contradict_the_time_that_it_takes(
    offsets: list[float], expected: bool
) -> None:
    assert is_in_doubt([START + round(offset * MINUTE) for offset in offsets], START) == expected


@pytest.mark.parametrize(("offsets", "expected"), [([0], False), ([0, 0, 120], False), ([0, 120, 240], True)])
def test_a_clock_that_was_never_set_is_in_doubt_while_no_majority_agrees(offsets: list[int], expected: bool) -> None:
    assert is_in_doubt([START + offset * MINUTE for offset in offsets], 0) == expected


def test_a_responder_whose_clock_was_never_set_says_nothing_where_any_was() -> None:
    unset = [5, 6, RELEASED - 1]
    assert network_time(unset, START) is None
    assert network_time([*unset, START], START + 2 * HOUR) == START
    assert network_time([*unset, START], 0) == START
    assert reader_time([*unset, START], 1000) == START
    assert reader_time([*unset, START], START + 2 * HOUR) == START + 2 * HOUR  # one alone is not believed
    assert is_in_doubt([*unset, START], START) is False


def test_where_no_clock_was_ever_set_those_of_most_count() -> None:
    assert network_time([5 * HOUR, 5 * HOUR, 7 * HOUR], 0) == 5 * HOUR
    assert reader_time([5 * HOUR, 6 * HOUR, 7 * HOUR], 0) == 6 * HOUR


def test_what_a_reading_showed_is_counted_from_the_wall_clock_and_not_from_a_correction_that_is_wrong() -> None:
    clock = ManualClock()
    clock.correction = -7 * HOUR
    time = NetworkTime(clock)
    assert time.now() == clock.wall() - 7 * HOUR
    time.learn([clock.wall() + 2 * HOUR] * 3)
    assert time.now() == clock.wall() + 2 * HOUR
    clock.correction = 2 * HOUR
    assert time.now() == clock.wall() + 2 * HOUR
    time.learn([])
    assert time.now() == clock.wall() + 2 * HOUR
    time.learn([clock.wall() + 2 * HOUR] * 3)
    clock.correction = 0
    assert time.now() == clock.wall()


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], False),
        ([0], True),
        ([120], False),
        ([0, 120], True),
        ([0, 120, 120], False),
        ([0, 0, 120, 120], True),
        ([0, 120, 240, 360], False),  # most contradict it, though not with one voice
        ([0, 0, 120, 240], True),
        ([60, 60, 60], False),
    ],
)
def test_a_corrected_clock_is_right_again_when_half_of_all_agree_with_it(offsets: list[int], expected: bool) -> None:
    samples = [START + offset * MINUTE for offset in offsets]
    assert is_right_again(samples, START) == expected
    assert is_right_again([5, *samples], START) == expected  # whose clock was never set
