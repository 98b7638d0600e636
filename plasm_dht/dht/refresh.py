"""The scheduler: which record is refreshed when, and when one that failed is tried again. It knows no network."""

import logging
import random
from collections.abc import Awaitable, Callable

from plasm_dht.clock import Clock
from plasm_dht.dht.due import DueQueue
from plasm_dht.dht.intent import Intent
from plasm_dht.dht.stats import counted
from plasm_dht.errors import PlasmError
from plasm_dht.record import REFRESH_AT

log = logging.getLogger(__name__)

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
        self._clock = clock
        self._queue: DueQueue[str] = DueQueue(clock)
        self._failures: dict[str, int] = {}

    def after_round(self, intent: Intent, interval: float, *, enough: bool, took: float) -> None:
        """Schedule the next refresh: in time, or soon when too few holders acknowledged this one."""
        if enough:
            if failures := self._failures.get(intent.name):
                log.info("%r is refreshed again, after %s", intent.name, counted(failures, "failure"))
            signed = intent.record
            if signed is not None and signed.expires_at - signed.issued_at < int(intent.ttl * 1000):
                # signed before its life was made longer: what is out there has to be refreshed in its own time
                interval = min(interval, (signed.expires_at - signed.issued_at) / 1000 * REFRESH_AT)
            self.succeeded(intent.name, interval, took)
            return
        # Of what holders know; once that is over, of what this node itself still shows whoever asks it.
        now = self._clock.now()
        end = intent.acknowledged_end
        if end <= now and intent.record is not None:
            end = intent.record.expires_at
        left = (end - now) / 1000
        delay = self.failed(intent.name, left)
        log.warning(
            "%r was not refreshed: too few holders acknowledged it (%s); %s; next try in %.1f s",
            intent.name,
            intent.said,
            f"what is held expires in {left:.0f} s" if left > 0 else "nothing of it is held",
            delay,
        )

    def change(self, intent: Intent, interval: float, *, may_delay: bool) -> None:
        """Refresh what is scheduled `interval` seconds after it was signed; later than planned only if it `may_delay`.

        What failed is not delayed. What is being published just now is scheduled when that is done.
        """
        planned = self.due_in(intent.name)
        if planned is None:
            return
        delay = max(interval * (1 - EARLY * random.random()) - (self._clock.elapsed() - intent.signed_at), RETRY_LEAST)
        if not may_delay or intent.name in self._failures:
            delay = min(delay, planned)
        self._queue.schedule(intent.name, delay)

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
        try:
            await self._refresh(name)
        except PlasmError:
            self.failed(name, 0.0)  # else it would never be refreshed again
            raise
