"""What is due when, in order, and the loop that runs the jobs. It knows no network."""

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedList

from plasm_dht.clock import Clock
from plasm_dht.errors import PlasmError

log = logging.getLogger(__name__)

# A wall clock that jumps cannot wake us, so it is looked at this often (s): what a suspend or a clock step made overdue
# waits no longer than this.
LOOK_AGAIN = 5.0

J = TypeVar("J")
K = TypeVar("K", bound=Hashable)


class DueLoop(ABC, Generic[J]):
    """Runs jobs when they are due, in seconds of `Clock.elapsed`; how they are kept in order is the subclass's.

    `look_again` (s) bounds how long a jump of the wall clock goes unnoticed.
    """

    def __init__(self, clock: Clock, *, look_again: float = LOOK_AGAIN) -> None:
        self._clock = clock
        self._look_again = look_again
        self._changed = asyncio.Event()

    @abstractmethod
    def _soonest(self) -> float | None:
        """When the first job is due; `None` when there is none."""

    @abstractmethod
    def _take(self) -> J:
        """Take out the first job."""

    def _scheduled(self, at: float) -> None:
        """Wake the loop if what was just scheduled is due first."""
        if self._soonest() == at:
            self._changed.set()

    async def run(self, work: Callable[[J], Coroutine[Any, Any, None]], *, limit: int) -> None:
        """Run every job when it is due, at most `limit` at a time, until cancelled."""
        slots = asyncio.Semaphore(limit)
        async with asyncio.TaskGroup() as group:
            while True:
                job = await self._next()
                await slots.acquire()
                group.create_task(_run_one(work, job)).add_done_callback(lambda _: slots.release())

    async def _next(self) -> J:
        while True:
            now, soonest = self._clock.elapsed(), self._soonest()
            if soonest is not None and soonest <= now:
                return self._take()
            self._changed.clear()
            try:
                async with asyncio.timeout(None if soonest is None else min(soonest - now, self._look_again)):
                    await self._changed.wait()
            except TimeoutError:
                pass


async def _run_one(work: Callable[[J], Coroutine[Any, Any, None]], job: J) -> None:
    """One job. What it cannot do is its own failure, and ends neither the loop nor the node."""
    try:
        await work(job)
    except PlasmError as error:
        log.warning("what was due for %r failed: %s", job, error)


class DueQueue(DueLoop[K]):
    """Jobs by the time at which they are due; one due time a job. Each change is O(log n): nothing is ever rebuilt."""

    def __init__(self, clock: Clock, *, look_again: float = LOOK_AGAIN) -> None:
        super().__init__(clock, look_again=look_again)
        self._due: dict[K, tuple[float, int]] = {}
        self._in_order: SortedList[tuple[float, int, K]] = SortedList()  # the numbers differ: no jobs are compared
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, job: K) -> bool:
        return job in self._due

    def schedule(self, job: K, delay: float) -> None:
        """Make the job due in `delay` seconds, whenever it was due before."""
        self.cancel(job)
        at, number = self._due[job] = (self._clock.elapsed() + delay, next(self._numbers))
        self._in_order.add((at, number, job))
        self._scheduled(at)

    def cancel(self, job: K) -> None:
        """Forget the job; one that is running goes on."""
        due = self._due.pop(job, None)
        if due is not None:
            self._in_order.remove((*due, job))

    def due_in(self, job: K) -> float | None:
        """Seconds until the job is due; `None` when it is not in the queue."""
        due = self._due.get(job)
        return None if due is None else due[0] - self._clock.elapsed()

    def _soonest(self) -> float | None:
        return self._in_order[0][0] if self._in_order else None

    def _take(self) -> K:
        _, _, job = self._in_order.pop(0)
        del self._due[job]
        return job
