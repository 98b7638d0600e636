"""What a node counts about itself, in plain integers. It knows no exposition format, and reads no clock.

Whoever does something counts it here; whoever wants to know reads it when it likes. No key comes from the network: what
others say is counted under a name from a fixed list, or as `other`.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from plasm_dht.dht.wire import Stored

# Why a store is refused (the contract, "What a node accepts").
REFUSALS = (
    "too_large",
    "malformed",
    "wrong_key",
    "clock",
    "expired",
    "ttl_too_long",
    "stale",
    "unverified",
    "bad_signature",
    "conflict",
    "full",
)
# What else may become of a store: of ours no answer, or a refusal whose reason nobody knows.
ACCEPTED, NO_ANSWER, OTHER = "accepted", "no_answer", "other"
# Why a datagram is not answered, nor taken for an answer.
DROPS = ("size", "type", "malformed", "rate_limit", "busy", "unasked", "network_error")
# What became of a lookup.
FOUND, NOT_FOUND = "found", "not_found"

# Upper bounds of what is measured (s): from a LAN to the longest that a time-out allows (3 s), and a lookup (10 s).
ROUND_TRIP_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LOOKUP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Durations:
    """How many durations were at most as long as each bound, and how long all were together (s)."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # each between two bounds; the last: longer than all
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


@dataclass(frozen=True, slots=True)
class Advertised:
    """How what this node keeps alive stands.

    Attributes:
        records: how many names.
        failing: of how many the last round was not acknowledged by enough holders.
        ends: when the first of them ends by what holders have acknowledged (Unix ms, 0: none has); `None` without any.
        owed: stores of a change that are asked for again until they are acknowledged.
    """

    records: int = 0
    failing: int = 0
    ends: int | None = None
    owed: int = 0


def _none(names: Iterable[str]) -> Callable[[], Counter[str]]:
    """All of them are there from the start, or the first of a kind would not show as an increase."""
    return lambda: Counter(dict.fromkeys(names, 0))


@dataclass(slots=True)
class Stats:
    """Counts since the start.

    Attributes:
        received, sent, dropped: datagrams; the dropped by reason.
        stores_received: stores of others, by `accepted` or why we refused.
        stores_sent: our stores at others, by `accepted`, `no_answer`, or why they refused.
        rounds_done, rounds_failed: times that a record was published or refreshed, and enough holders acknowledged it
            or did not.
        readings, lookups: how long looking up a name (all of its keys) and a single key took, by what came of it.
        round_trips: from request to answer, of those that needed no resend.
        advertised: asks the publisher how its records stand.
    """

    received: int = 0
    sent: int = 0
    dropped: Counter[str] = field(default_factory=_none(DROPS))
    stores_received: Counter[str] = field(default_factory=_none((ACCEPTED, *REFUSALS)))
    stores_sent: Counter[str] = field(default_factory=_none((ACCEPTED, NO_ANSWER, *REFUSALS, OTHER)))
    rounds_done: int = 0
    rounds_failed: int = 0
    readings: dict[str, Durations] = field(
        default_factory=lambda: {each: Durations(LOOKUP_BOUNDS) for each in (FOUND, NOT_FOUND, NO_ANSWER)}
    )
    lookups: dict[str, Durations] = field(
        default_factory=lambda: {each: Durations(LOOKUP_BOUNDS) for each in (FOUND, NO_ANSWER)}
    )
    round_trips: Durations = field(default_factory=lambda: Durations(ROUND_TRIP_BOUNDS))
    advertised: Callable[[], Advertised] = Advertised

    def note_round(self, enough: bool) -> None:
        """Count a round of storing what is kept alive."""
        self.rounds_done += enough
        self.rounds_failed += not enough

    def note_store(self, answered: bool, stored: Stored | None) -> None:
        """Count a store of ours by what the holder said."""
        if stored is None:
            self.stores_sent[OTHER if answered else NO_ANSWER] += 1
        else:
            self.stores_sent[ACCEPTED if stored.ok else refusal(stored.reason)] += 1


def refusal(reason: str | None) -> str:
    """The reason that another node gave, if it is one of the contract's."""
    return reason if reason in REFUSALS else OTHER


def counted(number: int, what: str) -> str:
    """`1 record`, `2 records`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
