"""TTL-aware storage: which records a node holds, admits, hands out and forgets. It verifies records, never senders.

A record ends at `expires_at` by the wall clock or at its deadline on the monotonic clock, whichever comes first: wall
time can be stepped, monotonic time stands still while a machine sleeps. The newest envelope of a publisher is kept
until the latest `expires_at` that was ever accepted from it for that key, so that an older record with a longer life
cannot come back after a newer, shorter one has expired.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kademlia.storage import IStorage
from sortedcontainers import SortedList

from plasm_dht.clock import Clock
from plasm_dht.errors import RecordError
from plasm_dht.record import Record, decode, keys_of, verify

# A publisher's clock may be this far ahead of ours (ms).
MAX_AHEAD = 300_000
DEFAULT_MAX_TTL = 604_800
DEFAULT_MAX_RECORDS = 100_000
DEFAULT_MAX_BYTES = 64 * 2**20
# Enough for every provider of one channel; a crowd of made-up publishers stops here and evicts nobody.
MAX_PUBLISHERS = 32
# Expired holdings that one read or write removes at most, so that none pauses the loop.
EXPIRY_SLICE = 200


class Verdict(NamedTuple):
    """What became of a store: `reason` is `None` when it was accepted; `held` is the envelope that is held instead."""

    reason: str | None = None
    held: bytes | None = None


ACCEPTED = Verdict()


class Holding:
    """One publisher's newest envelope under one key, and until when it counts. Times: ms on the wall, s monotonic."""

    __slots__ = (
        "contested_until",
        "deadline",
        "envelope",
        "expires_at",
        "issued_at",
        "keep_deadline",
        "keep_until",
        "own",
        "public_key",
        "received",
        "seq",
        "withdrawn",
    )

    def __init__(self, record: Record, deadline: float, received: float, *, own: bool) -> None:
        self.envelope = record.envelope
        self.public_key = record.public_key
        self.seq = record.seq
        self.issued_at = record.issued_at
        self.expires_at = record.expires_at
        self.withdrawn = record.withdrawn
        self.deadline = deadline
        self.received = received
        self.own = own
        self.keep_until = record.expires_at
        self.keep_deadline = deadline
        # Until then another holder may still have a different, older record of this publisher alive.
        self.contested_until = 0

    def is_over(self, now: int, monotonic: float) -> bool:
        """Whether its life has ended by either clock."""
        return now >= self.expires_at or monotonic >= self.deadline

    def is_forgettable(self, wall: int, monotonic: float) -> bool:
        """Whether nothing older can come back any more: by both clocks, since either may have jumped."""
        return wall >= self.keep_until and monotonic >= self.keep_deadline

    def inherit(self, older: "Holding", *, changed: bool) -> None:
        """Take over what the replaced holding still guards against."""
        self.own = self.own or older.own
        self.keep_until = max(self.keep_until, older.keep_until)
        self.keep_deadline = max(self.keep_deadline, older.keep_deadline)
        self.contested_until = max(older.contested_until, older.expires_at if changed else 0)


