"""Runs a service until a signal ends it: the first one stops it cleanly, the second at once."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from plasm_dht_cli.output import emit

_log = logging.getLogger(__name__)


def run_until_stopped(service: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the service until it returns, raises, or is told to stop by SIGTERM or SIGINT.

    The first signal cancels it, so that its `async with` blocks end as they do; then this returns.
    """
    asyncio.run(_supervise(service))


def announce(dht: str, http: str, publisher: str) -> None:
    """Print the line that scripts and service managers wait for."""
    emit(f"ready dht={dht} http={http} publisher={publisher}")


async def _supervise(service: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(service())
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        _log.info("%s: stopping; a second signal ends it at once", signal.Signals(number).name)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
