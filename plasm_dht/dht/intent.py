"""What a publisher means to say about a name, who has been told, and what came of telling them. No network."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from plasm_dht.dht.ids import Address
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.stats import REFUSALS, Advertised, counted
from plasm_dht.identity import Identity
from plasm_dht.record import MAX_SEQ, MAX_TTL, Record, Value, sign

# Sequence numbers of ours that are remembered, to tell them from another node's with the same key: this many, and
# more while too few holders acknowledge any.
SIGNED_REMEMBERED, SIGNED_IN_VAIN = 16, 1024
# Holders of one key that have to acknowledge, if that many neighbours answered.
LEAST_HOLDERS = 3
# A tombstone lives at least this long (ms).
LEAST_TOMBSTONE = 1000


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
    signed: deque[int] = field(default_factory=lambda: deque(maxlen=SIGNED_IN_VAIN))
    # The latest end of life that was ever signed (Unix ms): a tombstone lives as long.
    latest_end: int = 0
    # The end of life (Unix ms) of the last record that enough holders acknowledged.
    acknowledged_end: int = 0
    record: Record | None = None
    # The last record of ours that enough holders acknowledged since the value was last said, and the newest live one
    # that another host has signed with the same key.
    told: Record | None = None
    rival: Record | None = None
    stored: int = 0
    # Whether too few holders acknowledged the last round, and what they said to it.
    failing: bool = False
    said: str = ""
    holders: dict[bytes, dict[Address, Holder]] = field(default_factory=dict)

    @property
    def stands_by(self) -> bool:
        """Whether what another host has said later with the same key stands for the name, and not the own value."""
        return self.record is not None and self.record is self.rival

    @property
    def superseding(self) -> Record | None:
        """The rival, when it was signed after what enough holders know of us."""
        if self.rival is None or self.told is None or self.rival.withdrawn or self.rival.rank < self.told.rank:
            return None
        return self.rival

    def sign(self, identity: Identity, now: int, elapsed: float) -> Record:
        """A record of what is meant at this moment (`now` in Unix ms, `elapsed` in s), above every earlier one."""
        end = now + int(self.ttl * 1000)
        if self.withdrawn:
            # No longer than holders accept: our clock may have gone back, or liars had us sign for a far future.
            end = min(max(self.latest_end, now + LEAST_TOMBSTONE), now + MAX_TTL * 1000)
        record = sign(
            identity,
            self.name,
            self.value,
            seq=min(max(self.last_seq + 1, now), MAX_SEQ),
            issued_at=now,
            expires_at=end,
            withdrawn=self.withdrawn,
        )
        self.record, self.last_seq, self.signed_at = record, record.seq, elapsed
        self.signed.append(record.seq)
        self.latest_end = max(self.latest_end, end)
        return record

    def acknowledged(self, key: bytes, record: Record) -> set[Address]:
        """Who acknowledged this record, or a later one, under the key."""
        return {address for address, holder in self.holders.get(key, {}).items() if holder.seq >= record.seq}

    def note_holder(self, key: bytes, contact: Contact, record: Record) -> None:
        """Note that a node acknowledged the record under the key."""
        known = self.holders[key].get(contact.address)
        if known is None or known.seq <= record.seq:
            self.holders[key][contact.address] = Holder(contact, record.seq, record.expires_at)

    def forget_holders(self, now: int) -> None:
        """Forget whose record has ended by `now` (Unix ms)."""
        for holders in self.holders.values():
            for address in [address for address, holder in holders.items() if holder.until <= now]:
                del holders[address]


@dataclass(slots=True)
class Round:
    """What came of storing one signed record."""

    record: Record
    enough: bool = True
    asked: int = 0
    answered: int = 0
    told: set[Address] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    samples: list[int] = field(default_factory=list)
    # The clocks of those who refused it for its time, by reason; and the key and the address of each.
    mistimed: dict[str, list[int]] = field(default_factory=lambda: {"clock": [], "expired": []})
    contradicting: set[tuple[bytes, Address]] = field(default_factory=set)
    newer: list[bytes] = field(default_factory=list)

    def is_enough(self, key: bytes, near: set[Address], acknowledged: set[Address]) -> bool:
        """Whether enough of the neighbours near the key acknowledged the record: three, or all where there are fewer.

        Who contradicts its time need not, while no more do so than acknowledge it: somebody's clock is wrong.
        """
        told = len(near & acknowledged)
        mistaken = sum((key, address) in self.contradicting for address in near - acknowledged)
        return told >= LEAST_HOLDERS or (told >= max(mistaken, 1) and told + mistaken == len(near))

    @property
    def is_contradicted(self) -> bool:
        """Whether few hold it, and somebody's clock is why."""
        return bool(self.contradicting) and len(self.told) < LEAST_HOLDERS

    def __str__(self) -> str:
        if not self.asked:
            return "nobody was asked, for no neighbour answers"
        refused = Counter(reason if reason in REFUSALS else "other" for reason in self.refused.elements())
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.most_common())
        return (
            f"of {counted(self.asked, 'store')} {self.answered - refused.total()} acknowledged, "
            f"{refused.total()} refused{f' ({reasons})' if reasons else ''}, {self.asked - self.answered} not answered"
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """How a record that is kept alive stands: `expires_at` in Unix ms, `refresh_in` in seconds (`None`: right now).

    `holders` is how many other nodes acknowledged it when it was last published.
    """

    seq: int
    expires_at: int
    refresh_in: float | None
    holders: int


def advertised(intents: Iterable[Intent], owed: int) -> Advertised:
    """How what is kept alive stands, with so many stores owed."""
    alive = [intent for intent in intents if intent.kept_alive and intent.record is not None]
    ends = (each.rival.expires_at if each.rival and each.stands_by else each.acknowledged_end for each in alive)
    return Advertised(len(alive), sum(intent.failing for intent in alive), min(ends, default=None), owed)
