"""What a publisher means to say about a name, who has been told, and what came of telling them. Data, no behaviour."""

from collections import Counter, deque
from dataclasses import dataclass, field

from plasm_dht.dht.ids import Address
from plasm_dht.dht.routing import Contact
from plasm_dht.record import Record, Value

# Sequence numbers of ours that are remembered, to tell them from another node's with the same key.
SIGNED_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Publication:
    """The receipt of a publish.

    Attributes:
        name: what was published.
        seq: the record's sequence number.
        expires_at: Unix ms.
        stored: how many other nodes acknowledged it, under either key; 0 when it is only kept locally so far.
        refused: how many refused it, by reason.
    """

    name: str
    seq: int
    expires_at: int
    stored: int
    refused: dict[str, int]


@dataclass(slots=True)
class Holder:
    """A node that acknowledged the record of this `seq`, and may have it alive until `until` (Unix ms)."""

    contact: Contact
    seq: int
    until: int


@dataclass(slots=True)
class Intent:
    """What this node means to say about one name, and who has been told."""

    name: str
    value: Value = b""
    ttl: float = 0.0
    withdrawn: bool = True
    kept_alive: bool = False
    # Whether the network was asked what this identity has published there before.
    continued: bool = False
    last_seq: int = 0
    # When the last record was signed, in seconds of `Clock.elapsed`: its refresh is due so long after.
    signed_at: float = 0.0
    signed: deque[int] = field(default_factory=lambda: deque(maxlen=SIGNED_REMEMBERED))
    # The latest end of life that was ever signed (Unix ms): a tombstone lives as long.
    latest_end: int = 0
    # The end of life (Unix ms) of the last record that enough holders acknowledged.
    acknowledged_end: int = 0
    record: Record | None = None
    stored: int = 0
    holders: dict[bytes, dict[Address, Holder]] = field(default_factory=dict)


@dataclass(slots=True)
class Round:
    """What came of storing one signed record."""

    record: Record
    enough: bool = True
    answered: int = 0
    told: set[Address] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    samples: list[int] = field(default_factory=list)
    mistimed: list[int] = field(default_factory=list)
    newer: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a record that is kept alive stands: `expires_at` in Unix ms, `refresh_in` in seconds (`None`: right now).

    `holders` is how many other nodes acknowledged it when it was last published.
    """

    seq: int
    expires_at: int
    refresh_in: float | None
    holders: int
