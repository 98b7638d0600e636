"""What a target must never do: log an error or a traceback, forge a log line, lose an exception, leave a task."""

import asyncio
import gc
import logging
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from tests.virtual.loop import VirtualLoop

T = TypeVar("T")
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
        self._levels: dict[str, int] = {}
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
            self._levels[name] = logger.level
            logger.setLevel(logging.DEBUG if name == "plasm_dht" else logging.INFO)
            logger.addHandler(self)
            logger.propagate = False
        self._hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: self.problems.append(f"lost: {lost.exc_value!r} {lost.err_msg}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, level in self._levels.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.removeHandler(self)
            logger.propagate = True
        sys.unraisablehook = self._hook


class Stage:
    """A virtual-time loop that is run step by step, under guard. A subclass builds what is fuzzed on it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.guard = Guard()
        self.guard.__enter__()
        self.loop = loop
        loop.set_exception_handler(self.guard.lost)

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
