"""The scheduler: which record is refreshed when, and when one that failed is tried again. It knows no network."""

import random
from collections.abc import Awaitable, Callable

from plasm_dht.clock import Clock
from plasm_dht.dht.due import DueQueue

# Part of the interval by which a refresh may be early, so that many records do not fire at once.
EARLY = 0.05
# First and longest wait before a failed refresh is tried again (s).
RETRY_FIRST, RETRY_LONGEST = 5.0, 60.0
# No wait is shorter (s): half of what is left, again and again, would never end.
RETRY_LEAST = 0.2
# Refreshes under way at once.
LIMIT = 16


def retry_delay(failures: int, left: float) -> float:
    """Seconds to wait after the given number of failures in a row (1, 2, …) with `left` seconds of the record's life.

    The smaller of 5 s and a quarter of what is left, doubling to 60 s, never more than half of what is left.
    """
    first = RETRY_FIRST if left <= 0 else min(RETRY_FIRST, left / 4)
    delay = min(first * 2.0 ** min(failures - 1, 16), RETRY_LONGEST)
    return max(delay if left <= 0 else min(delay, left / 2), RETRY_LEAST)


class Refresher:
    """Calls `refresh(name)` when a record is due; whoever publishes reports with `succeeded` or `failed`."""

    def __init__(self, refresh: Callable[[str], Awaitable[object]], clock: Clock) -> None:
        self._refresh = refresh
        self._queue: DueQueue[str] = DueQueue(clock)
        self._failures: dict[str, int] = {}

    def succeeded(self, name: str, interval: float, took: float) -> None:
        """Refresh the name `interval` seconds after it was signed, `took` seconds ago, or up to 5 % earlier."""
        self._failures.pop(name, None)
        self._queue.schedule(name, max(interval * (1 - EARLY * random.random()) - took, RETRY_LEAST))

    def failed(self, name: str, left: float) -> float:
        """Try the name again; `left` seconds of the life of what is out there. Returns in how many seconds."""
        self._failures[name] = self._failures.get(name, 0) + 1
        delay = retry_delay(self._failures[name], left)
        self._queue.schedule(name, delay)
        return delay

    def cancel(self, name: str) -> None:
        """Refresh the name no more."""
        self._failures.pop(name, None)
        self._queue.cancel(name)

    def due_in(self, name: str) -> float | None:
        """Seconds until the name is refreshed; `None` when it is not scheduled."""
        return self._queue.due_in(name)

    async def run(self) -> None:
        """Refresh what is due, until cancelled."""
        await self._queue.run(self._run_one, limit=LIMIT)

    async def _run_one(self, name: str) -> None:
        await self._refresh(name)
