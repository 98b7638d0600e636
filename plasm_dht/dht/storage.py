"""TTL-aware storage: which records a node holds, admits, hands out and forgets. It verifies records, never senders.

A record ends at `expires_at` by the wall clock or at its deadline on the monotonic clock, whichever comes first: wall
time can be stepped, monotonic time stands still while a machine sleeps. The newest envelope of a publisher is kept
until the latest `expires_at` that was ever accepted from it for that key, so that an older record with a longer life
cannot come back after a newer, shorter one has expired.

A million records pause nothing: whatever is done to one of them costs O(log n), no structure is ever rebuilt, and none
is made of objects that the garbage collector walks through.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kademlia.storage import IStorage

from plasm_dht.clock import Clock
from plasm_dht.dht.holding import Holding
from plasm_dht.dht.ids import Address
from plasm_dht.dht.order import KEY_BYTES, SortedBytes, TimedKeys
from plasm_dht.errors import RecordError
from plasm_dht.record import MAX_TTL, Record, decode, keys_of, verify

# A publisher's clock may be this far ahead of ours (ms).
MAX_AHEAD = 300_000
DEFAULT_MAX_RECORDS = 100_000
DEFAULT_MAX_BYTES = 64 * 2**20
# Enough for every provider of one channel; a crowd of made-up publishers stops here and evicts nobody.
MAX_PUBLISHERS = 32
# Ended holdings that one write looks at, at most, and holdings that it evicts: each takes about 20 us.
EXPIRY_SLICE = 100
EVICTION_SLICE = 100
# Whether something can be forgotten that a wall clock which was stepped back still holds is looked at this often (s):
# set to 1970 for a moment, it would else hold it for half a century.
LOOK_AGAIN = 3600.0


class Verdict(NamedTuple):
    """What became of a store: `reason` is `None` when it was accepted; `held` is the envelope that is held instead."""

    reason: str | None = None
    held: bytes | None = None


ACCEPTED = Verdict()


class RecordStorage(IStorage):  # type: ignore[misc]  # the base library has no types
    """Records by key, several publishers a key, capped in records and bytes.

    As a kademlia storage: `storage[key] = envelope` admits (or raises `RecordError`), reading gives the live envelope
    of the freshest publisher.

    `_take_in` and `_remove` are the two places where what is held changes: a subclass that keeps it elsewhere, too,
    extends these. (What a holding says of itself, when it was received or is to be passed on, changes in its
    attributes.)
    """

    # What a storage that outlives the process knows of the node's earlier run: its id, and where its contacts were.
    node_id: bytes | None = None
    contacts: Sequence[Address] = ()

    def __init__(
        self,
        *,
        max_records: int = DEFAULT_MAX_RECORDS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_ttl: int = MAX_TTL,
        clock: Clock | None = None,
    ) -> None:
        self.max_records = max_records
        self.max_bytes = max_bytes
        self.max_ttl = max_ttl
        self.clock = clock or Clock()
        self.records = 0
        self.bytes = 0
        # Called with a key when what is held under it changes, for who keeps a reply made of it. That a record ends
        # does not show.
        self.on_shelved: Callable[[bytes], None] | None = None
        # Called with (key, holding) after a record was put, and after one was removed.
        self.on_change: Callable[[bytes, Holding], None] | None = None
        self.on_remove: Callable[[bytes, Holding], None] | None = None
        # By key who else is told of each record that is put there, with its holding.
        self.observers: dict[bytes, list[Callable[[Holding], None]]] = {}
        self._node_id = 0
        # The freshest holding of each key, by the key's last byte (the first is that of the node's id in most): small
        # dicts, because one of a million keys takes 40 ms to grow.
        self._shelves: list[dict[bytes, Holding]] = [{} for _ in range(256)]
        # The distances of the keys to the node's id: those with others' records, and those with its own alone, which
        # are never evicted.
        self._foreign = SortedBytes(KEY_BYTES)
        self._own = SortedBytes(KEY_BYTES)
        self._expiry = TimedKeys()  # one entry a holding, at its `look_at`

    def attach(self, node_id: bytes, clock: Clock) -> None:
        """Say for which node this holds records: whose clock counts, and to which id a record is far."""
        self.clock = clock
        if self._node_id == int.from_bytes(node_id):
            return
        keys = list(self.keys())
        self._node_id = int.from_bytes(node_id)
        self._foreign, self._own = SortedBytes(KEY_BYTES), SortedBytes(KEY_BYTES)
        for key in keys:
            self._order(self.held(key)).add(self._distance(key))

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
            return ACCEPTED
        if held is not None and held.seq > record.seq:
            return Verdict("stale", held.envelope)
        return record

    def admit(self, key: bytes, record: Record) -> Verdict:
        """The dear half: signature, tie, room."""
        if not self._has_verified(record) and not verify(record):
            return Verdict("bad_signature")
        self.forget(EXPIRY_SLICE)  # before we look at what is held: that may be what is forgotten
        held = self.holding(key, record.public_key)
        if held is not None and (held.seq, held.envelope) > (record.seq, record.envelope):
            return Verdict("conflict", held.envelope)
        if held is None and len(self.holdings(key)) >= MAX_PUBLISHERS:
            return Verdict("full")
        grows = len(record.envelope) - (len(held.envelope) if held else 0)
        if not self._make_room(key, 0 if held else 1, grows):
            return Verdict("full")
        self._put(key, record, held, own=False)
        return ACCEPTED

    def _has_verified(self, record: Record) -> bool:
        """Whether the same bytes are held under the record's other key: who is near to both gets them twice."""
        held = (self.holding(key, record.public_key) for key in keys_of(record))
        return any(each is not None and each.envelope == record.envelope for each in held)

    def store(self, key: bytes, envelope: object) -> Verdict:
        """Check and admit at once, for a sender that needs no verifying."""
        checked = self.check(key, envelope)
        if checked is ACCEPTED:
            self.receive_again(key, envelope)
        return self.admit(key, checked) if isinstance(checked, Record) else checked

    def receive_again(self, key: bytes, envelope: object) -> None:
        """Note that a sender whose address is known to be real has what is held, too: it need not be passed on yet."""
        for holding in self.held(key):
            if holding.envelope == envelope:
                holding.received = self.clock.monotonic()

    def keep_own(self, key: bytes, record: Record) -> None:
        """Hold a record that this node has just signed: always, whatever its clock says and however full it is."""
        self._put(key, record, self.holding(key, record.public_key), own=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    def holdings(self, key: bytes) -> tuple[Holding, ...]:
        """What is held under the key, freshest publisher first: tombstones, and the expired that still guard, too."""
        held = self.held(key)
        if held:
            monotonic = self.clock.monotonic()
            for holding in held:
                if holding.look_at <= monotonic:
                    self._look(key, holding, self.clock.wall(), monotonic)
                    return self.holdings(key)
        return held

    def held(self, key: bytes) -> tuple[Holding, ...]:
        """As `holdings`, with what has ended and is not forgotten yet. Reads no clock."""
        freshest = self._shelves[key[-1]].get(key)
        if freshest is None:
            return ()
        return (freshest, *freshest.others) if freshest.others else (freshest,)

    def holding(self, key: bytes, public_key: bytes) -> Holding | None:
        """What is held of one publisher under the key."""
        for holding in self.held(key):
            if holding.public_key == public_key:
                return holding
        return None

    def keys_between(self, nearest: int, farthest: int) -> Iterator[bytes]:
        """The keys held at distances (XOR with the node's id) from `nearest` up to and without `farthest`, in order.

        What is put and removed meanwhile may or may not be among them.
        """
        if nearest >= 2 ** (8 * KEY_BYTES):
            return
        start = nearest.to_bytes(KEY_BYTES)
        for entry in heapq.merge(self._foreign.ascending(start), self._own.ascending(start)):
            distance = int.from_bytes(entry)
            if distance >= farthest:
                return
            yield (distance ^ self._node_id).to_bytes(KEY_BYTES)

    def keys(self) -> Iterator[bytes]:
        """Every key, the nearest to the node's id first."""
        return self.keys_between(0, 2 ** (8 * KEY_BYTES))

    # -- ending ------------------------------------------------------------------------------------------------------

    def forget(self, limit: int) -> int:
        """Remove what is over and guards nothing, looking at `limit` records at most. Returns how many it looked at."""
        wall, monotonic = self.clock.wall(), self.clock.monotonic()
        for looked in range(limit):
            soonest = self._expiry.soonest()
            if soonest is None or soonest[0] > monotonic:
                return looked
            at, key = soonest
            holding = next(each for each in self.held(key) if each.look_at == at)
            self._look(key, holding, wall, monotonic)
        return limit

    # -- what outlives the process: nothing here ---------------------------------------------------------------------

    def keep_contacts(self, addresses: Sequence[Address]) -> None:
        """Remember where to find other nodes again."""

    def last_said(self, public_key: bytes, name: str) -> tuple[int, int]:
        """The highest `seq` and the latest end (Unix ms) that this node has ever signed for the name; 0: nothing."""
        return 0, 0

    async def run(self) -> None:
        """Let what is outside the process follow what is held, until cancelled."""

    async def close(self) -> None:
        """Let go of what is outside the process."""

    # -- kademlia's IStorage -----------------------------------------------------------------------------------------

    def __setitem__(self, key: bytes, value: object) -> None:
        verdict = self.store(key, value)
        if verdict.reason is not None:
            raise RecordError(verdict.reason, f"the record for key {key.hex()} is refused: {verdict.reason}")

    def __getitem__(self, key: bytes) -> bytes:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        for holding in self.held(key):
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

    def _look(self, key: bytes, holding: Holding, wall: int, monotonic: float) -> None:
        """Remove a holding whose time has come, or look again later: the wall clock was stepped back."""
        if holding.is_forgettable(wall, monotonic):
            self._remove(key, holding)
            return
        self._expiry.cancel(holding.look_at, key)
        holding.look_at = monotonic + min((holding.keep_until - wall) / 1000, LOOK_AGAIN)
        self._expiry.schedule(holding.look_at, key)

    def _standing(self) -> Iterator[tuple[bytes, Holding]]:
        now, monotonic = self.clock.now(), self.clock.monotonic()
        for key in self.keys():
            for holding in self.held(key):
                if not holding.is_over(now, monotonic):
                    yield key, holding

    def _distance(self, key: bytes) -> bytes:
        return (int.from_bytes(key) ^ self._node_id).to_bytes(KEY_BYTES)

    def _order(self, holdings: Iterable[Holding]) -> SortedBytes:
        return self._own if all(holding.own for holding in holdings) else self._foreign

    def _make_room(self, key: bytes, records: int, size: int) -> bool:
        """Whether that much more fits, once records with a key strictly farther than this one have gone.

        Where the node's own records have made it far too many, not all that is too much goes at once.
        """
        distance = self._distance(key)
        victims: list[tuple[bytes, Holding]] = []
        # What needs no more room than before fits in any case.
        over_records = self.records + records - self.max_records if records > 0 else 0
        over_bytes = self.bytes + size - self.max_bytes if size > 0 else 0
        farthest = self._foreign.descending()
        while (over_records > 0 or over_bytes > 0) and len(victims) < EVICTION_SLICE:
            far = next(farthest, b"")
            if far <= distance:
                return False
            far_key = self._distance(far)
            for holding in reversed(self.held(far_key)):
                if not holding.own and (over_records > 0 or over_bytes > 0):
                    victims.append((far_key, holding))
                    over_records -= 1
                    over_bytes -= len(holding.envelope)
        for victim in victims:
            self._remove(*victim)
        return True

    def _put(self, key: bytes, record: Record, held: Holding | None, *, own: bool) -> None:
        """Hold the record in place of what was held of its publisher."""
        now = self.clock.now() if own else self.clock.wall()
        life = min(record.expires_at - now, record.expires_at - record.issued_at) / 1000
        monotonic = self.clock.monotonic()
        holding = Holding.of(record, monotonic + life, monotonic, own=own)
        if held is not None:
            older = decode(held.envelope)
            changed = (older.withdrawn, older.value) != (record.withdrawn, record.value)
            holding.inherit(held, changed=changed)
        self._take_in(key, holding, held)

    def _take_in(self, key: bytes, holding: Holding, held: Holding | None = None) -> None:
        """Hold it in the place of what was held of its publisher, besides what is held under the key of others."""
        self._shelve(key, [*(each for each in self.held(key) if each is not held), holding])
        if held is not None:
            self._forget(key, held)
        self.records += 1
        self.bytes += len(holding.envelope)
        holding.look_at = max(0.0, holding.keep_deadline)
        self._expiry.schedule(holding.look_at, key)
        if self.on_change is not None:
            self.on_change(key, holding)
        for observer in self.observers.get(key, ()):
            observer(holding)

    def _remove(self, key: bytes, holding: Holding) -> None:
        """Hold it no longer."""
        self._shelve(key, [each for each in self.held(key) if each is not holding])
        self._forget(key, holding)

    def _forget(self, key: bytes, holding: Holding) -> None:
        """Count it no more, and tell whoever follows."""
        self.records -= 1
        self.bytes -= len(holding.envelope)
        self._expiry.cancel(holding.look_at, key)
        if self.on_remove is not None:
            self.on_remove(key, holding)

    def _shelve(self, key: bytes, holdings: list[Holding]) -> None:
        """Let these be what is held under the key."""
        if self.on_shelved is not None:
            self.on_shelved(key)
        before = self.held(key)
        old = self._order(before) if before else None
        new = self._order(holdings) if holdings else None
        if old is not new:
            distance = self._distance(key)
            if old is not None:
                old.remove(distance)
            if new is not None:
                new.add(distance)
        for holding in before:
            holding.others = ()
        if not holdings:
            del self._shelves[key[-1]][key]
            return
        if len(holdings) == 1:
            self._shelves[key[-1]][key] = holdings[0]
            return
        freshest, *others = sorted(holdings, key=lambda each: (each.issued_at, each.seq, each.envelope), reverse=True)
        freshest.others = tuple(others)
        self._shelves[key[-1]][key] = freshest
