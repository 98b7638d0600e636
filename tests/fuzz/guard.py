"""What a target must never do.

Log an error or a traceback, forge a log line, lose an exception, leave a task, or block the loop.
"""

import asyncio
import gc
import logging
import math
import sys
import tracemalloc
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from time import thread_time
from types import TracebackType
from typing import Any, TypeVar

from tests.virtual.loop import VirtualLoop

T = TypeVar("T")
# The CPU time of one turn of the loop (s), in which a node is deaf. Not wall time: the machine may have more to do.
BLOCKED_AFTER = 0.02
LOGGERS = ("plasm_dht", "aiohttp", "asyncio")


class FoundError(AssertionError):
    """The fuzzer has found something."""


def require(condition: object, problem: str) -> None:
    """Fail with the problem unless the condition holds."""
    if not condition:
        raise FoundError(problem)


class Guard(logging.Handler, AbstractContextManager["Guard"]):
    """Notes what was logged, and what was lost on the loop or by the collector, until `check` is asked."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.problems: list[str] = []
        self._hook = sys.unraisablehook

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info or record.levelno >= logging.ERROR:
            self.problems.append(f"logged: {message} {record.exc_info}")
        if not message.isprintable() or len(message) > 20_000:
            self.problems.append(f"a log line that the network has forged: {message[:500]!r}")

    def lost(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's exception handler."""
        self.problems.append(f"lost on the loop: {context.get('message')}: {context.get('exception')!r}")

    def check(self) -> None:
        """Fail with what was noted."""
        problems, self.problems = self.problems, []
        require(not problems, "\n".join(problems))

    def __enter__(self) -> "Guard":
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG if name == "plasm_dht" else logging.INFO)
            logger.addHandler(self)
            logger.propagate = False
        self._hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: self.problems.append(f"lost: {lost.exc_value!r} {lost.err_msg}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.NOTSET)  # not what it was: that may be of another guard, which is gone by then
            logger.removeHandler(self)
            logger.propagate = True
        sys.unraisablehook = self._hook


class WatchedLoop(VirtualLoop):
    """A virtual-time loop that tells of a turn that took too long, whatever a thread would have done aside."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = self.slow_callback_duration = math.inf  # the latter is of wall time
        self._aside = self._collecting = 0.0
        gc.callbacks.append(self._collected)

    def _run_once(self) -> None:
        self._aside, started = 0.0, thread_time()
        super()._run_once()
        took = thread_time() - started - self._aside
        if took > self.limit:
            self.call_exception_handler({"message": f"a turn of the loop took {took * 1000:.0f} ms"})

    def _execute(self, *work: Any) -> None:
        started = thread_time()
        super()._execute(*work)
        self._aside += thread_time() - started

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        """The collector's time is that of everything in the process, all tests included."""
        if phase == "start":
            self._collecting = thread_time()
        else:
            self._aside += thread_time() - self._collecting

    def close(self) -> None:
        gc.callbacks.remove(self._collected)
        super().close()


class Stage:
    """A virtual-time loop that is run step by step, under guard. A subclass builds what is fuzzed on it."""

    def __init__(self, loop: WatchedLoop) -> None:
        self.guard = Guard()
        self.guard.__enter__()
        self.loop = loop
        loop.set_exception_handler(self.guard.lost)

    def built(self) -> None:
        """All is imported and set up: from now on no turn may be long. Memory that is traced makes every one long."""
        self.loop.limit = math.inf if tracemalloc.is_tracing() else BLOCKED_AFTER

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Run it to its end, and look what went wrong meanwhile."""
        result = self.loop.run_until_complete(what)
        self.guard.check()
        return result

    async def settle(self) -> None:
        """Let everything that is ready run."""
        for _ in range(1000):
            await asyncio.sleep(0)
            if not self.loop._ready:
                return
        raise FoundError("the loop does not come to rest")

    def end(self) -> None:
        """Close the loop; whatever is left on it is a leak."""
        try:
            self.loop.run_until_complete(self.settle())
            left = asyncio.all_tasks(self.loop)
            gc.collect()
            self.guard.check()
            require(not left, f"tasks are left: {left}")
        finally:
            self.guard.__exit__(None, None, None)
            self.loop.close()
