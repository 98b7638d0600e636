"""A node that a lookup may ask, and who named it. Data, no behaviour."""

import asyncio

from plasm_dht.dht.routing import Contact
from plasm_dht.record import Record


class Namer:
    """A responder, and how many more of the nodes that it named are asked before one of them has answered as named."""

    __slots__ = ("credit",)

    def __init__(self, credit: int) -> None:
        self.credit = credit


class Candidate:
    """A node that a lookup may ask, ordered by its distance to the target."""

    __slots__ = (
        "answered",
        "asked",
        "contact",
        "distance",
        "envelopes",
        "failed",
        "holds_place",
        "namers",
        "shown",
        "silent",
        "slow",
        "stale",
        "timer",
    )

    def __init__(self, contact: Contact, distance: int, *, stale: bool) -> None:
        self.contact = contact
        self.distance = distance
        self.stale = stale
        self.asked = self.answered = self.failed = self.slow = self.silent = False
        self.holds_place = False  # among the alpha in flight
        self.namers: list[Namer] | None = None  # of one that has said its id: nobody
        # By publisher what it holds, of what we could verify.
        self.envelopes: dict[bytes, Record] = {}
        self.shown = 0  # envelopes, those that we could not verify too
        self.timer: asyncio.TimerHandle | None = None

    def __lt__(self, other: "Candidate") -> bool:
        return self.distance < other.distance
