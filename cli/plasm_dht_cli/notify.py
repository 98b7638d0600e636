"""What systemd is told (sd_notify(3)): ready, reloading, stopping, a status line, and that the service is alive.

Outside a service manager that listens (no `NOTIFY_SOCKET`) nothing is imported and nothing is sent.
"""

import logging
import os
from typing import TYPE_CHECKING

from plasm_dht_cli.output import printable

if TYPE_CHECKING:
    from sdnotify import SystemdNotifier

# A manager that does not read holds up the event loop no longer than this (s).
SEND_WITHIN = 1.0

_log = logging.getLogger(__name__)


class Notifier:
    """Tells the service manager, if there is one that listens. Never raises for want of it."""

    def __init__(self) -> None:
        self._notifier = _connect()

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return self._notifier is not None

    def ready(self, status: str) -> None:
        """The service has started, or has done what a reload asked for."""
        self._send("READY=1", f"STATUS={_line(status)}")

    def reloading(self, now: float) -> None:
        """The configuration is being read again; `ready` ends it. `now`: monotonic time (s)."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(now * 1_000_000)}", "STATUS=reading the configuration again")

    def stopping(self, status: str) -> None:
        """The service has begun to stop."""
        self._send("STOPPING=1", f"STATUS={_line(status)}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self._send(f"STATUS={_line(text)}")

    def alive(self, status: str) -> None:
        """The service is alive: without this the watchdog ends it."""
        self._send("WATCHDOG=1", f"STATUS={_line(status)}")

    def close(self) -> None:
        """Close the socket."""
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _send(self, *lines: str) -> None:
        if self._notifier is None:
            return
        try:
            self._notifier.notify("\n".join(lines))
        except OSError as error:
            _log.warning("the service manager cannot be told %s: %s", lines[0], error)


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants to hear from this process; `None`: it does not."""
    microseconds, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if process is not None and process != str(os.getpid()):
        return None  # meant for the process that started this one
    if not (microseconds.isascii() and microseconds.isdigit()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 1_000_000


def _connect() -> "SystemdNotifier | None":
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return None
    from sdnotify import SystemdNotifier

    try:
        notifier = SystemdNotifier(debug=True)  # debug: raise what goes wrong
    except OSError as error:
        _log.warning("NOTIFY_SOCKET is %r, where nobody listens: %s", address, error)
        return None
    notifier.socket.settimeout(SEND_WITHIN)
    return notifier


def _line(text: str) -> str:
    """The text as the library can send it: one line of ASCII."""
    return printable(text).encode("ascii", "backslashreplace").decode()