class RecordStorage(IStorage):  # type: ignore[misc]  # the base library has no types
    """Records by key, several publishers a key, capped in records and bytes.

    As a kademlia storage: `storage[key] = envelope` admits (or raises `RecordError`), reading gives the live envelope
    of the freshest publisher.
    """

    def __init__(
        self,
        *,
        max_records: int = DEFAULT_MAX_RECORDS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_ttl: int = DEFAULT_MAX_TTL,
        clock: Clock | None = None,
    ) -> None:
        self.max_records = max_records
        self.max_bytes = max_bytes
        self.max_ttl = max_ttl
        self.clock = clock or Clock()
        self.records = 0
        self.bytes = 0
        # Called with (key, holding) after each change of what is held.
        self.on_change: Callable[[bytes, Holding], None] | None = None
        self._node_id = 0
        self._by_key: dict[bytes, list[Holding]] = {}  # each list freshest first
        self._distances: SortedList[int] = SortedList()  # the keys as distances to the node's id
        self._expiry: list[tuple[float, bytes]] = []  # when to look at a key again, lazily deleted

    def attach(self, node_id: bytes, clock: Clock) -> None:
        """Say for which node this holds records: whose clock counts, and to which id a record is far."""
        self.clock = clock
        self._node_id = int.from_bytes(node_id)
        self._distances = SortedList(self._distance(key) for key in self._by_key)

    # -- admission ---------------------------------------------------------------------------------------------------

    def check(self, key: bytes, envelope: object) -> Record | Verdict:
        """The cheap half of admission, in the contract's order, up to `stale`: the record then has to be admitted."""
        try:
            record = decode(envelope)
        except RecordError as error:
            return Verdict(error.reason)
        if key not in keys_of(record):
            return Verdict("wrong_key")
        wall = self.clock.wall()
        if record.issued_at > wall + MAX_AHEAD:
            return Verdict("clock")
        life = record.expires_at - record.issued_at
        if record.expires_at <= wall or life <= 0:
            return Verdict("expired")
        if life > self.max_ttl * 1000:
            return Verdict("ttl_too_long")
        held = self.holding(key, record.public_key)
        if held is not None and held.envelope == record.envelope:
            held.received = self.clock.monotonic()
            return ACCEPTED
        if held is not None and held.seq > record.seq:
            return Verdict("stale", held.envelope)
        return record

    def admit(self, key: bytes, record: Record) -> Verdict:
        """The dear half: signature, tie, room."""
        if not verify(record):
            return Verdict("bad_signature")
        self.forget(EXPIRY_SLICE)  # before we look at what is held: that may be what is forgotten
        held = self.holding(key, record.public_key)
        if held is not None and (held.seq, held.envelope) > (record.seq, record.envelope):
            return Verdict("conflict", held.envelope)
        if held is None and len(self._by_key.get(key, ())) >= MAX_PUBLISHERS:
            return Verdict("full")
        grows = len(record.envelope) - (len(held.envelope) if held else 0)
        if not self._make_room(key, 0 if held else 1, grows):
            return Verdict("full")
        self._put(key, record, held, own=False)
        return ACCEPTED

    def store(self, key: bytes, envelope: object) -> Verdict:
        """Check and admit at once, for a sender that needs no verifying."""
        checked = self.check(key, envelope)
        return self.admit(key, checked) if isinstance(checked, Record) else checked

    def keep_own(self, key: bytes, record: Record) -> None:
        """Hold a record that this node has just signed: always, whatever its clock says and however full it is."""
        self._put(key, record, self.holding(key, record.public_key), own=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    def holdings(self, key: bytes) -> list[Holding]:
        """What is held under the key, freshest publisher first: tombstones, and the expired that still guard, too."""
        self.forget(EXPIRY_SLICE)
        return self._by_key.get(key, [])

    def holding(self, key: bytes, public_key: bytes) -> Holding | None:
        """What is held of one publisher under the key."""
        for holding in self._by_key.get(key, ()):
            if holding.public_key == public_key:
                return holding
        return None

    def keys_between(self, nearest: int, farthest: int) -> Iterable[bytes]:
        """The keys held at distances (XOR with the node's id) from `nearest` up to and without `farthest`, in order."""
        for distance in self._distances.irange(nearest, farthest, inclusive=(True, False)):
            yield self._key_at(distance)

    def keys(self) -> Iterable[bytes]:
        """Every key, the nearest to the node's id first."""
        return map(self._key_at, self._distances)

    # -- ending ------------------------------------------------------------------------------------------------------

    def forget(self, limit: int) -> int:
        """Remove what is over and guards nothing, looking at `limit` keys at most. Returns how many it looked at."""
        wall, monotonic = self.clock.wall(), self.clock.monotonic()
        looked = 0
        while self._expiry and self._expiry[0][0] <= monotonic and looked < limit:
            _, key = heapq.heappop(self._expiry)
            looked += 1
            waits = []
            for holding in list(self._by_key.get(key, ())):
                if holding.is_forgettable(wall, monotonic):
                    self._remove(key, holding)
                elif holding.keep_deadline <= monotonic:  # the wall clock was stepped back
                    waits.append(holding.keep_until - wall)
            if waits:  # one entry for the one taken: more would multiply
                self._look_again(monotonic + min(waits) / 1000, key)
        return looked

    def close(self) -> None:
        """Let go of what is outside the process: nothing here."""

    # -- kademlia's IStorage -----------------------------------------------------------------------------------------

    def __setitem__(self, key: bytes, value: object) -> None:
        verdict = self.store(key, value)
        if verdict.reason is not None:
            raise RecordError(verdict.reason, f"the record for key {key.hex()} is refused: {verdict.reason}")

    def __getitem__(self, key: bytes) -> bytes:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        for holding in self._by_key.get(key, ()):
            if not holding.withdrawn and not holding.is_over(now, monotonic):
                return holding.envelope
        raise KeyError(key)

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        """The live envelope of the freshest publisher, or the default."""
        try:
            return self[key]
        except KeyError:
            return default

    def iter_older_than(self, seconds_old: float) -> list[tuple[bytes, bytes]]:
        """(key, envelope) of what was received at least that long ago and is not over."""
        received = self.clock.monotonic() - seconds_old
        return [(key, holding.envelope) for key, holding in self._standing() if holding.received <= received]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return ((key, holding.envelope) for key, holding in self._standing())

    def __len__(self) -> int:
        return self.records

    # -- inside ------------------------------------------------------------------------------------------------------

    def _standing(self) -> Iterator[tuple[bytes, Holding]]:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        for key, holdings in self._by_key.items():
            for holding in holdings:
                if not holding.is_over(now, monotonic):
                    yield key, holding

    def _distance(self, key: bytes) -> int:
        return int.from_bytes(key) ^ self._node_id

    def _key_at(self, distance: int) -> bytes:
        return (distance ^ self._node_id).to_bytes(20)

    def _make_room(self, key: bytes, records: int, size: int) -> bool:
        """Whether that much more fits, once records with a key strictly farther than this one have gone."""
        distance = self._distance(key)
        victims: list[tuple[bytes, Holding]] = []
        # What needs no more room than before fits, even where the node's own records take more than there is.
        over_records = self.records + records - self.max_records if records > 0 else 0
        over_bytes = self.bytes + size - self.max_bytes if size > 0 else 0
        farthest = reversed(self._distances)
        while over_records > 0 or over_bytes > 0:
            far = next(farthest, -1)
            if far <= distance:
                return False
            for holding in reversed(self._by_key[self._key_at(far)]):
                if not holding.own and (over_records > 0 or over_bytes > 0):
                    victims.append((self._key_at(far), holding))
                    over_records -= 1
                    over_bytes -= len(holding.envelope)
        for victim in victims:
            self._remove(*victim)
        return True

    def _put(self, key: bytes, record: Record, held: Holding | None, *, own: bool) -> None:
        now = self.clock.now() if own else self.clock.wall()
        life = min(record.expires_at - now, record.expires_at - record.issued_at) / 1000
        monotonic = self.clock.monotonic()
        holding = Holding(record, monotonic + life, monotonic, own=own)
        if held is not None:
            older = decode(held.envelope)
            changed = (older.withdrawn, older.value) != (record.withdrawn, record.value)
            holding.inherit(held, changed=changed)
            self._remove(key, held)
        holdings = self._by_key.get(key)
        if holdings is None:
            holdings = self._by_key[key] = []
            self._distances.add(self._distance(key))
        holdings.append(holding)
        holdings.sort(key=lambda each: (each.issued_at, each.seq, each.envelope), reverse=True)
        self.records += 1
        self.bytes += len(holding.envelope)
        self._look_again(holding.keep_deadline, key)
        if self.on_change is not None:
            self.on_change(key, holding)

    def _remove(self, key: bytes, holding: Holding) -> None:
        holdings = self._by_key[key]
        holdings.remove(holding)
        self.records -= 1
        self.bytes -= len(holding.envelope)
        if not holdings:
            del self._by_key[key]
            self._distances.remove(self._distance(key))

    def _look_again(self, at: float, key: bytes) -> None:
        if len(self._expiry) > 2 * self.records + 64:  # deleted entries must not pile up
            self._expiry = [
                (holding.keep_deadline, key) for key, holdings in self._by_key.items() for holding in holdings
            ]
            heapq.heapify(self._expiry)
        heapq.heappush(self._expiry, (at, key))
