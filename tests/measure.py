"""What a process takes: memory, and how long anything holds it up."""

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path


class Pauses:
    """The longest of what is timed (ms), by name: on the wall, and of this thread's processor time.

    The second is what the process itself took, collecting garbage included: the first is longer whenever another one
    had the processor.
    """

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Time what is done inside."""
        cpu, wall = time.thread_time(), time.perf_counter()
        yield
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        self.wall[what] = max(self.wall.get(what, 0), round(wall * 1000, 2))
        self.cpu[what] = max(self.cpu.get(what, 0), round(cpu * 1000, 2))

    @asynccontextmanager
    async def turns(self, what: str) -> AsyncIterator[None]:
        """Time every turn of the event loop meanwhile."""
        ticking = asyncio.ensure_future(self._tick(what))
        try:
            yield
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def _tick(self, what: str) -> None:
        while True:
            with self.timed(what):
                await asyncio.sleep(0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
