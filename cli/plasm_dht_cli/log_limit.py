"""A log in which no kind of line drowns the others: of each the first few a minute are said, the rest is counted.

When all neighbours are dead, every retry of every record has something to say. Errors are always said, and so is the
first line of a kind in a minute, with nine more.
"""

import logging
import re
import threading
from collections.abc import Callable
from typing import TextIO

from plasm_dht.clock import Clock

# Lines of one kind that are said in so many seconds: a start with ten records is told in full.
KEPT, PER = 10, 60.0
# Kinds that are told apart; beyond it a format that says nothing itself counts as one.
MAX_KINDS = 1000
# The timer is this much late, so that the minute is over whichever clock it looked at (s).
LATE = 0.1

Kind = tuple[str, int, str]  # logger, level, format

_PLACEHOLDER = re.compile(r"%(?:\.\d+)?[a-z%]")


class Window:
    """One kind's minute: until when (monotonic s), how many lines were said and held back, and the last of those."""

    __slots__ = ("ends", "held", "last", "said")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.said = self.held = 0
        self.last: logging.LogRecord | None = None


def _in_a_thread(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Says `KEPT` lines of one kind in `PER` seconds, then once how many more there were.

    `monotonic` tells the time (s), `later(seconds, act)` has something done later; both as a test likes them.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        monotonic: Callable[[], float] | None = None,
        later: Callable[[float, Callable[[], None]], None] = _in_a_thread,
    ) -> None:
        super().__init__(stream)
        self._monotonic = monotonic or Clock().monotonic
        self._later = later
        self._windows: dict[Kind, Window] = {}  # in the order of their ends, since all are as long

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, or count it. Called with the lock held, as every handler is."""
        now = self._monotonic()
        self._end(now)
        if record.levelno >= logging.ERROR:
            super().emit(record)
            return
        kind = self._kind(record)
        window = self._windows.get(kind)
        if window is None:
            window = self._windows[kind] = Window(now + PER)
        if window.said < KEPT:
            window.said += 1
            super().emit(record)
            return
        if window.held == 0:
            self._later(window.ends - now + LATE, self.end_minutes)
        window.held += 1
        window.last = record

    def end_minutes(self) -> None:
        """Say what was held back in the minutes that are over."""
        self.acquire()
        try:
            self._end(self._monotonic())
        finally:
            self.release()

    def close(self) -> None:
        """Say what was held back so far, and stop."""
        self.acquire()
        try:
            self._end(float("inf"))
        finally:
            self.release()
        super().close()

    def _end(self, now: float) -> None:
        while self._windows:
            kind, window = next(iter(self._windows.items()))
            if window.ends > now:
                return
            del self._windows[kind]
            if window.last is not None:
                super().emit(_summary(window.held, window.last))

    def _kind(self, record: logging.LogRecord) -> Kind:
        says = str(record.msg)
        if not re.search(r"\w", _PLACEHOLDER.sub("", says)) and len(self._windows) < MAX_KINDS:
            says = record.getMessage()  # `%s: %s` is no kind
        return record.name, record.levelno, says


def _summary(held: int, last: logging.LogRecord) -> logging.LogRecord:
    return logging.LogRecord(
        last.name,
        last.levelno,
        last.pathname,
        last.lineno,
        "… and %d more like this in the last minute, the last of them: %s",
        (held, last.getMessage()),
        None,
    )
