"""Runs a coroutine as `asyncio.run` does, but waits for no resolver at the end.

asyncio asks the system's resolver in threads that it joins before the process ends: one that hangs for half a minute
would hold up a deadline of two seconds, and a clean stop.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Loop(asyncio.SelectorEventLoop):
    """asyncio's own event loop, with a thread for each question to the resolver that ends with the process."""

    async def getaddrinfo(self, host: Any, port: Any, *, family: int = 0, type: int = 0, **more: int) -> Any:  # noqa: A002
        """As `socket.getaddrinfo`."""
        answer: asyncio.Future[Any] = self.create_future()

        def tell(take: Callable[[Any], None], what: Any) -> None:
            if not answer.done():
                take(what)

        def ask() -> None:
            take: Callable[[Any], None] = answer.set_result
            try:
                what: Any = socket.getaddrinfo(host, port, family, type, **more)
            except Exception as error:  # noqa: BLE001  # an error that ends the thread would leave who asked waiting
                take, what = answer.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.call_soon_threadsafe(tell, take, what)

        threading.Thread(target=ask, daemon=True).start()
        return await answer


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run it to its end."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main)
