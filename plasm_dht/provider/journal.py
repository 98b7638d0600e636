"""What happened lately, for the page for people: a few lines in memory, the oldest forgotten first."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Lines that are kept. The page shows all of them.
SIZE = 40

Kind = Literal["published", "changed", "refreshed", "failed", "withdrawn", "neighbour"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened `at` a moment (Unix ms). `count`: how many like it in a row, of which it is the last."""

    at: int
    kind: Kind
    subject: str
    text: str
    count: int = 1


class Journal:
    """The last events, newest first. `now` tells Unix ms."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self._events: deque[Event] = deque(maxlen=SIZE)

    @property
    def events(self) -> list[Event]:
        """Newest first."""
        return list(self._events)

    def note(self, kind: Kind, subject: str, text: str = "") -> None:
        """Write it down. Neighbours that come one after the other are one line: a start may bring hundreds."""
        count = 1
        if kind == "neighbour" and self._events and self._events[0].kind == kind:
            count += self._events.popleft().count
        self._events.appendleft(Event(self._now(), kind, subject, text, count))
