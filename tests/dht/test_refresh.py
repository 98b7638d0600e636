"""Which record is refreshed when."""

import asyncio
import contextlib

import pytest

from plasm_dht.dht.intent import Intent, Round
from plasm_dht.dht.refresh import LIMIT, Refresher, retry_delay
from plasm_dht.errors import RecordError
from tests.dht.support import START, HalfManualClock, ManualClock, record, until


@pytest.mark.parametrize(
    ("failures", "left", "expected"),
    [
        # the smaller of 5 s and a quarter of what is left, doubling to 60 s, never more than half of what is left
        (1, 1200, 5), (2, 1200, 10), (3, 1200, 20), (4, 1200, 40), (5, 1200, 60), (6, 1200, 60), (1000, 1200, 60),
        (1, 20, 5), (1, 19, 4.75), (1, 12, 3), (2, 12, 6), (3, 12, 6), (1, 4, 1), (2, 4, 2), (5, 4, 2),
        (5, 100, 50), (5, 119, 59.5), (5, 120, 60),
        (1, 0.4, 0.2), (1, 0.1, 0.2), (9, 0.1, 0.2),  # half of what is left, again and again, would never end
        (1, 0, 5), (2, 0, 10), (9, 0, 60), (1, -100, 5), (3, -100, 20),
    ],
)  # fmt: skip
def test_a_failed_refresh_is_tried_again_after(failures: int, left: float, expected: float) -> None:
    assert retry_delay(failures, left) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("near", "told", "mistaken", "expected"),
    [
        (20, 3, 0, True), (20, 2, 0, False), (3, 3, 0, True), (3, 2, 0, False), (2, 1, 0, False), (1, 1, 0, True),
        (0, 0, 0, False), (1, 0, 0, False), (1, 0, 1, False),  # one at least
        (3, 2, 1, True), (2, 1, 1, True), (4, 2, 2, True), (4, 2, 1, False), (20, 2, 2, False),
        (3, 1, 2, False), (5, 2, 3, False), (20, 3, 17, True),
        (2, 2, 1, True), (1, 1, 1, True), (3, 2, 2, True), (4, 2, 3, True),  # who has said both, has it
    ],
)  # fmt: skip
def test_a_round_is_enough_when_three_acknowledge_or_all_whose_clock_does_not_contradict(
    near: int, told: int, mistaken: int, expected: bool
) -> None:
    neighbours = [(f"127.0.0.{number}", 8468) for number in range(near)]
    outcome = Round(record())
    # under another key, or by who is not near, it does not count
    outcome.contradicting |= {(b"shared", each) for each in neighbours} | {(b"bound", ("127.0.1.1", 8468))}
    outcome.contradicting |= {(b"bound", each) for each in neighbours[near - mistaken :]}
    acknowledged = {*neighbours[:told], ("127.0.1.2", 8468), ("127.0.1.3", 8468), ("127.0.1.4", 8468)}
    assert outcome.is_enough(b"bound", set(neighbours), acknowledged) is expected


def test_who_has_acknowledged_and_then_refuses_does_not_stand_for_one_that_is_silent() -> None:
    one, two, silent = [(f"127.0.0.{number}", 8468) for number in range(3)]
    outcome = Round(record(), contradicting={(b"bound", one)})
    assert not outcome.is_enough(b"bound", {one, two, silent}, {one, two})


async def nothing(name: str) -> None:
    """Refresh nothing."""


def test_a_refresh_is_up_to_five_per_cent_early_and_never_late() -> None:
    refresher = Refresher(nothing, ManualClock())
    delays = []
    for number in range(500):
        refresher.succeeded(str(number), 2400, 0)
        delays.append(refresher.due_in(str(number)) or 0)
    assert 2280 <= min(delays) < 2300
    assert 2380 < max(delays) <= 2400
    assert len(set(delays)) > 400  # spread, so that they do not fire at once


def test_the_time_that_the_publish_took_is_not_added() -> None:
    refresher = Refresher(nothing, ManualClock())
    refresher.succeeded("a", 100, 60)
    assert 35 <= (refresher.due_in("a") or 0) <= 40
    refresher.succeeded("a", 100, 1000)
    assert refresher.due_in("a") == pytest.approx(0.2)


def test_failures_count_in_a_row_and_for_each_name() -> None:
    refresher = Refresher(nothing, ManualClock())
    assert [refresher.failed("a", 1200) for _ in range(3)] == [5, 10, 20]
    assert refresher.due_in("a") == pytest.approx(20)
    assert refresher.failed("b", 1200) == 5
    refresher.succeeded("a", 2400, 0)
    assert refresher.failed("a", 1200) == 5
    refresher.cancel("a")
    assert refresher.due_in("a") is None
    assert refresher.failed("a", 1200) == 5


async def test_what_is_due_is_refreshed_and_what_is_cancelled_is_not() -> None:
    refreshed: list[str] = []

    async def refresh(name: str) -> None:
        refreshed.append(name)

    clock = HalfManualClock()
    refresher = Refresher(refresh, clock)
    refresher.succeeded("a", 2400, 0)
    refresher.succeeded("b", 2400, 0)
    refresher.succeeded("not yet", 4800, 0)
    refresher.cancel("b")
    clock.ahead += 2401
    task = asyncio.ensure_future(refresher.run())
    await until(lambda: bool(refreshed))
    assert refreshed == ["a"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_what_a_suspend_made_overdue_goes_out_at_once_but_not_all_together() -> None:
    under_way: set[str] = set()
    begun: set[str] = set()
    gate = asyncio.Event()

    async def refresh(name: str) -> None:
        begun.add(name)
        under_way.add(name)
        await gate.wait()
        under_way.discard(name)

    clock = HalfManualClock()
    refresher = Refresher(refresh, clock)
    for number in range(100):
        refresher.succeeded(str(number), 2400, 0)
    clock.stepped += 7200  # the wall clock went on while the machine slept
    task = asyncio.ensure_future(refresher.run())
    await until(lambda: len(begun) == LIMIT)
    assert len(under_way) == LIMIT
    gate.set()
    await until(lambda: len(begun) == 100)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(("left", "says"), [(100, "what is held expires in 100 s"), (0, "nothing of it is held")])
def test_when_it_is_not_refreshed_the_log_says_whether_anything_of_it_is_held(
    left: int, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    intent = Intent("name", kept_alive=True, acknowledged_end=left and START + 1000 * left)
    Refresher(nothing, ManualClock()).after_round(intent, 100, enough=False, took=0)
    assert f"; {says}; next try in 5.0 s" in caplog.text


async def test_a_refresh_that_fails_by_itself_is_tried_again() -> None:
    tried: list[str] = []

    async def refresh(name: str) -> None:
        tried.append(name)
        raise RecordError("malformed", "it cannot be signed")

    clock = HalfManualClock()
    refresher = Refresher(refresh, clock)
    refresher.succeeded("a", 1, 0)
    clock.ahead += 1.1
    task = asyncio.ensure_future(refresher.run())
    await until(lambda: refresher.due_in("a") is not None and len(tried) == 1)
    assert 4 < (refresher.due_in("a") or 0) <= 5
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
