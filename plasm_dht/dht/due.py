"""What is due when: a heap of due times with lazy deletion, and the loop that runs the jobs. It knows no network."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from plasm_dht.clock import Clock

# A wall clock that jumps cannot wake us, so it is looked at this often (s): what a suspend or a clock step made overdue
# waits no longer than this.
LOOK_AGAIN = 5.0

K = TypeVar("K", bound=Hashable)


class DueQueue(Generic[K]):
    """Jobs by the time at which they are due, in seconds of `Clock.elapsed`; one due time a job.

    `look_again` (s) bounds how long a jump of the wall clock goes unnoticed.
    """

    def __init__(self, clock: Clock, *, look_again: float = LOOK_AGAIN) -> None:
        self._clock = clock
        self._look_again = look_again
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # lazily deleted: an entry counts only if `_due` agrees
        self._order = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, job: K) -> bool:
        return job in self._due

    def schedule(self, job: K, delay: float) -> None:
        """Make the job due in `delay` seconds, whenever it was due before."""
        at = self._clock.elapsed() + delay
        self._due[job] = at
        if len(self._heap) > 2 * len(self._due) + 64:  # deleted entries must not pile up
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (at, next(self._order), job))
        if self._heap[0][2] == job:
            self._changed.set()

    def cancel(self, job: K) -> None:
        """Forget the job; one that is running goes on."""
        self._due.pop(job, None)

    def due_in(self, job: K) -> float | None:
        """Seconds until the job is due; `None` when it is not in the queue."""
        at = self._due.get(job)
        return None if at is None else at - self._clock.elapsed()

    async def run(self, work: Callable[[K], Coroutine[Any, Any, None]], *, limit: int) -> None:
        """Run every job when it is due, at most `limit` at a time, until cancelled."""
        slots = asyncio.Semaphore(limit)
        async with asyncio.TaskGroup() as group:
            while True:
                job = await self._next()
                await slots.acquire()
                group.create_task(work(job)).add_done_callback(lambda _: slots.release())

    async def _next(self) -> K:
        while True:
            now = self._clock.elapsed()
            while self._heap:
                at, _, job = self._heap[0]
                if self._due.get(job) != at:
                    heapq.heappop(self._heap)
                elif at <= now:
                    heapq.heappop(self._heap)
                    del self._due[job]
                    return job
                else:
                    break
            self._changed.clear()
            try:
                async with asyncio.timeout(min(self._heap[0][0] - now, self._look_again) if self._heap else None):
                    await self._changed.wait()
            except TimeoutError:
                pass
