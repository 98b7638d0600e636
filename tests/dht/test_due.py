"""What is due when. The clock is set by hand; the loop only turns."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from plasm_dht.dht.due import LOOK_AGAIN, DueQueue
from plasm_dht.errors import RecordError
from tests.dht.support import HalfManualClock, ManualClock, until

Queue = DueQueue[str]


@asynccontextmanager
async def running(
    queue: Queue, *, limit: int = 4, gate: asyncio.Event | None = None
) -> AsyncIterator[tuple[list[str], list[str]]]:
    """Run the queue; the jobs that have begun, and those that are done."""
    begun: list[str] = []
    done: list[str] = []

    async def work(job: str) -> None:
        begun.append(job)
        if gate is not None:
            await gate.wait()
        done.append(job)

    task = asyncio.ensure_future(queue.run(work, limit=limit))
    try:
        yield begun, done
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_jobs_run_in_the_order_in_which_they_are_due() -> None:
    queue = Queue(ManualClock())
    for job, delay in (("c", -1.0), ("a", -3.0), ("b", -2.0), ("later", 1000.0)):
        queue.schedule(job, delay)
    async with running(queue) as (begun, _):
        await turns()
        assert begun == ["a", "b", "c"]
        assert len(queue) == 1
        assert "later" in queue
        assert "a" not in queue


async def test_jobs_that_are_due_together_run_in_the_order_of_scheduling() -> None:
    queue = Queue(ManualClock())
    for job in "dacb":
        queue.schedule(job, 0)
    async with running(queue) as (begun, _):
        await turns()
        assert begun == list("dacb")


async def test_the_last_schedule_of_a_job_counts() -> None:
    clock = ManualClock()
    queue = Queue(clock, look_again=0.005)
    queue.schedule("sooner", 1000)
    queue.schedule("sooner", 0)
    queue.schedule("later", 0)
    queue.schedule("later", 1000)
    assert queue.due_in("later") == 1000
    assert len(queue) == 2
    async with running(queue) as (begun, _):
        await turns()
        assert begun == ["sooner"]
        clock.advance(1000)
        await until(lambda: len(begun) == 2)
        assert begun == ["sooner", "later"]


async def test_a_job_runs_once() -> None:
    clock = ManualClock()
    queue = Queue(clock)
    for _ in range(5):
        queue.schedule("job", 0)  # the same due time, five times
    async with running(queue) as (begun, _):
        await turns()
        assert begun == ["job"]
        queue.schedule("job", 0)
        await turns()
        assert begun == ["job", "job"]


async def test_a_cancelled_job_never_runs() -> None:
    queue = Queue(ManualClock())
    queue.schedule("job", 0)
    queue.schedule("other", 0)
    queue.cancel("job")
    queue.cancel("unknown")
    assert queue.due_in("job") is None
    async with running(queue) as (begun, _):
        await turns()
        assert begun == ["other"]


async def test_due_in_counts_down() -> None:
    clock = ManualClock()
    queue = Queue(clock)
    queue.schedule("job", 100)
    clock.advance(30)
    assert queue.due_in("job") == pytest.approx(70)
    clock.step(1000)  # it slept
    assert queue.due_in("job") == pytest.approx(-930)


async def test_no_more_than_the_limit_run_at_a_time() -> None:
    queue = Queue(ManualClock())
    gate = asyncio.Event()
    for number in range(5):
        queue.schedule(str(number), 0)
    async with running(queue, limit=2, gate=gate) as (begun, done):
        await turns()
        assert begun == ["0", "1"]
        assert done == []
        gate.set()
        await turns(50)
        assert begun == done == ["0", "1", "2", "3", "4"]


async def test_a_job_that_is_due_sooner_than_all_wakes_the_queue() -> None:
    queue = Queue(ManualClock())
    queue.schedule("later", 1000)
    async with running(queue) as (begun, _):
        await turns()
        queue.schedule("now", 0)
        await turns()
        assert begun == ["now"]


async def test_a_job_is_due_after_its_delay_and_not_before() -> None:
    queue = Queue(HalfManualClock())
    loop = asyncio.get_running_loop()
    began = loop.time()
    queue.schedule("job", 0.02)
    async with running(queue) as (begun, _):
        await until(lambda: bool(begun))
        assert 0.02 <= loop.time() - began < 1


async def test_what_a_jump_of_the_wall_clock_made_overdue_goes_out_at_the_next_look() -> None:
    clock = HalfManualClock()
    queue = Queue(clock, look_again=0.01)
    queue.schedule("job", 3600)
    async with running(queue) as (begun, _):
        await turns()
        clock.stepped += 3601
        await until(lambda: bool(begun))


async def test_a_wall_clock_that_steps_back_delays_nothing() -> None:
    clock = HalfManualClock()
    queue = Queue(clock, look_again=0.01)
    queue.schedule("job", 0.02)
    async with running(queue) as (begun, _):
        clock.stepped -= 100_000
        await until(lambda: bool(begun), seconds=1)


def test_a_jump_is_noticed_within_seconds() -> None:
    assert LOOK_AGAIN <= 5


async def test_nothing_stays_of_cancelled_jobs() -> None:
    queue = Queue(ManualClock())
    queue.schedule("kept", 1)
    for number in range(10_000):
        queue.schedule(f"job {number}", 1000 + number)
        queue.cancel(f"job {number}")
    assert len(queue) == 1
    assert len(queue._in_order) == 1


async def test_a_job_that_is_rescheduled_ten_thousand_times_takes_one_place() -> None:
    clock = ManualClock()
    queue = Queue(clock)
    for number in range(10_000):
        queue.schedule("job", 1000 + number)
    assert len(queue) == 1
    assert len(queue._in_order) == 1
    assert queue.due_in("job") == 10_999


async def test_a_job_that_fails_is_logged_and_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    queue = Queue(ManualClock())
    ran: list[str] = []

    async def work(job: str) -> None:
        ran.append(job)
        if job == "bad":
            raise RecordError("malformed", "it cannot be signed")

    for job in ("bad", "good"):
        queue.schedule(job, 0)
    task = asyncio.ensure_future(queue.run(work, limit=1))
    await until(lambda: len(ran) == 2)
    queue.schedule("later", 0)
    await until(lambda: len(ran) == 3)
    assert ran == ["bad", "good", "later"]
    assert "what was due for 'bad' failed: it cannot be signed" in caplog.text
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
