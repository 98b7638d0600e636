"""Runs a service until a signal ends it: the first one stops it cleanly, the second at once. SIGHUP reloads it."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from plasm_dht.errors import PlasmError
from plasm_dht_cli import loop
from plasm_dht_cli.notify import Notifier, watchdog_interval
from plasm_dht_cli.output import emit

if TYPE_CHECKING:
    from plasm_dht.config import Change, Settings

# How often the status line is brought up to date where no watchdog asks more often (s).
STATUS_EVERY = 10.0

_log = logging.getLogger(__name__)


class Control:
    """What ties a service to whoever runs it: the ready line, the service manager, SIGHUP.

    Args:
        read: reads the settings again; raises `ConfigError`.
    """

    def __init__(self, read: "Callable[[], Settings]") -> None:
        self._read = read
        self._notifier = Notifier()
        self._asked = asyncio.Event()
        self._started = asyncio.Event()
        self._status: Callable[[], str] = str
        self._apply: Callable[[Settings], Awaitable[Change]] | None = None
        self._stopping = False

    def ready(
        self,
        line: tuple[str, str, str],
        *,
        status: Callable[[], str],
        apply: "Callable[[Settings], Awaitable[Change]]",
    ) -> None:
        """Say that the service is ready.

        `line`: what `announce` takes. `status`: a line for people. `apply` takes over what can change of settings.
        """
        announce(*line)
        self._status, self._apply = status, apply
        self._notifier.ready(status())
        self._started.set()

    def ask(self) -> None:
        """Have the settings read again, as soon as the service is ready."""
        self._asked.set()

    def stopping(self) -> None:
        """The service has begun to stop."""
        if not self._stopping:
            self._stopping = True
            self._notifier.stopping("stopping")

    async def run(self) -> None:
        """Reload when asked, and tell the service manager how it is, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._reload_when_asked())
                if self._notifier.listens:
                    group.create_task(self._tell())
        finally:
            self.stopping()
            self._notifier.close()

    async def _tell(self) -> None:
        within = watchdog_interval()
        while True:
            await asyncio.sleep(STATUS_EVERY if within is None else min(within / 2, STATUS_EVERY))
            if within is not None:
                self._notifier.alive(self._now())
            elif self._apply is not None:
                self._notifier.status(self._now())

    def _now(self) -> str:
        return "stopping" if self._stopping else self._status() if self._apply else "starting"

    async def _reload_when_asked(self) -> None:
        await self._started.wait()
        assert self._apply is not None  # noqa: S101  # it has started
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._stopping:
                return
            self._notifier.reloading(asyncio.get_running_loop().time())
            try:
                _report(await self._apply(await asyncio.to_thread(self._read)))
            except PlasmError as error:
                _log.error("the old settings stay: %s", error)  # one line
            self._notifier.ready(self._now())


def run_until_stopped(service: Callable[[], Coroutine[Any, Any, None]], control: Control | None = None) -> None:
    """Run the service until it returns, raises, or is told to stop by SIGTERM or SIGINT.

    The first signal cancels it, so that its `async with` blocks end as they do; then this returns. With a `control`
    SIGHUP has the settings read again; when the terminal that it was started in has gone, it stops the service.
    """
    loop.run(_supervise(service, control))


def announce(dht: str, http: str, publisher: str) -> None:
    """Print the line that scripts and service managers wait for."""
    emit(f"ready dht={dht} http={http} publisher={publisher}")


async def _supervise(service: Callable[[], Coroutine[Any, Any, None]], control: Control | None) -> None:
    signals = asyncio.get_running_loop()
    task = asyncio.ensure_future(service())
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        _log.info("%s: stopping; a second signal ends it at once", signal.Signals(number).name)
        if control is not None:
            control.stopping()
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        signals.add_signal_handler(number, stop, number)
    running = None
    if control is not None:
        in_terminal = _has_terminal()

        def hang_up() -> None:
            if in_terminal and not _has_terminal():
                stop(signal.SIGHUP)
            else:
                control.ask()

        signals.add_signal_handler(signal.SIGHUP, hang_up)
        running = asyncio.ensure_future(control.run())
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
    finally:
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def _has_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


def _report(change: "Change") -> None:
    from plasm_dht.config import shown

    if change.applied:
        _log.info("settings changed: %s", ", ".join(shown(change.settings, key) for key in change.applied))
    if change.later:
        _log.warning(
            "not changed before a restart: %s",
            ", ".join(f"{shown(change.settings, key)} (read: {shown(change.read, key)})" for key in change.later),
        )
    if not change.applied and not change.later:
        _log.info("the settings were read again: nothing has changed")
